"""Plans on disk: `N.json` with the actions, and `N.safetensors` beside it where new weights were made."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from laconic.ir.errors import ModelError
from laconic.ir.files import read_text
from laconic.ir.types import is_dense
from laconic.passes.base import Plan

#: Where a DIR has its plans.
PLANS = "plans"


def read_plans(folder: Path) -> list[Plan]:
    """The plans of a saved DIR, in order. Raises ModelError if it has none, or for missing or damaged files."""
    count = len(list((folder / PLANS).glob("*.json")))
    if not count:
        raise ModelError("there are no plans", where=str(folder), hint="give a DIR that laconic optimize has written")
    return [read_plan(folder / PLANS, number) for number in range(1, count + 1)]


def write_plan(plan: Plan, folder: Path, number: int) -> None:
    """Write the plan as `<number>.json` (and `.safetensors`) into an existing folder."""
    strides = {name: list(t.stride()) for name, t in plan.tensors.items()}
    data = {"spec": plan.spec, "reason": plan.reason, "actions": [dict(a) for a in plan.actions], "strides": strides}
    if plan.tensors:
        save_file({n: t.contiguous() for n, t in plan.tensors.items()}, folder / f"{number}.safetensors")
    (folder / f"{number}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def read_plan(folder: Path, number: int) -> Plan:
    """The plan as it was written. Raises ModelError for missing or damaged files."""
    path = folder / f"{number}.json"
    try:
        data = json.loads(read_text(path))
        if not all(isinstance(a, dict) and isinstance(a.get("rule"), str) for a in data["actions"]):
            raise TypeError("an action names no rule")
        if not isinstance(data["spec"], str) or not isinstance(data["reason"], str):
            raise TypeError("spec or reason is no text")
        stored = load_file(folder / f"{number}.safetensors") if data["strides"] else {}
        tensors = {name: _with_strides(stored[name], strides) for name, strides in data["strides"].items()}
        return Plan(data["spec"], tuple(data["actions"]), tensors, data["reason"])
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError),
        *(RuntimeError, AssertionError, SafetensorError),
    ) as problem:
        why = f"it lacks {problem}" if isinstance(problem, KeyError) else str(problem)
        raise ModelError(f"the plan {path.name} cannot be read", where=str(path), why=why) from problem


def _with_strides(tensor: torch.Tensor, strides: list[int]) -> torch.Tensor:
    restored = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
    assert is_dense(restored) or not restored.numel()
    return restored
