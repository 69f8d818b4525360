"""`python -m dfkd_ray` and the `dfkd-ray` console command."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the working folder, put first by `python -m`: what lies there is no code of this program

import os
import signal
from contextlib import suppress


def main() -> None:
    """Run the command line; interrupted while it is loaded or while it ends, it leaves no traceback either."""
    try:
        from dfkd_ray.cli import main as run

        run()
    except KeyboardInterrupt:
        with suppress(OSError):
            os.write(2, b"error: interrupted\n")
        sys.exit(130)
    finally:
        if callable(signal.getsignal(signal.SIGINT)):  # what libraries still put away at exit is not worth a traceback
            signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(130))


def find_package() -> None:
    """Where the package was found through the working folder alone, as in a checkout, let others find it, last."""
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    if not any(finder.find_spec("dfkd_ray", None) for finder in finders):
        sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


if __name__ == "__main__":
    find_package()
    main()
