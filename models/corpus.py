"""The text the decoders are trained on: the modules of Python's standard library, split by package.

A document is one file. Files of one package (and the tests of it) stay together, so that held-out text is of packages
that were never seen; files that repeat each other are left out before the split. The held-out documents are committed
(`data/text`), so that figures reproduce on any Python; training reads the library of the Python that runs it.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import json
import re
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laconic.ir.errors import ModelError

FOLDER = Path(__file__).parent / "data" / "text"

_SEED = "laconic-1"
_TEST, _SELECTION = 6, 9  # percent of the groups: below the first, below the second
_GREATEST_GROUP = 160_000  # bytes; a larger one would decide a held-out figure alone
_SHORTEST = 400  # characters
_CALIBRATION = 450_000  # bytes of training documents that are committed too

#: Folders that hold no modules of the library, and files that are tables, templates or broken on purpose.
_OTHER_FOLDERS = ("site-packages", "lib-dynload", "config-*")
_NO_PROSE = (
    "pydoc_data/topics.py",
    "lib2to3/tests/data/*",
    "test/encoded_modules/*",
    "test/*data/*",
    "*/bad_*",
    "encodings/cp*.py",
    "encodings/iso8859*.py",
    "encodings/mac_*.py",
    "encodings/koi8*.py",
    "encodings/tis_620.py",
    "encodings/kz1048.py",
    "encodings/ptcp154.py",
    "encodings/palmos.py",
    "encodings/hp_roman8.py",
    "encodings/big5*.py",
    "encodings/euc_*.py",
    "encodings/gb*.py",
    "encodings/iso2022*.py",
    "encodings/shift_jis*.py",
    "encodings/hz.py",
    "encodings/johab.py",
)

_SHINGLE = 8  # tokens
_SKETCH = 16  # one shingle in so many finds pairs
_CROWD = 40  # a shingle in more documents than this (a licence, a docstring) finds none
_REPEATED = 0.5  # the share of the smaller file's shingles


class Split(StrEnum):
    """What a document is for. Calibration documents are training documents."""

    TRAIN = "train"
    CALIBRATION = "calibration"
    SELECTION = "selection"
    TEST = "test"


@dataclass(frozen=True)
class Document:
    """A file: its path below the library's folder, the package it belongs to, and its text (tabs expanded)."""

    path: str
    group: str
    text: str


def library(root: Path | None = None) -> list[Document]:
    """The documents of the standard library (of the running Python), sorted by path; near-duplicates are in it.

    Raises ModelError if the folder holds too little, as where the library comes as an archive or without its tests.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    texts = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if text := _text(path, name):
            texts[name] = text
    if len(texts) < 500:
        raise ModelError(
            f"{root} holds {len(texts)} modules, too few to train on", hint="use a Python that has its tests"
        )
    modules = {name.split("/")[0].removesuffix(".py").strip("_") for name in texts} - {"test"}
    return [Document(name, _group(name, modules), text) for name, text in texts.items()]


def _text(path: Path, name: str) -> str:
    if any(fnmatch.fnmatch(part, pattern) for part in name.split("/")[:-1] for pattern in _OTHER_FOLDERS):
        return ""
    if any(fnmatch.fnmatch(name, pattern) for pattern in _NO_PROSE):
        return ""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return ""
    text = text.replace("\r\n", "\n").expandtabs()
    return text if len(text) >= _SHORTEST else ""


def _group(name: str, modules: Iterable[str]) -> str:
    """The package a file belongs to. Tests of X belong to X: the longest module name that theirs begins with."""
    top, *rest = name.split("/")
    if top != "test" or not rest:
        return top.removesuffix(".py").strip("_") or top
    tested = rest[0].removesuffix(".py").removeprefix("test_").strip("_")
    found = [module for module in modules if tested.startswith(module)]
    return max(found, key=len) if found else f"test/{tested}"


def split(documents: Sequence[Document]) -> dict[Split, list[Document]]:
    """Train, selection and test, by package: the same packages are held out on every Python."""
    sizes: dict[str, int] = {}
    for document in documents:
        sizes[document.group] = sizes.get(document.group, 0) + len(document.text.encode())
    found: dict[Split, list[Document]] = {Split.TRAIN: [], Split.SELECTION: [], Split.TEST: []}
    for document in documents:
        found[_bucket(document.group, sizes[document.group])].append(document)
    return found


def _bucket(group: str, size: int) -> Split:
    number = int(hashlib.sha256(f"{_SEED}:{group}".encode()).hexdigest(), 16) % 100
    if size > _GREATEST_GROUP or number >= _SELECTION:
        return Split.TRAIN
    return Split.TEST if number < _TEST else Split.SELECTION


# Near-duplicates


def repeated(documents: Sequence[Document]) -> set[str]:
    """Paths of documents that say what a larger one says: over half of their shingles stand in it."""
    shingles = [_shingles(document.text) for document in documents]
    size = [(len(found), documents[k].path) for k, found in enumerate(shingles)]
    gone: set[int] = set()
    for a, b in sorted(_pairs(shingles), key=lambda pair: (size[pair[0]], size[pair[1]])):
        small, large = sorted((a, b), key=lambda k: size[k])
        if small not in gone and large not in gone and _repeats(shingles[small], shingles[large]):
            gone.add(small)
    return {documents[k].path for k in gone}


def _repeats(small: NDArray[np.uint64], large: NDArray[np.uint64]) -> bool:
    shared = len(np.intersect1d(small, large, assume_unique=True))
    return bool(len(small)) and shared > _REPEATED * len(small)


@cache
def _shingles(text: str) -> NDArray[np.uint64]:
    """The distinct runs of eight tokens, as numbers; the same on every run of Python."""
    numbers = np.array([_word(word) for word in re.findall(r"\w+|[^\w\s]", text)], dtype=np.uint64)
    if len(numbers) < _SHINGLE:
        return np.empty(0, np.uint64)
    count = len(numbers) - _SHINGLE + 1
    mixed = np.zeros(count, np.uint64)
    for k in range(_SHINGLE):
        mixed = (mixed ^ numbers[k : k + count]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return np.unique(mixed)


@cache
def _word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def _pairs(shingles: Sequence[NDArray[np.uint64]]) -> set[tuple[int, int]]:
    """Pairs of documents that share a good part of their sketches."""
    sketches = [found[found % np.uint64(_SKETCH) == 0] for found in shingles]
    owners = np.repeat(np.arange(len(sketches)), [len(s) for s in sketches])
    hashes = np.concatenate(sketches)
    order = np.argsort(hashes, kind="stable")
    hashes, owners = hashes[order], owners[order]
    starts = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1], True])
    shared: dict[tuple[int, int], int] = {}
    for first, last in itertools.pairwise(starts.tolist()):
        if 1 < last - first <= _CROWD:
            crowd = owners[first:last].tolist()
            for k, a in enumerate(crowd):
                for b in crowd[k + 1 :]:
                    shared[a, b] = shared.get((a, b), 0) + 1
    least = _REPEATED / 2
    return {(a, b) for (a, b), n in shared.items() if n > least * min(len(sketches[a]), len(sketches[b]))}


# The committed splits


def training_documents() -> list[Document]:
    """The training documents of the running Python: without near-duplicates, without any held-out package, and without
    what says the same as a document that was held out, on whichever Python."""
    documents = library()
    gone = repeated(documents)
    held_out = [document for kind in (Split.SELECTION, Split.TEST) for document in committed(kind)]
    groups = {document.group for document in held_out}
    kept = [d for d in split([d for d in documents if d.path not in gone])[Split.TRAIN] if d.group not in groups]
    shingles = [_shingles(document.text) for document in [*kept, *held_out]]
    leaks = set()
    for a, b in _pairs(shingles):
        small, large = sorted((shingles[a], shingles[b]), key=len)
        if (a < len(kept)) != (b < len(kept)) and _repeats(small, large):
            leaks.add(min(a, b))
    return [document for k, document in enumerate(kept) if k not in leaks]


def committed(kind: Split) -> list[Document]:
    """The documents of a committed split (not `train`). Raises ModelError if the file is not what was committed."""
    path = FOLDER / f"{kind}.jsonl"
    if not path.is_file():
        raise ModelError(
            f"the {kind} split is not here", where=str(path), why="it comes with the repository, not with the package"
        )
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != recorded()["sha256"][str(kind)]:
        raise ModelError(f"{path} is not the file that was committed", hint="get it again from the repository")
    return [Document(**json.loads(line)) for line in data.decode("utf-8").splitlines()]


def recorded() -> dict[str, Any]:
    """What was written down when the splits were made: the Python, documents and packages of each, their hashes."""
    found: dict[str, Any] = json.loads((FOLDER / "splits.json").read_text(encoding="utf-8"))
    return found


def write_splits(folder: Path = FOLDER) -> None:
    """Make the committed splits from the running Python's library. Done once: they are final."""
    documents = library()
    gone = repeated(documents)
    found = split([d for d in documents if d.path not in gone])
    found[Split.CALIBRATION] = _calibration(found[Split.TRAIN])
    folder.mkdir(parents=True, exist_ok=True)
    sums = {}
    for kind in (Split.CALIBRATION, Split.SELECTION, Split.TEST):
        lines = [json.dumps(asdict(document), ensure_ascii=False) for document in found[kind]]
        data = "".join(f"{line}\n" for line in lines).encode()
        (folder / f"{kind}.jsonl").write_bytes(data)
        sums[str(kind)] = hashlib.sha256(data).hexdigest()
    summary = {
        "python": sysconfig.get_python_version(),
        "seed": _SEED,
        "repeated": len(gone),
        "documents": {str(kind): len(found[kind]) for kind in Split},
        "groups": {str(kind): len({d.group for d in found[kind]}) for kind in Split},
        "bytes": {str(kind): sum(len(d.text.encode()) for d in found[kind]) for kind in Split},
        "sha256": sums,
    }
    (folder / "splits.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def _calibration(train: Sequence[Document]) -> list[Document]:
    """Training documents of under 20 kB in the order of their hashes, as many as fit, sorted by path."""
    order = sorted(train, key=lambda d: hashlib.sha256(f"{_SEED}:{d.path}".encode()).hexdigest())
    chosen, size = [], 0
    for document in order:
        length = len(document.text.encode())
        if length < 20_000 and size + length <= _CALIBRATION:
            chosen.append(document)
            size += length
    return sorted(chosen, key=lambda d: d.path)
