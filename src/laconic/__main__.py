"""The process: `laconic` and `python -m laconic`. Interrupting it at any moment ends it quietly with exit code 130."""

from __future__ import annotations

import os
import signal
import sys

_INTERRUPTED = 130


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    try:
        from laconic.cli.main import run

        code = run()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done; Python's own shutdown is not to be interrupted
    if code == _INTERRUPTED:
        # An interrupt that came while Python ran a string of code marks the process as dying of it, also when it was
        # caught: leaving in the usual way would end it by the signal instead of with the exit code.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
