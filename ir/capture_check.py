"""A captured Program against the module it was captured from: the same bits, on the examples and at other sizes.

The module is called exactly as the user called it, each time from the same state of its Python attributes and buffers.
"""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict, defaultdict, deque
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from laconic.ir.errors import VerificationError
from laconic.ir.inputs import Case, cases, draw
from laconic.ir.metrics.differences import bit_equal, max_abs
from laconic.ir.program import Program, Role
from laconic.ir.run import evaluate
from laconic.ir.tree import Leaf, leaves

log = logging.getLogger(__name__)

_SEED = 0
_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


@dataclass(frozen=True)
class Call:
    """How the user called the module: the tree of (args, kwargs), with a Leaf for each tensor among its leaves."""

    spec: pytree.TreeSpec
    flat: list[Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        given, spec = pytree.tree_flatten((tuple(args), kwargs))
        flat: list[Any] = []
        for value in given:
            flat.append(Leaf(_tensors(flat)) if isinstance(value, torch.Tensor) else value)
        return cls(spec, flat)

    def __call__(self, module: nn.Module, inputs: list[torch.Tensor]) -> Any:
        values = [inputs[v.index] if isinstance(v, Leaf) else v for v in self.flat]
        args, kwargs = pytree.tree_unflatten(values, self.spec)
        return module(*args, **kwargs)


def _tensors(flat: list[Any]) -> int:
    return sum(isinstance(value, Leaf) for value in flat)


class ModuleState:
    """A module's Python attributes, its tables of parameters, buffers and submodules, and the values of its buffers and
    of tensors that are plain attributes: what `restore` puts back, however often a forward has written to them."""

    def __init__(self, module: nn.Module) -> None:
        self._attributes = [(m, dict(vars(m))) for m in module.modules()]
        self._containers: dict[int, tuple[Any, Any]] = {}
        self._tensors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for buffer in module.buffers():
            self._keep(buffer)
        for _, attributes in self._attributes:
            for value in attributes.values():
                self._keep(value)

    def _keep(self, value: Any) -> None:
        """Remember the values of a tensor, or what a container holds."""
        if isinstance(value, torch.Tensor):
            if not isinstance(value, nn.Parameter) and value.layout is torch.strided and id(value) not in self._tensors:
                self._tensors[id(value)] = (value, value.detach().clone())
        elif type(value) in _CONTAINERS:
            if id(value) in self._containers:
                return
            content = dict(value) if isinstance(value, dict) else type(value)(value)
            self._containers[id(value)] = (value, content)
            for child in content.values() if isinstance(content, dict) else content:
                self._keep(child)
        elif isinstance(value, tuple):
            for child in value:
                self._keep(child)
        elif _is_users_object(value) and id(value) not in self._containers:
            self._containers[id(value)] = (vars(value), dict(vars(value)))
            for child in list(vars(value).values()):
                self._keep(child)

    def restore(self) -> None:
        for module, attributes in self._attributes:
            if not _same_objects(vars(module), attributes):
                vars(module).clear()
                vars(module).update(attributes)
        for container, content in self._containers.values():
            if not _same_objects(container, content):
                container.clear()
                container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
        for tensor, value in self._tensors.values():
            if not bit_equal(tensor, value):
                with torch.no_grad():
                    tensor.copy_(value)


def _is_users_object(value: Any) -> bool:
    """Whether a value is an object with attributes of its own that is neither a library's nor code."""
    kind = type(value)
    library = kind.__module__.partition(".")[0]
    return (
        hasattr(value, "__dict__")
        and kind is not type
        and (library not in sys.stdlib_module_names | {"torch"} or kind.__name__ == "SimpleNamespace")
    )


def _same_objects(now: Any, before: Any) -> bool:
    """Whether two containers hold the same objects, in the same order."""
    if isinstance(now, dict):
        return list(now) == list(before) and all(now[key] is before[key] for key in now)
    return len(now) == len(before) and all(a is b for a, b in zip(now, before, strict=True))


def compare_with_module(program: Program, module: nn.Module, call: Call, state: ModuleState) -> None:
    """Hold the Program to the module's bits, and note in its facts on how many cases it was. Every call starts from
    `state`.

    Tracing assumes sizes of 2 and more. A dynamic size that is not right at 1 (the module fails there, or the Program
    says something else) gets 2 as its least. Raises VerificationError for a difference at any other size.
    """
    reference = _Reference(program, module, call, state)
    if any(o.role is not Role.RESULT for o in program.forward.outputs):
        _note_seen(program, reference)
    for key, symbol in program.symbols.items():
        if symbol.low == 1 and symbol.hint > 1 and not _right_at_one(program, reference, symbol.name):
            log.warning("the size %r starts at 2: the model is not what was traced, or fails, at 1", symbol.name)
            program.symbols[key] = replace(symbol, low=2)
    skipped = []
    agreed = 0
    for case in cases(program, program.forward):
        try:
            expected = reference.run(case)
        except Exception as problem:
            if case.given:
                raise
            log.warning("the module itself does not run on %s: %s", case, problem)
            skipped.append(str(case))
            continue
        name, gap = _difference(program, expected, case)
        if name:
            hint = "what it computes must not depend on Python state that its calls change"
            if program.symbols:
                hint = "an axis may be fixed inside the model: capture it without that dynamic axis"
            raise VerificationError(
                f"the captured program does not compute what {type(module).__name__} does",
                where=f"{name} on {case}",
                why=gap,
                hint=hint,
            )
        agreed += 1
    program.facts["capture"] = {"bit_identical_cases": agreed, **({"skipped": skipped} if skipped else {})}


def _note_seen(program: Program, reference: _Reference) -> None:
    """Note which results are a written tensor itself. A functional graph cannot tell `return self.buffer` from the
    return of an equal value; what the module returns on its example does."""
    entry = program.forward
    for case in (c for c in cases(program, entry, 0) if c.given):
        seen, parts = reference.written(case)
        entry.outputs = [replace(o, seen=tuple(seen.get(str(o), ()))) for o in entry.outputs]
        if parts:
            program.facts["copies"] = parts
            log.warning("a tensor of its own here, unlike in the module: %s", "; ".join(parts))


def _right_at_one(program: Program, reference: _Reference, size: str) -> bool:
    case = draw(program, program.forward, {size: 1}, _SEED)
    try:
        return not _difference(program, reference.run(case), case)[0]
    except Exception as problem:  # noqa: BLE001 - a model may fail in any way at a size it was not made for
        log.info("at %s = 1: %s", size, problem)
        return False


def _difference(program: Program, expected: dict[str, Any], case: Case) -> tuple[str, str]:
    """The first value that is not the module's, and by how much; ("", "") if there is none."""
    torch.default_generator.manual_seed(_SEED)
    found = evaluate(program, program.forward, case.clone()).tensors()
    for name, value in expected.items():
        if name not in found:
            return name, "it is missing"
        if not bit_equal(value, found[name]):
            alike = isinstance(value, torch.Tensor) and isinstance(found[name], torch.Tensor)
            if alike and value.shape == found[name].shape:
                return name, f"greatest difference {max_abs(value, found[name])}"
            return name, "another type or shape"
    return "", ""


@dataclass(frozen=True)
class _Reference:
    """The module itself, called as the user called it."""

    program: Program
    module: nn.Module
    call: Call
    state: ModuleState

    def _returned(self, inputs: list[torch.Tensor]) -> list[Any]:
        """The results of a call, flat and without constants. Whoever calls this restores the module's state."""
        torch.default_generator.manual_seed(_SEED)
        flat = pytree.tree_leaves(self.call(self.module, inputs))
        results = self.program.forward.results
        return [f for f, (_, leaf) in zip(flat, leaves(results), strict=True) if isinstance(leaf, Leaf)]

    def written(self, case: Case) -> tuple[dict[str, list[str]], list[str]]:
        """The results that are a written tensor itself, by update; and in words those that share memory with one."""
        entry = self.program.forward
        inputs = case.clone()
        homes = {i.name: t for i, t in zip(entry.inputs, inputs, strict=True)}
        names = [o.name for o in entry.outputs if o.role is Role.RESULT]
        seen: dict[str, list[str]] = {}
        parts: list[str] = []
        try:
            results = self._returned(inputs)
            buffers = dict(self.module.named_buffers(remove_duplicate=False))  # after the call, which may rebind them
            for name, result in zip(names, results, strict=True):
                for output in (o for o in entry.outputs if o.role is not Role.RESULT):
                    home = buffers[output.name] if output.role is Role.UPDATE else homes[output.name]
                    if not isinstance(result, torch.Tensor) or not result.numel() or not _same_memory(result, home):
                        continue
                    if (result.data_ptr(), result.shape, result.stride()) == (
                        home.data_ptr(),
                        home.shape,
                        home.stride(),
                    ):
                        seen.setdefault(str(output), []).append(name)
                    else:
                        parts.append(f"result {name!r}, a part of what the {output} writes")
        finally:
            self.state.restore()
        return seen, parts

    def run(self, case: Case) -> dict[str, Any]:
        """The module's results, states and inputs after a run, by the names that Outcome gives them."""
        entry = self.program.forward
        inputs = case.clone()
        try:
            indexed = self._returned(inputs)
            buffers = dict(self.module.named_buffers(remove_duplicate=False))  # after the call, which may rebind them
            found = {f"result {i}": r.clone() if isinstance(r, torch.Tensor) else r for i, r in enumerate(indexed)}
            found.update({f"state {name}": buffers[name].clone() for name in entry.updated()})
            by_name = {i.name: t for i, t in zip(entry.inputs, inputs, strict=True)}
            found.update({f"input {o.name}": by_name[o.name] for o in entry.outputs if o.role is Role.INPUT_UPDATE})
            return found
        finally:
            self.state.restore()


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
