"""Where this folder is on PYTHONPATH, the toy methods have their rows in the table, in every process."""

import importlib.abc
import importlib.machinery
import sys


class Adds(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the module of the table as ever, and adds the rows."""

    loader: importlib.abc.Loader

    def find_spec(self, name, path=None, target=None):
        """That module only."""
        if name != "dfkd_ray.config.methods":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None and spec.loader is not None
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        """As ever."""
        return None

    def exec_module(self, module):
        """The table, then the rows, then what is derived from it."""
        self.loader.exec_module(module)
        import toy_methods

        table = vars(module)
        table["METHODS"] |= toy_methods.METHODS
        table["SynthesisConfig"] = table["union_of"](table["METHODS"])


sys.meta_path.insert(0, Adds())
