"""`python -m dfkd_ray` and the `dfkd-ray` console command."""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    del sys.path[0]  # the working folder, which `python -m` puts first: its files are not part of this program

import gc
import os
import signal
from contextlib import suppress

# Allocations before a collection of garbage; 700 is the default. torch, Ray and pandas make a million objects that
# stay: to look for garbage among them, while they are imported and again at exit, took a third of a command's start.
COLLECT_AFTER = 10_000


def main() -> None:
    """Run the command line. An interrupt during loading or exit leaves no traceback."""
    gc.set_threshold(COLLECT_AFTER)
    try:
        from dfkd_ray.cli import main as run

        run()
    except KeyboardInterrupt:
        with suppress(OSError):
            os.write(2, b"error: interrupted\n")
        sys.exit(130)
    finally:
        gc.freeze()
        if callable(signal.getsignal(signal.SIGINT)):  # what libraries still put away at exit is not worth a traceback
            signal.signal(signal.SIGINT, lambda _number, _frame: os._exit(130))


def find_package() -> None:
    """If the package was found only in the working folder, as in a checkout, append that folder to `sys.path`."""
    finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
    if not any(finder.find_spec("dfkd_ray", None) for finder in finders):
        sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


if __name__ == "__main__":
    find_package()
    main()
