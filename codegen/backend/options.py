"""What a user may ask of the backend: `torch.compile(model, backend="laconic", options={...})`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch._inductor

from laconic.ir.errors import UsageError, did_you_mean
from laconic.passes.base import Contract, Pass, Plan
from laconic.passes.pipeline import parse_pipeline
from laconic.passes.plans import read_plans

#: Exact passes that look at no weight's value: a weight is an input, and may change after compiling.
DEFAULT_PIPELINE = "simplify{values=no},cse,dce"
FROZEN_PIPELINE = "exact"


@dataclass(frozen=True)
class Options:
    """`pipeline`: passes for each distinct piece, as text. `strict`: whatever would be compiled in another way than
    asked for is an error. `inductor`: settings of Inductor.

    `freeze`: weights do not change any more; the pipeline, "exact" by default, runs on the graph with its weights, and
    may hold any pass. "checked" finds also what autograd does not see. `plan`: a saved DIR, whose plans are done
    again, on weights that are frozen.
    """

    pipeline: str = DEFAULT_PIPELINE
    strict: bool = False
    freeze: bool | str = False
    plan: str | PathLike[str] | None = None
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any] | None, mode: str | None = None) -> Options:
        """Options from what torch.compile hands over. Raises UsageError for an unknown name or a wrong value."""
        known = {f.name for f in fields(cls)}
        values = dict(given or {})
        for name in values:
            if name not in known:
                raise UsageError(f"backend 'laconic' has no option {name!r}", hint=did_you_mean(name, known))
        if mode not in (None, "default"):
            values["inductor"] = _of_mode(str(mode)) | dict(values.get("inductor", {}))
        if values.get("plan") is not None:
            values = _with_plan(values)
        values.setdefault("pipeline", FROZEN_PIPELINE if values.get("freeze") else DEFAULT_PIPELINE)
        options = cls(**values)
        options._check()
        options.passes()
        return options

    def _check(self) -> None:
        if not isinstance(self.inductor, Mapping):
            raise UsageError(f"option 'inductor' is a dict of Inductor's settings, not {self.inductor!r}")
        if not isinstance(self.strict, bool):
            raise UsageError(f"option 'strict' is True or False, not {self.strict!r}")
        if not (isinstance(self.freeze, bool) or self.freeze == "checked"):
            raise UsageError(f"option 'freeze' is True, False or 'checked', not {self.freeze!r}")
        if not isinstance(self.pipeline, str):
            raise UsageError(f"option 'pipeline' is text, such as 'cse,dce', not {self.pipeline!r}")
        known = torch._inductor.list_options()
        for name in self.inductor:
            if name.replace("-", "_") not in known:
                raise UsageError(f"Inductor has no setting {name!r}", hint=did_you_mean(name, known))

    @property
    def checked(self) -> bool:
        """Whether the contents of frozen weights are compared before every call."""
        return self.freeze == "checked"

    def decided(self) -> list[Plan]:
        """What passes do, where that is decided already. Raises ModelError for a DIR that has no plans."""
        return [] if self.plan is None else read_plans(Path(self.plan))

    def unfrozen(self) -> Options:
        """The same for weights that may change."""
        return replace(self, freeze=False, plan=None, pipeline=DEFAULT_PIPELINE)

    def passes(self) -> list[Pass]:
        """The passes of the pipeline. Raises UsageError for one that looks at weights, or is not exact, unless weights
        are frozen."""
        found = parse_pipeline(self.pipeline)
        for item in () if self.freeze else found:
            if item.reads_values:
                raise UsageError(f"{item.spec} looks at the values of weights, which may change after compiling")
            if item.contract is not Contract.EXACT:
                raise UsageError(f"{item.spec} is not exact", hint="run it offline: laconic optimize")
        return found


def _with_plan(values: dict[str, Any]) -> dict[str, Any]:
    if "pipeline" in values:
        raise UsageError("option 'plan' says which passes run, leave out 'pipeline'")
    if values.setdefault("freeze", True) is False:
        raise UsageError("option 'plan' is for weights that do not change, leave out 'freeze' or set it")
    if not isinstance(values["plan"], (str, PathLike)):
        raise UsageError(f"option 'plan' is the path of a saved DIR, not {values['plan']!r}")
    plans = read_plans(Path(values["plan"]))
    return values | {"pipeline": ",".join(plan.spec for plan in plans)}


def _of_mode(mode: str) -> dict[str, Any]:
    known = torch._inductor.list_mode_options()
    if mode not in known:
        raise UsageError(f"there is no mode {mode!r}", hint=did_you_mean(mode, known))
    return dict(known[mode])
