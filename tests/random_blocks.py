"""Random models made of repeated blocks: Python source as people write it, with one difference planted in one block.

`random_blocks(seed)` draws the steps of a block, how blocks are wired, and what surrounds them, and writes the source
of a model. Blocks are called one line each, so that a line tells the block; `Planted` tells the line in the block's
source in which the odd block differs from the others, and in what.
"""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from helpers import bits, tensors_in
from random_block_steps import ENDS, SHAPES, STEPS

HEADER = "import torch\nfrom torch import nn\n"
#: How likely a difference is planted where it could be: more if few blocks have a place for it.
LIKELY = {"constant": 1, "requires_grad": 1, "stride": 1, "same weight": 8, "grad scope": 16}
_PLACE = re.compile(r"<<(.*?):(.*?)\|(.*?)>>")
_WEIGHT = re.compile(r"\{(\w+)\}")
_HEAD = 5  # lines of a block's class in front of its own


@dataclass(frozen=True)
class Planted:
    """A difference: what it is in (`kind`), the number of the odd block, and the line of its source that differs."""

    kind: str
    block: int
    line: int


@dataclass
class RandomBlocks:
    """A model's source and what stands in it. `weights` are names and shapes; `lines` are those in which blocks are
    called, in order; `odd_weight` is the weight that the planted difference is in, and the one before it."""

    seed: int
    training: bool
    dynamic: bool
    source: str
    weights: list[tuple[str, str]]
    planted: Planted
    lines: list[int]
    features: set[str] = field(default_factory=set)
    odd_weight: tuple[str, str] | None = None

    @property
    def file(self) -> str:
        return f"<random blocks {self.seed}>"

    def model(self, odd: bool) -> nn.Module:
        """The model, with the planted difference or without it."""
        scope: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "checkpoint": checkpoint}
        exec(compile(self.source, self.file, "exec"), scope)
        generator = torch.Generator().manual_seed(self.seed)
        made: nn.Module = scope["Model"](self._weights(generator, odd), odd)
        return made.train(self.training)

    def _weights(self, generator: torch.Generator, odd: bool) -> dict[str, torch.Tensor]:
        made: dict[str, torch.Tensor] = {}
        for name, shape in self.weights:
            made[name] = _weight(shape, generator)
            if odd and self.odd_weight is not None and name == self.odd_weight[0]:
                made |= _otherwise(name, made, self.planted.kind, self.odd_weight[1])
        return made

    def inputs(self, batch: int) -> list[torch.Tensor]:
        """x, y, a mask, positions, and a tensor whose slices are caches of the blocks."""
        generator = torch.Generator().manual_seed(self.seed + batch)

        def drawn(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        grad = self.training and self.seed % 2 == 0
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        return [
            drawn(batch, 4, 8).requires_grad_(grad),
            drawn(batch, 4, 8),
            mask,
            torch.tensor([1, 4]),
            drawn(12, 6, 8),
        ]


def _weight(shape: str, generator: torch.Generator) -> torch.Tensor:
    kind, size = SHAPES[shape]
    if kind == "count":
        return torch.ones((), dtype=torch.int64)
    value = torch.randn(*size, generator=generator) * 0.4
    if kind == "positive":
        value = value.abs() + 0.5
    return nn.Parameter(value) if kind == "parameter" else value


def _otherwise(name: str, made: dict[str, torch.Tensor], kind: str, other: str) -> dict[str, torch.Tensor]:
    """Weights of the odd block in which a difference of this kind is planted."""
    value = made[name]
    if kind == "stride":
        return {name: nn.Parameter(value.detach().t().contiguous().t())}
    if kind == "dtype":
        return {name: nn.Parameter(value.detach().double())}
    if kind == "requires_grad":
        return {name: nn.Parameter(value.detach(), requires_grad=False)}
    if kind == "same weight":
        return {name: made[other]}
    assert kind == "shared memory"
    both = torch.stack([made[other].detach(), value.detach()])
    return {other: both[0], name: both[1]}


class _Writer:
    """Writes one model."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.seed = seed
        self.training = self.dice.random() < 0.5
        self.features: set[str] = set()

    def some(self, share: float, feature: str) -> bool:
        if self.dice.random() >= share:
            return False
        self.features.add(feature)
        return True

    def block(self) -> list[str]:
        """The body of a block: lines with `{shape}` for weights of its own and `<<kind:this|that>>` for differences."""
        steps = [s for s in STEPS if self.training or not s.training]
        chosen = self.dice.sample(steps, self.dice.randint(2, 4))
        end = self.dice.choices(ENDS, [e.weight for e in ENDS])[0]
        if end.in_place:  # nothing may keep the carried value for its gradient
            begin = "h = x + {vector}" if self.dice.random() < 0.5 else "h = x * <<constant:0.5|0.25>>"
        else:
            begin = self.dice.choice(["h = F.linear(x, {matrix})", "h = F.layer_norm(x, (8,), {vector})"])
        lines = [begin]
        for step in chosen:
            if end.in_place and step.reads_x:
                continue
            lines += step.text.splitlines()
            self.features.add(step.feature)
        self.features.add(end.feature)
        return [*lines, *end.text.splitlines()]

    def scopes(self, count: int) -> dict[int, str]:
        """What a call of a block stands in, by block."""
        kinds = {
            "autocast around blocks": 'with torch.autocast("cpu", torch.bfloat16):',
            "no_grad around blocks": "with torch.no_grad():",
        }
        feature = self.dice.choice([*kinds, "", "", "", "", "", ""])
        if not feature or (feature.startswith("no_grad") and not self.training):
            return {}
        self.features.add(feature)
        start = self.dice.randint(0, count - 1)
        stop = self.dice.randint(start + 1, count)
        if stop - start < count:
            self.features.add("open scope")
        return dict.fromkeys(range(start, stop), kinds[feature])


def random_blocks(seed: int) -> RandomBlocks:
    """The model of a seed."""
    writer = _Writer(seed)
    dice = writer.dice
    period = 2 if writer.some(0.15, "period of two") else 1
    count = dice.choice([5, 5, 6]) if period == 1 else 2 * dice.randint(3, 4)
    odd = dice.randrange(count)
    once = period == 1 and writer.some(0.1, "one module many times")
    bodies = [writer.block() for _ in range(period)]
    kinds = list(_kinds(bodies[odd % period], writer.training, once))
    if not kinds:
        bodies[odd % period].insert(1, "h = h * <<constant:0.5|0.25>>")
        kinds = list(_kinds(bodies[odd % period], writer.training, once))
    choices = sorted({found[0] for found in kinds})
    kind = dice.choices(choices, [LIKELY.get(kind, 4) for kind in choices])[0]
    _, line, weight = dice.choice([found for found in kinds if found[0] == kind])

    source, at, names = HEADER, 0, []
    for number, body in enumerate(bodies):
        if number == odd % period:
            at = source.count("\n") + 1 + _HEAD + line
        said, own = _class(number, body, line if number == odd % period and weight < 0 else -1, kind)
        source += said
        names.append(own)
    before = source.count("\n")
    model, calls = _model(writer, count, period, odd, once)
    weights = [("first", "matrix"), ("head", "matrix"), ("shared", "matrix")]
    for k in range(1 if once else count):
        weights += [(f"b{k}_{name}", shape) for name, shape in names[k % period]]
    odd_weight = None
    if weight >= 0:
        odd_weight = (f"b{odd}_w{weight}", f"b{odd}_w{weight - 1}")
    return RandomBlocks(
        *(seed, writer.training, writer.some(0.2, "dynamic batch"), source + model, weights),
        planted=Planted(kind, odd, at),
        lines=[before + offset for offset in calls],
        features=writer.features,
        odd_weight=odd_weight,
    )


def _kinds(body: list[str], training: bool, once: bool) -> Iterator[tuple[str, int, int]]:
    """The differences that could be planted in a block: kind, line, and the number of the weight or -1."""
    number = 0
    shapes: list[str] = []
    for line, text in enumerate(body):
        yield from ((found[0], line, -1) for found in _PLACE.findall(text) if training or found[0] != "grad scope")
        for shape in _WEIGHT.findall(text):
            if not once:
                if shape == "matrix":
                    yield "stride", line, number
                if shape in ("matrix", "vector") and training:
                    yield "requires_grad", line, number
                if shape == "cast":
                    yield "dtype", line, number
                if shape == "twin" and shapes[-1:] == ["twin"]:
                    yield "same weight", line, number
                if shape == "table" and shapes[-1:] == ["table"]:
                    yield "shared memory", line, number
            shapes.append(shape)
            number += 1


def _class(number: int, body: list[str], planted: int, kind: str) -> tuple[str, list[tuple[str, str]]]:
    """The source of a block's class, and its weights as (name, shape)."""
    own: list[tuple[str, str]] = []

    def weight(found: re.Match[str]) -> str:
        own.append((f"w{len(own)}", found[1]))
        return f"self.w{len(own) - 1}"

    lines = []
    for position, text in enumerate(body):
        done = False

        def place(found: re.Match[str], position: int = position) -> str:
            nonlocal done
            if position != planted or found[1] != kind or done:
                return found[2]
            done = True
            return f"({found[3]} if odd else {found[2]})"

        lines.append(_WEIGHT.sub(weight, _PLACE.sub(place, text)))
    head = [
        f"class Block{number}(nn.Module):",
        "    def __init__(self, weights):",
        "        super().__init__()",
        "        for name, w in weights.items(): (self.register_parameter if isinstance(w, nn.Parameter) else "
        "self.register_buffer)(name, w)",
        "    def forward(self, x, y, mask, pos, shared, skip, part, made, odd):",
    ]
    said = [*head, *(f"        {line}" for line in lines), "        return x, y"]
    return "\n".join(said) + "\n", own


def _model(writer: _Writer, count: int, period: int, odd: int, once: bool) -> tuple[str, list[int]]:
    """The source of the model, and the lines in it in which blocks are called."""
    lines = [
        "class Model(nn.Module):",
        "    def __init__(self, weights, odd):",
        "        super().__init__()",
        "        self.first, self.head, self.shared = weights['first'], weights['head'], weights['shared']",
        f"        self.odd = {odd} if odd else -1",
    ]
    for k in range(1 if once else count):
        chosen = f"{{n.split('_')[1]: w for n, w in weights.items() if n.startswith('b{k}_')}}"
        lines.append(f"        self.b{k} = Block{k % period}({chosen})")
    lines.append("    def forward(self, x, y, mask, pos, big):")
    lines.append("        x = F.linear(x, self.first)")
    lines.append("        parts, hs, made = big.unbind(0), [x], []")
    distance = writer.dice.randint(1, 3)
    swapped = writer.dice.randrange(count) if writer.some(0.12, "swapped slots") else -1
    scopes, calls = writer.scopes(count), []
    for k in range(count):
        inside = k in scopes
        if inside and scopes.get(k - 1) is None:
            lines.append(f"        {scopes[k]}")
        carried = "y, x" if k == swapped else "x, y"
        module = f"self.b{0 if once else k}"
        margin = " " * (12 if inside else 8)
        calls.append(len(lines) + 1)
        lines.append(
            f"{margin}x, y = {module}({carried}, mask, pos, self.shared, hs[max(0, len(hs) - {distance})], "
            f"parts[{k}], made, self.odd == {k})"
        )
        lines.append(f"{margin}hs.append(x)")
    head = "self.first" if writer.some(0.2, "tied weights") else "self.head"
    extra = writer.dice.choice(["", ", hs", ", x.transpose(0, 1)", ", x.view(-1), hs[1]", ", parts[1]"])
    if extra:
        writer.features.add("more is returned")
    lines.append(f"        return F.linear(x.float(), {head}), y{extra}")
    return "\n".join(lines) + "\n", calls


def observed(program: RandomBlocks, odd: bool, compiled: Callable[[nn.Module], Callable[..., Any]]) -> Any:
    """All that a caller sees of a model, in bits: results, gradients, buffers, inputs, how far the RNG went.

    Autocast does not keep the weights that it has cast, as where AOTAutograd compiles: gradients of a weight that is
    used twice would be added up in another type.
    """
    model = program.model(odd)
    run = compiled(model)
    seen = []
    for batch in (3, 5) if program.dynamic else (3,):
        inputs = [copy.deepcopy(value) for value in program.inputs(batch)]
        torch.manual_seed(program.seed)
        with torch.set_grad_enabled(program.training), _autocast_cache_disabled():
            results = run(*inputs)
        drawn = torch.get_rng_state()
        wanted = [r for r in tensors_in(results) if r.requires_grad]
        if wanted:
            torch.stack([r.double().square().sum() for r in wanted]).sum().backward()
        leaves = [*model.named_parameters(), *((str(k), value) for k, value in enumerate(inputs) if value.is_leaf)]
        grads = {name: leaf.grad for name, leaf in leaves}
        flags = [r.requires_grad for r in tensors_in(results)]
        seen.append(exact((results, flags, grads, dict(model.named_buffers()), inputs, drawn)))
    return seen


@contextmanager
def _autocast_cache_disabled() -> Iterator[None]:
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def exact(value: Any) -> Any:
    """Bits of a nest, bfloat16 included, which numpy does not know."""
    if isinstance(value, torch.Tensor):
        return bits(value.detach().view(torch.int16) if value.dtype == torch.bfloat16 else value)
    if isinstance(value, dict):
        return {key: exact(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [exact(child) for child in value]
    return bits(value)
