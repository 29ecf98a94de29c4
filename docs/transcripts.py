"""The transcripts in the documentation: runs each command again and compares, or writes what it prints.

    python docs/transcripts.py [--update]

A transcript stands between `<!-- transcript: laconic ... -->` and `<!-- /transcript -->`. The commands of a file run
one after another in one fresh folder that holds `examples/`, with all that they print in the order in which they print
it; behind `>/dev/null` is only what goes to stderr. Times, versions and the widths of table columns are not compared.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("docs/README.md", "docs/debugging.md")
BLOCK = re.compile(r"(<!-- transcript: (?P<command>.*?) -->\n)(?P<body>.*?)(<!-- /transcript -->)", re.DOTALL)
SILENT = " >/dev/null"

#: Makes the faulty pass of `examples/` known as an installed package would.
PLUGIN = {
    "METADATA": "Metadata-Version: 2.1\nName: fast-tanh\nVersion: 1\n",
    "entry_points.txt": "[laconic.passes]\nfast-tanh = examples.fast_tanh:FastTanh\n",
}


def main(update: bool) -> int:
    """The number of files that are not what running their commands gives."""
    os.environ.update(NO_COLOR="1", COLUMNS="116", OMP_NUM_THREADS="1")
    stale = 0
    for name in FILES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        with workplace():
            fresh = BLOCK.sub(again, text)
        if fresh == text:
            continue
        if update:
            path.write_text(fresh, encoding="utf-8")
            print(f"{name} is written")
        else:
            stale += 1
            print(
                *difflib.unified_diff(text.splitlines(), fresh.splitlines(), name, "run again", lineterm=""), sep="\n"
            )
    if stale:
        print("\nto write them anew: python docs/transcripts.py --update")
    return stale


@contextlib.contextmanager
def workplace() -> Iterator[None]:
    """A fresh current folder with the examples in it."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "examples", Path(folder, "examples"))
        package = Path(folder, "fast_tanh-1.dist-info")
        package.mkdir()
        for name, text in PLUGIN.items():
            (package / name).write_text(text, encoding="utf-8")
        os.chdir(folder)
        sys.path.insert(0, folder)
        try:
            yield
        finally:
            os.chdir(before)
            sys.path.remove(folder)


def again(block: re.Match[str]) -> str:
    """The block with what its command prints now; as it is, if that says the same."""
    command = block["command"]
    body = f"\n```console\n$ {command}\n{printed(command)}```\n\n"
    body = block["body"] if normal(body) == normal(block["body"]) else body
    return f"{block[1]}{body}{block[4]}"


def printed(command: str) -> str:
    """What a command prints, and its exit code unless that is 0."""
    from laconic.cli.main import run

    both = io.StringIO()
    stdout = io.StringIO() if command.endswith(SILENT) else both
    program, *arguments = shlex.split(command.removesuffix(SILENT))
    assert program == "laconic", command
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(both):
        code = run(arguments)
    text = "".join(f"{line.rstrip()}\n" for line in both.getvalue().splitlines())
    return text + (f"[exit code {code}]\n" if code else "")


def normal(text: str) -> str:
    """A transcript without what differs from run to run and from machine to machine."""
    text = re.sub(r"interval of 95 %; .*", "interval of 95 %; ...", text)
    text = re.sub(r"\d+(\.\d+)+\S*", "#", text)
    return re.sub(r"[ \u2500-\u257f]+", " ", text)


if __name__ == "__main__":
    sys.exit(main("--update" in sys.argv[1:]) != 0)
