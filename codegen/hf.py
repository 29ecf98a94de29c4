"""Writing a Program as a Hugging Face folder, which `from_pretrained` loads, where a configuration can say what it is.

A configuration says how many blocks there are and which weights are tied, and little else. So blocks that are gone
altogether are counted out of it, those behind them are renumbered, and weights get the values that the Program has;
where all blocks are rounds over the same weights, their number is what the Program has.
What it cannot say is refused by name: single branches that are gone, blocks that share, corrections beside a product.
What was written is loaded again and must compute what the Program does.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from laconic.ir.depth import Depth
from laconic.ir.errors import UnsupportedError
from laconic.ir.files import place_directory, refuse_existing, temporary_beside
from laconic.ir.hf import load_model, on_meta, read_architecture
from laconic.ir.hf_config import FACT
from laconic.ir.inputs import cases
from laconic.ir.metrics.differences import bit_equal, max_abs
from laconic.ir.outcomes import Outcomes
from laconic.ir.program import Program
from laconic.ir.tensor_file import write_tensors
from laconic.ir.tree import Leaf, fill, leaves
from laconic.ir.types import nbytes
from laconic.ir.weight_files import INDEX, WHOLE, listed

log = logging.getLogger(__name__)

_CONFIG = "config.json"
#: What a count of blocks is called.
_COUNT = re.compile(r"layer|block|depth")
#: What a list is called that says something of each block.
_OF_BLOCKS = re.compile(r"layer|block|depth|types")
#: No model has so many.
_MOST = 10_000
#: Files of a model beside its weights and configuration: tokenizer, generation, preprocessing.
_BESIDE = (".json", ".txt", ".model", ".jinja")
#: The share of a folder's bytes that may be copies of what the Program holds once.
_COPIES = 0.01
#: How far from the Program the folder's results may be: so many units of the dtype's precision, at their greatest.
_ROUNDING = 64

Values = Mapping[str, torch.Tensor | None]


def write_hf(
    program: Program,
    path: str | os.PathLike[str],
    *,
    beside: Path | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> Path:
    """Write `config.json` and `model.safetensors` of a model of transformers, with the tokenizer and the like that
    stand in the folder `beside`, and return the folder.

    Raises UnsupportedError for a Program of another model, and for what its configuration cannot say; UsageError if
    `path` exists and `force` is not given.
    """
    final = Path(path)
    refuse_existing(final, force)
    if FACT not in program.facts:
        raise UnsupportedError(
            "no Hugging Face folder can be written: this is no model of transformers",
            hint="capture the model of transformers itself, or its folder, and not a module around it",
        )
    with temporary_beside(final) as temporary:
        temporary.mkdir()
        progress("writing the Hugging Face folder")
        (temporary / _CONFIG).write_text(json.dumps(program.facts[FACT]), encoding="utf-8")
        class_, config = read_architecture(temporary)
        original = on_meta(class_, config)
        values = _values(original, program)
        gone = _gone(original, values)
        kept = {_renumbered(name, gone): v for name, v in values.items() if not any(g.drops(name) for g in gone)}
        config = _shorter(class_, config, gone, kept.keys()) if gone else config
        tensors = _stored(on_meta(class_, config), kept)
        write_tensors(temporary / WHOLE, tensors, {"format": "pt"})
        if beside is not None:
            _copy_beside(beside, temporary)
        progress("loading it again")
        more = [] if gone else _rounds(class_, config, program)
        _settle(program, class_, itertools.chain([config], more), temporary)
        place_directory(temporary, final, force)
    return final


@dataclass(frozen=True)
class _Gone:
    """Blocks that are gone: the name of their list, how many it had, and the numbers of those that are left."""

    path: str
    count: int
    left: tuple[int, ...]

    def number(self, name: str) -> int | None:
        """The block that a weight belongs to; None if it is not of this list."""
        if not name.startswith(f"{self.path}."):
            return None
        return int(name[len(self.path) + 1 :].partition(".")[0])

    def drops(self, name: str) -> bool:
        number = self.number(name)
        return number is not None and number not in self.left


def _values(model: nn.Module, program: Program) -> Values:
    """What became of each weight of the model as it was; None for what is nowhere any more."""
    known = program.weights.keys() | program.aliases.keys()
    return {name: program.value_of(name) if name in known else None for name in model.state_dict()}


def _gone(model: nn.Module, values: Values) -> list[_Gone]:
    """The lists of blocks of which some have no weight left."""
    found: list[_Gone] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer.path}.") for outer in found):
            continue
        blocks = [[v for name, v in values.items() if name.startswith(f"{path}.{k}.")] for k in range(len(module))]
        left = tuple(k for k, own in enumerate(blocks) if not own or any(value is not None for value in own))
        if len(left) < len(module):
            found.append(_Gone(path, len(module), left))
    return found


def _renumbered(name: str, gone: Sequence[_Gone]) -> str:
    for each in gone:
        number = each.number(name)
        if number is not None:
            rest = name[len(f"{each.path}.{number}") :]
            return f"{each.path}.{each.left.index(number)}{rest}"
    return name


def _shorter(class_: Any, config: Any, gone: Sequence[_Gone], names: Set[str]) -> Any:
    """The configuration of a model of these weights: a count changed for each list, and lists beside it that say
    something of each block. Raises UnsupportedError if there is none."""
    said = config.to_dict()
    for places in itertools.product(*(list(_counts(said, {each.count})) for each in gone)):
        changed = json.loads(json.dumps(said))
        for each, (holder, key) in zip(gone, places, strict=True):
            inside = _inside(changed, holder)
            for other, value in inside.items():
                if isinstance(value, list) and len(value) == each.count and _OF_BLOCKS.search(other):
                    inside[other] = [value[k] for k in each.left]
            inside[key] = len(each.left)
        found = _made(class_, config, changed, names)
        if found is not None:
            return found
    blocks = "; ".join(
        f"{each.path} without {', '.join(str(k) for k in range(each.count) if k not in each.left)}" for each in gone
    )
    raise UnsupportedError(f"no {type(config).__name__} says which blocks are gone", why=blocks, hint=_ELSEWHERE)


def _rounds(class_: Any, config: Any, program: Program) -> Iterator[Any]:
    """Configurations of fewer rounds over the same weights: as many as the Program has blocks in a run, or of several
    blocks each; or one, which is no run."""
    said, names = config.to_dict(), on_meta(class_, config).state_dict().keys()
    counts = Counter(block.run for block in Depth(program).blocks).values()
    rounds = {count // each for count in counts for each in range(1, count + 1) if count % each == 0}
    for left in sorted(rounds | {1}, reverse=True):
        for holder, key in _counts(said, range(left + 1, _MOST)):
            changed = json.loads(json.dumps(said))
            _inside(changed, holder)[key] = left
            found = _made(class_, config, changed, names)
            if found is not None:
                yield found


def _counts(
    said: Mapping[str, Any], counts: Container[int], holder: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    """The places of a configuration that count so many blocks."""
    for key, value in said.items():
        if isinstance(value, dict):
            yield from _counts(value, counts, (*holder, key))
        elif isinstance(value, int) and value in counts and _COUNT.search(key):
            yield holder, key


def _inside(said: dict[str, Any], holder: Sequence[str]) -> dict[str, Any]:
    for step in holder:
        said = said[step]
    return said


def _made(class_: Any, config: Any, said: dict[str, Any], names: Set[str]) -> Any:
    """The configuration that says so, if its model has weights of these names, or None."""
    try:
        found = type(config).from_dict(said)
        return found if on_meta(class_, found).state_dict().keys() == names else None
    except Exception as problem:  # noqa: BLE001 - a count of something else makes a configuration that is none
        log.info("no configuration: %s", problem)
        return None


def _settle(program: Program, class_: Any, configs: Iterable[Any], folder: Path) -> None:
    """Write the first of these configurations with which the folder computes what the Program does. Raises
    UnsupportedError, of the first, if there is none."""
    problems: list[UnsupportedError] = []
    for config in configs:
        config.architectures = [class_.__name__]
        config.save_pretrained(folder)
        try:
            return _compare(program, load_model(folder))
        except UnsupportedError as problem:
            problems.append(problem)
    raise problems[0]


_ELSEWHERE = "a DIR, --format onnx and --format pt2 hold it as it is"


def _stored(model: nn.Module, values: Values) -> dict[str, torch.Tensor]:
    """What the folder holds: each tensor of the model once. Raises UnsupportedError for what the Program does not have,
    or has once where the folder would have it several times."""
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first.setdefault(id(tensor), name)
    lost = [name for name in first.values() if values[name] is None]
    if lost:
        raise UnsupportedError(
            f"{type(model).__name__} needs weights that the program does not have any more",
            why=listed(lost),
            hint=f"they were left out, folded into others, or never used; {_ELSEWHERE}",
        )
    found = {name: value for name in first.values() if (value := values[name]) is not None}
    homes: dict[tuple[Any, ...], str] = {}
    copies: list[tuple[str, str]] = []
    for name, value in found.items():
        home = value.data_ptr(), value.shape, value.stride(), value.dtype
        if homes.setdefault(home, name) != name and value.numel():
            copies.append((name, homes[home]))
    extra = sum(nbytes(found[name]) for name, _ in copies)
    if extra > _COPIES * sum(map(nbytes, found.values())):
        raise UnsupportedError(
            f"a configuration of {type(model).__name__} cannot say that these share their values",
            why=listed([f"{name} and {other}" for name, other in copies]),
            hint=f"the folder would hold {extra:,} bytes of copies; {_ELSEWHERE}",
        )
    return found


def _copy_beside(source: Path, folder: Path) -> None:
    """What else a model's folder holds, without its weights and configuration."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in _BESIDE and file.name not in (_CONFIG, INDEX):
            shutil.copyfile(file, folder / file.name)


def _compare(program: Program, model: nn.Module) -> None:
    """Hold what was loaded to what the Program computes, on its examples and at other sizes. Raises UnsupportedError
    naming the result."""
    entry = program.forward
    for case, outcome in Outcomes.of(program, cases(program, entry)):
        try:
            with torch.no_grad():
                flat = pytree.tree_leaves(model(**fill(entry.arguments, case.clone())))
        except Exception as problem:
            raise _different(model, f"it fails on {case}: {problem}") from problem
        found = [value for value, (_, leaf) in zip(flat, leaves(entry.results), strict=True) if isinstance(leaf, Leaf)]
        for number, (ours, theirs) in enumerate(zip(outcome.results, found, strict=True)):
            if not bit_equal(ours, theirs) and not _near(ours, theirs):
                raise _different(model, f"result {number} on {case}")


def _near(ours: Any, theirs: Any) -> bool:
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor) or ours.shape != theirs.shape:
        return False
    if not ours.is_floating_point() or not ours.numel():
        return False
    return max_abs(ours, theirs) <= _ROUNDING * torch.finfo(ours.dtype).eps * float(ours.abs().max())


def _different(model: nn.Module, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(model).__name__} does not compute what the program does with these weights",
        why=why,
        hint=f"a pass changed what is computed, which no configuration says; {_ELSEWHERE}",
    )
