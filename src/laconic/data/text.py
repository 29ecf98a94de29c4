"""Texts as batches of token ids: documents are cut into windows, and each token of a document is predicted once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laconic.ir.data import Batch, Data
from laconic.ir.errors import MissingDependencyError, UsageError
from laconic.ir.metrics.quality import IGNORED
from laconic.ir.program import Entry, Program
from laconic.ir.types import TensorType, type_of

_WINDOW = 512  # tokens, where the model names no limit
_ZEROS = ("token_type_ids",)
#: Share of a model's vocabulary that its tokenizer has at least; the rest are rows to spare.
_LEAST_KNOWN = 0.8


@dataclass(frozen=True)
class Text:
    """A document; `unit` is what intervals are drawn over (its package, say; else itself)."""

    text: str
    unit: str


@dataclass(frozen=True)
class Window:
    """Part of a document: ids, and the id that follows each (IGNORED behind the last of the document)."""

    ids: tuple[int, ...]
    following: tuple[int, ...]
    unit: str


class TextData(Data):
    """Documents as a decoder or encoder reads them.

    Windows of one document follow each other without overlap; the last one is shorter. A batch is padded at the right
    to its longest window, or to the model's size where that is fixed; padding does not count. Raises UsageError for
    texts without a token, token ids that the model does not know, and models that take other inputs than text.
    """

    def __init__(self, name: str, texts: Sequence[Text], tokenizer: Path, program: Program, *, batch: int = 8) -> None:
        self.name = name
        self._program, self._entry = program, program.forward
        self._shape = _shape(name, program, self._entry)
        fixed_batch, length = self._shape
        self._batch = fixed_batch or batch
        limit = length or _longest(program, self._entry) or _WINDOW
        encode, self._pad, size = _encoder(tokenizer)
        self._windows = [w for text in texts for w in windows(encode(text.text), limit, text.unit)]
        if not self._windows:
            raise UsageError(f"{name} holds no tokens", hint="give at least one document of two tokens")
        self._refuse_unknown(tokenizer, size)
        # Those of one length together: less padding. The order among them is that of the documents.
        self._windows.sort(key=lambda window: -len(window.ids))
        said = hashlib.sha256(repr((tokenizer.read_bytes(), limit, self._batch, texts)).encode())
        self.digest = said.hexdigest()
        self.samples = frozenset(hashlib.sha256(text.text.strip().encode()).hexdigest() for text in texts)

    def _refuse_unknown(self, tokenizer: Path, size: int) -> None:
        """Raise UsageError for a tokenizer of other tokens than the model's: a table may have some rows to spare."""
        greatest = max(self._pad, *(max(window.ids) for window in self._windows))
        known = _vocabulary(self._program, self._entry)
        if known is not None and (greatest >= known or size < _LEAST_KNOWN * known):
            says = f"it says {greatest}" if greatest >= known else f"it has {size} tokens"
            raise UsageError(
                f"the tokenizer is not this model's: {says}, and the model knows {known}",
                where=str(tokenizer),
                hint="name the model's own with --tokenizer",
            )

    def __len__(self) -> int:
        return -(-len(self._windows) // self._batch)

    def batch(self, k: int) -> Batch:
        chosen = self._windows[k * self._batch : (k + 1) * self._batch]
        fixed_batch, length = self._shape
        rows = fixed_batch or len(chosen)
        longest = length or max(len(window.ids) for window in chosen)
        ids = torch.full((rows, longest), self._pad)
        labels = torch.full((rows, longest), IGNORED)
        mask = torch.zeros((rows, longest), dtype=torch.bool)
        for row, window in enumerate(chosen):
            size = len(window.ids)
            ids[row, :size] = torch.tensor(window.ids)
            labels[row, :size] = torch.tensor(window.following)
            mask[row, :size] = True
        units = tuple(window.unit for window in chosen) + ("",) * (rows - len(chosen))
        return Batch(self._inputs(ids, mask), mask, labels, units)

    def _inputs(self, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        inputs = {}
        for declared, node in zip(self._entry.inputs, self._entry.input_nodes(), strict=True):
            dtype = node.meta["val"].dtype
            if declared.name == "input_ids":
                inputs[declared.name] = ids.to(dtype)
            elif declared.name == "attention_mask":
                kept = mask.clone()
                kept[~mask.any(1), 0] = True  # a row of nothing but padding still attends to something
                inputs[declared.name] = kept.to(dtype)
            else:
                inputs[declared.name] = torch.zeros_like(ids, dtype=dtype)
        return inputs


def windows(ids: Sequence[int], limit: int, unit: str) -> list[Window]:
    """A document cut into windows of at most `limit` tokens; [] for one of less than two tokens."""
    if len(ids) < 2:
        return []
    following = [*ids[1:], IGNORED]
    starts = range(0, len(ids), limit)
    return [Window(tuple(ids[s : s + limit]), tuple(following[s : s + limit]), unit) for s in starts]


def read_texts(path: Path) -> list[Text]:
    """The documents of a .txt (one, or several between lines of `---`) or a .jsonl (an object a line with `text`; its
    `group` or `path`, if it has one, is the unit). Raises UsageError with the line that does not say so."""
    try:
        said = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as problem:
        raise UsageError(f"{path} is no UTF-8", why=str(problem), hint="save it as UTF-8") from problem
    if path.suffix == ".txt":
        parts = "\n".join("\0" if line == "---" else line for line in said.split("\n")).split("\0")
        return [Text(part, str(k)) for k, part in enumerate(parts) if part.strip()]
    found = []
    for number, line in enumerate(said.split("\n"), start=1):  # JSON strings may hold what splitlines takes for an end
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            text = row["text"]
            str(text).encode()
        except (json.JSONDecodeError, KeyError, TypeError, UnicodeEncodeError) as problem:
            raise UsageError(
                'a line must be an object with a "text"', where=f"{path}:{number}", why=str(problem) or line[:60]
            ) from problem
        if not isinstance(text, str):
            raise UsageError('"text" must be a string', where=f"{path}:{number}")
        found.append(Text(text, str(row.get("group", row.get("path", number)))))
    return found


def _shape(name: str, program: Program, entry: Entry) -> tuple[int | None, int | None]:
    """The fixed batch and length of `input_ids`; None where they are free."""
    kinds = {i.name: type_of(n.meta["val"]) for i, n in zip(entry.inputs, entry.input_nodes(), strict=True)}
    ids = kinds.get("input_ids")
    unknown = [key for key in kinds if key not in ("input_ids", "attention_mask", *_ZEROS)]
    if not isinstance(ids, TensorType) or len(ids.shape) != 2 or unknown:
        raise UsageError(
            f"{name} is text, and the model takes {', '.join(kinds)}",
            hint="give named inputs: a .safetensors or .npz file, or module:callable",
        )
    rows, length = (size if isinstance(size, int) else None for size in ids.shape)
    return rows, length


def _longest(program: Program, entry: Entry) -> int | None:
    """The longest sequence that the model was captured for."""
    for declared, node in zip(entry.inputs, entry.input_nodes(), strict=True):
        if declared.name == "input_ids":
            size = type_of(node.meta["val"]).shape[1]  # type: ignore[union-attr]
            return None if isinstance(size, int) else program.symbols[str(size)].high
    return None


def _vocabulary(program: Program, entry: Entry) -> int | None:
    """The rows of the table that `input_ids` are looked up in."""
    for declared, node in zip(entry.inputs, entry.input_nodes(), strict=True):
        for user in node.users if declared.name == "input_ids" else ():
            if str(user.target).startswith("aten.embedding"):
                table: Any = user.args[0]
                return int(table.meta["val"].shape[0])
    return None


def _encoder(path: Path) -> tuple[Any, int, int]:
    """A function from text to ids, the id of padding (0 where the tokenizer names none), and how many tokens it has."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as problem:
        raise MissingDependencyError(
            "tokenizers is not installed", hint='pip install "laconic-compiler[hf]"'
        ) from problem
    if not path.is_file():
        raise UsageError(
            f"there is no tokenizer {path}", hint="name a tokenizer.json, or a folder that has one, with --tokenizer"
        )
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = path.with_name("tokenizer_config.json")
    pad = json.loads(settings.read_text(encoding="utf-8")).get("pad_token") if settings.is_file() else None
    pad = pad.get("content") if isinstance(pad, dict) else pad
    padding = (tokenizer.token_to_id(pad) or 0) if pad else 0
    return (lambda text: tokenizer.encode(text).ids), padding, tokenizer.get_vocab_size()
