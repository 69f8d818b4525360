"""`python -m dfkd_ray` and the `dfkd-ray` console command."""

import os
import signal
import sys
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


if __name__ == "__main__":
    main()
