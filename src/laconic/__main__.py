"""The process: `laconic` and `python -m laconic`. Interrupting it at any moment ends it quietly with exit code 130."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    try:
        from laconic.cli.main import run

        code = run()
    except KeyboardInterrupt:
        code = 130
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done; Python's own shutdown is not to be interrupted
    sys.exit(code)


if __name__ == "__main__":
    main()
