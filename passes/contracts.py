"""Contracts, checked: a program after a pass against the one before it, on several inputs and sizes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from laconic.ir.errors import VerificationError
from laconic.ir.inputs import Case, cases_again
from laconic.ir.metrics.differences import bit_equal, max_abs
from laconic.ir.moves import Moves, moved, moved_alias
from laconic.ir.outcomes import Outcomes, with_states
from laconic.ir.precise import Deviation, deviation, evaluate_precise, pooled
from laconic.ir.program import Alias, Program
from laconic.passes.base import Contract


def check(
    contract: Contract,
    program: Program,
    before: Outcomes,
    after: Outcomes,
    rewritten: Program | None = None,
    moves: Moves | None = None,
) -> None:
    """Hold `after` to the contract, given what `program`, from before the pass, returned; `moves` say where positions
    of states went.

    Where a tolerance is exceeded, and `rewritten`, the program after the pass, is given, both are judged once more, and
    for good, on the inputs of `cases_again`. Raises VerificationError naming output and case. LOSSY promises nothing
    here.
    """
    if contract is Contract.LOSSY:
        return
    moves = moves or {}
    before = before.moved(moves)
    for (case, old), (_, new) in zip(before, after, strict=True):
        expected, found = old.tensors(), new.tensors()
        if list(expected) != list(found):
            raise VerificationError("the outputs are not the same ones", where=str(case))
        if contract is Contract.EXACT:
            _exact(case, expected, found)
    if contract is Contract.TOLERANCE:
        _tolerance(program, before, after, rewritten, moves)
    for case, shared, shares in zip(before.cases, before.sharing, after.sharing, strict=True):
        for a, b in sorted(shared ^ shares):
            became = "now shares" if (a, b) in shares else "no longer shares"
            raise VerificationError(f"{b} {became} memory with {a}", where=str(case))
    for case, was, now in zip(before.cases, before.generators, after.generators, strict=True):
        if contract is Contract.EXACT and not torch.equal(was, now):
            raise VerificationError(
                "the contract 'exact' is broken: another number of random draws",
                where=str(case),
                why="whoever draws afterwards gets other numbers",
            )


def check_weights(contract: Contract, before: Program, after: Program, moves: Moves | None = None) -> None:
    """Hold a pass that is not lossy to the bytes of every named weight, used or not: a row keeps them, where `moves`
    say that its positions went, an alias leads to them, or to nowhere if the row is gone.

    Raises VerificationError naming the weight.
    """
    if contract is Contract.LOSSY:
        return
    for name in [*before.weights, *before.aliases]:
        old, new = _moved_value(before, name, moves or {}), after.value_of(name)
        if new is None:
            alias = before.aliases.get(name)
            if old is not None and (alias.target if alias else name) in after.weights:
                raise VerificationError(
                    f"the contract '{contract}' is broken: the weight {name!r} leads nowhere any more"
                )
        elif old is None or (new is not old and not bit_equal(old, new)):
            raise VerificationError(f"the contract '{contract}' is broken: the weight {name!r} holds other bytes")


def _moved_value(program: Program, name: str, moves: Moves) -> torch.Tensor | None:
    """What a name leads to once positions of rows went where `moves` say."""
    alias = program.aliases.get(name, Alias(name))
    own = moves.get(alias.target or "")
    if own is None or alias.target is None:
        return program.value_of(name)
    alias = moved_alias(alias, own)
    return alias.of(moved(program.weights[alias.target].value.detach(), own)) if alias.target else None


def _exact(case: Case, expected: dict[str, Any], found: dict[str, Any]) -> None:
    for name, value in expected.items():
        if not bit_equal(value, found[name]):
            raise VerificationError(
                f"the contract 'exact' is broken: {name} changed", where=str(case), why=_gap(value, found[name])
            )


def _tolerance(program: Program, before: Outcomes, after: Outcomes, rewritten: Program | None, moves: Moves) -> None:
    pairs = [(old.tensors(), new.tensors()) for (_, old), (_, new) in zip(before, after, strict=True)]
    if all(bit_equal(value, new[name]) for old, new in pairs for name, value in old.items()):
        return  # which also holds where random draws leave no float64 reference
    held = _deviations(program, before, after, moves)
    if rewritten is not None and not all(row.ok for _, row in held):
        more = Outcomes.of(program, cases_again(program, before.cases))
        now = more.again(rewritten, moves)
        if len(now.cases) != len(more.cases):
            raise VerificationError("the rewritten program does not run on every input that the other one runs on")
        held = _deviations(program, more.moved(moves), now, moves)
    for case, row in held:
        if not row.ok:
            raise VerificationError(
                f"the contract 'tolerance' is broken: {row.name} changed",
                where=str(case),
                why=f"error {row.found:.3g} against float64; allowed {row.allowed:.3g}",
            )


def _deviations(program: Program, before: Outcomes, after: Outcomes, moves: Moves) -> list[tuple[Case, Deviation]]:
    """Each output on each case, with what is allowed pooled over the cases."""
    families: dict[tuple[str, str], list[tuple[Case, Deviation]]] = defaultdict(list)
    for (case, old), (_, new), began in zip(before, after, before.began, strict=True):
        started, entry = with_states(program, began), program.entries[case.entry]
        reference = evaluate_precise(started, entry, case.clone()).moved(moves).tensors()
        found = new.tensors()
        for name, value in old.tensors().items():
            families[case.entry, name].append((case, deviation(name, value, found[name], reference[name])))
    return [
        (case, row)
        for family in families.values()
        for (case, _), row in zip(family, pooled([row for _, row in family]), strict=True)
    ]


def _gap(old: Any, new: Any) -> str:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.shape == new.shape:
        return f"greatest absolute difference {max_abs(old, new):.3g}"
    return "another shape or type"


def distance(captured: Outcomes, now: Outcomes) -> float:
    """The greatest absolute difference on any case of any output that both have: states of what is dropped are gone."""
    return max((_distance(a.tensors(), b.tensors()) for (_, a), (_, b) in zip(captured, now, strict=True)), default=0.0)


def _distance(old: dict[str, Any], new: dict[str, Any]) -> float:
    pairs: Sequence[tuple[Any, Any]] = [(v, new[k]) for k, v in old.items() if isinstance(v, torch.Tensor) and k in new]
    return max((max_abs(a, b) for a, b in pairs if not bit_equal(a, b)), default=0.0)
