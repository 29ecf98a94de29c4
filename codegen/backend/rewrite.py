"""Passes on a piece: once Inductor has a functional graph of it, forward or backward, it is a small Program."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from laconic.ir.functional import program_of, write_back
from laconic.passes.base import Pass, Plan

log = logging.getLogger(__name__)


def rewrite(graph: fx.Graph, passes: Sequence[Pass]) -> dict[str, int] | str:
    """Run passes on a functional graph, in place. Returns how many actions each took, or why none was run."""
    program = program_of(graph)
    if isinstance(program, str):
        return program
    done: dict[str, int] = {}
    for item in passes:
        plan = _without_constants(item.plan(program))
        if plan.actions:
            item.rewrite(program, plan)
            done[item.name] = done.get(item.name, 0) + len(plan.actions)
    if done:
        write_back(program, graph)
    return done


def _without_constants(plan: Plan) -> Plan:
    """The part of a plan that makes no new tensors. Inductor writes a constant that it is told how to compute into the
    kernels that read it; one that it is given it loads from memory, and not everywhere."""
    return replace(plan, actions=tuple(a for a in plan.actions if plan.tensors.keys().isdisjoint(_texts(a))))


def _texts(action: Mapping[str, Any]) -> Iterator[str]:
    return (value for value in action.values() if isinstance(value, str))
