"""Placing files and folders: written beside the target, moved into place whole, never over something unasked.

    with temporary_beside(path) as temporary:
        write(temporary)                              # a file or a folder
        place_file(temporary, path, force=force)      # or place_directory

Whatever happens in between (also a kill), the target is the old one or the new one, never a part. A temporary is
removed when the block is left; one of a process that died, the next time something is written beside it.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from laconic.ir.errors import UsageError

log = logging.getLogger(__name__)

_AT_FDCWD = -100
_RENAME_NOREPLACE, _RENAME_EXCHANGE = 1, 2
#: What the kernel, the C library or the file system says when it cannot do a flagged rename.
_UNAVAILABLE = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}


def refuse_existing(path: str | os.PathLike[str], force: bool) -> None:
    """Raise UsageError if something is in the way and `force` is not given. For before the work; placing asks again."""
    if not force and os.path.lexists(path):
        raise UsageError(f"{os.fspath(path)} exists already", hint="choose another name, or add --force to replace it")


def read_text(path: Path) -> str:
    """The text of a file. Raises FileNotFoundError if there is none, OSError for what is something else (a pipe would
    be waited for), UnicodeDecodeError if it is not UTF-8."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no file")
    return path.read_text(encoding="utf-8")


@contextmanager
def temporary_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A name in the folder of `path` (made if need be) under which nothing exists yet, on the same file system.

    Whatever stands under it when the block is left, by an exception or not, is removed.
    """
    final = _resolved(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    _clean(final)
    temporary = final.parent / _temporary_name(final)
    try:
        yield temporary
    except OSError as problem:
        if problem.filename is None:  # as of a write to a full disk
            problem.filename = os.fspath(final)
        raise
    finally:
        _remove(temporary)


def place_file(temporary: str | os.PathLike[str], final: str | os.PathLike[str], force: bool) -> None:
    """Move a finished file to `final`, durably. Both must be on one file system, as `temporary_beside` sees to.

    Raises UsageError if `final` exists and `force` is not given, or if it is a folder.
    """
    source, target = Path(temporary), _resolved(final)
    if target.is_dir():
        raise UsageError(f"{target} is a folder, and a file is to be written", hint="choose another name")
    refuse_existing(target, force)
    _sync(source)
    if force or not _rename(source, target, _RENAME_NOREPLACE):
        os.replace(source, target)
    _sync(target.parent)


def place_directory(temporary: str | os.PathLike[str], final: str | os.PathLike[str], force: bool) -> None:
    """Move a finished folder to `final`, durably; one that was there is replaced by exchanging the two names.

    Where the file system cannot exchange (a warning is logged) the old folder is set aside for the moment between two
    renames; if the process dies in that moment, the next `temporary_beside` the same target puts it back.

    Raises UsageError if `final` exists and `force` is not given, if it is no folder, or if it is the current folder or
    holds it.
    """
    source, target = Path(temporary), _resolved(final)
    refuse_existing(target, force)
    if os.path.lexists(target):
        if not target.is_dir():
            raise UsageError(f"{target} is a file, and a folder is to be written", hint="choose another name")
        if Path.cwd().resolve().is_relative_to(target):
            raise UsageError(f"{target} holds the current folder and is not replaced", hint="choose another name")
    for folder, _, files in os.walk(source, topdown=False):
        for name in files:
            _sync(Path(folder, name))
        _sync(Path(folder))
    if not os.path.lexists(target):
        if not _rename(source, target, _RENAME_NOREPLACE):
            os.rename(source, target)
    elif _rename(source, target, _RENAME_EXCHANGE):
        _sync(target.parent)
        _remove(source)
    else:
        log.warning("%s: this file system cannot exchange two folders at once; replacing in two steps", target)
        aside = source.with_name(source.name + ".old")
        os.rename(target, aside)
        os.rename(source, target)
        _sync(target.parent)
        _remove(aside)
    _sync(target.parent)


def _resolved(path: str | os.PathLike[str]) -> Path:
    """Where a path leads: a link stays, and what it points to is replaced."""
    return Path(os.path.realpath(path))


def _temporary_name(final: Path) -> str:
    return f".{final.name}.laconic-{os.getpid()}-{secrets.token_hex(4)}"


def _clean(final: Path) -> None:
    """Remove what dead processes left beside `final`, and put back a folder that one of them had set aside."""
    pattern = re.compile(re.escape(f".{final.name}.laconic-") + r"(\d+)-[0-9a-f]{8}(\.old)?")
    for entry in sorted(final.parent.iterdir()):
        found = pattern.fullmatch(entry.name)
        if found is None or _alive(int(found[1])):
            continue
        if found[2] and not os.path.lexists(final):
            log.warning("%s: putting back what an interrupted run had set aside", final)
            os.rename(entry, final)
        else:
            log.info("removing %s, left by an interrupted run", entry)
            _remove(entry)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have the system write a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Linux's renameat2; whether it could be done. Raises UsageError if `target` has come into being meanwhile."""
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is None:
        return False
    if function(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(flag)) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNAVAILABLE:
        return False
    if code == errno.EEXIST:
        refuse_existing(target, force=False)
    raise OSError(code, os.strerror(code), os.fspath(target))
