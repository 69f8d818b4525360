"""Where this folder is on PYTHONPATH, the toy methods have their rows in the table, in every process."""

import importlib.abc
import importlib.machinery
import sys


class Adds(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the module of the table as ever, and adds the rows."""

    def find_spec(self, name, path=None, target=None):
        """That module only."""
        if name != "dfkd_ray.config.methods":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec):
        """As ever."""
        return None

    def exec_module(self, module):
        """The table, then the rows, then what is derived from it."""
        self.loader.exec_module(module)
        import toy_methods

        module.METHODS |= toy_methods.METHODS
        module.SynthesisConfig = module.union_of(module.METHODS)


sys.meta_path.insert(0, Adds())
