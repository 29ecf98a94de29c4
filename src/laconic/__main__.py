"""The process: `laconic` and `python -m laconic`. Interrupting it at any moment ends it quietly with exit code 130."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

INTERRUPTED = 130


class _Interrupt:
    """Ctrl-C. Libraries turn the exception into others, so that it came is remembered as well."""

    came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.came = True
        raise KeyboardInterrupt


def main() -> None:
    """Run the command line and leave the process with its exit code."""
    interrupt = _Interrupt()
    signal.signal(signal.SIGINT, interrupt)
    try:
        from laconic.cli.main import run

        code = run()
    except BaseException:
        if not interrupt.came:
            raise
        code = INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the work is done; Python's own shutdown is not to be interrupted
    if interrupt.came and code != 0:
        # In the usual way Python would die of the signal if it came while a string of code was run, even if caught.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    sys.exit(code)


if __name__ == "__main__":
    main()
