"""Passes on a piece: once Inductor has a functional graph of it, forward or backward, it is a small Program."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import fx

from laconic.ir.functional import program_of, write_back
from laconic.passes.base import Pass

log = logging.getLogger(__name__)


def rewrite(graph: fx.Graph, passes: Sequence[Pass]) -> dict[str, int] | str:
    """Run passes on a functional graph, in place. Returns how many actions each took, or why none was run."""
    program = program_of(graph)
    if isinstance(program, str):
        return program
    done: dict[str, int] = {}
    for item in passes:
        plan = item.plan(program)
        if plan.actions:
            item.rewrite(program, plan)
            done[item.name] = done.get(item.name, 0) + len(plan.actions)
    if done:
        write_back(program, graph)
    return done
