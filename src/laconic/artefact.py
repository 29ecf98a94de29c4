"""The saved DIR: program, weights, recipe, plans and ledger, placed whole or not at all.

    program.txt  weights.safetensors     the program (laconic.ir.store)
    recipe.yaml                          pipeline, seed, versions, hashes of the files, and whether it was verified
    plans/N.json (+ N.safetensors)       what each pass decided
    ledger.json                          what each pass did and cost
    exports                              model.onnx, model.pt2 where asked for

Written beside its place, read back and compared bit for bit, then moved there in one step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from laconic.ir.errors import LaconicError, ModelError, UsageError, VerificationError, did_you_mean
from laconic.ir.files import place_directory, refuse_existing, temporary_beside
from laconic.ir.inputs import cases
from laconic.ir.outcomes import SEED, Outcomes
from laconic.ir.program import Program
from laconic.ir.store import PROGRAM, WEIGHTS, read_program, write_program
from laconic.ir.verify import verify
from laconic.passes.base import Contract, Plan
from laconic.passes.contracts import check
from laconic.passes.ledger import Ledger
from laconic.passes.plans import write_plan
from laconic.version import __version__

RECIPE = "recipe.yaml"
LEDGER = "ledger.json"
FORMATS = ("onnx", "pt2")

Progress = Callable[[str], None]


def save(
    program: Program,
    ledger: Ledger,
    plans: Sequence[Plan],
    path: str | Path,
    *,
    formats: Sequence[str] = (),
    force: bool = False,
    progress: Progress = lambda stage: None,
) -> Path:
    """Write a DIR and return its path; nothing is left of it if anything fails.

    Raises UsageError if `path` exists and `force` is not given, or for an unknown format; VerificationError if what was
    written does not read back to the same bits.
    """
    final = Path(path)
    refuse_existing(final, force)
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"there is no format {name!r}", hint=did_you_mean(name, FORMATS))
    with temporary_beside(final) as temporary:
        temporary.mkdir()
        progress("writing the program")
        write_program(program, temporary)
        (temporary / "plans").mkdir()
        for number, plan in enumerate(plans, start=1):
            write_plan(plan, temporary / "plans", number)
        (temporary / LEDGER).write_text(json.dumps(ledger.to_json(), indent=1) + "\n", encoding="utf-8")
        progress("reading it back")
        _compare(program, read_program(temporary))
        _export(program, temporary, formats, progress)
        _write_recipe(program, ledger, temporary)
        progress("moving it into place")
        place_directory(temporary, final, force)
    return final


def load_program(path: str | Path, *, allow_unverified: bool = False) -> Program:
    """The program of a saved DIR. Raises ModelError if a file is missing or not the one that was written,
    VerificationError if the DIR is marked unverified and `allow_unverified` is not given."""
    folder = Path(path)
    recipe = read_recipe(folder)
    for name, expected in recipe["hashes"].items():
        if name not in (PROGRAM, WEIGHTS):
            raise ModelError(f"{RECIPE} names a file that no DIR holds: {name!r}", where=str(folder / RECIPE))
        if not (folder / name).is_file():
            raise ModelError(f"{name} is missing", where=str(folder), hint="the DIR is incomplete: write it again")
        if _hash(folder / name) != expected:
            raise ModelError(
                f"{name} is not the file that was saved",
                where=str(folder / name),
                why="its hash is not the one in recipe.yaml",
                hint="the file was truncated, damaged or edited: write the DIR again",
            )
    if not recipe["verified"] and not allow_unverified:
        raise VerificationError(
            f"{folder} is marked UNVERIFIED",
            why="it was written with checks switched off",
            hint="optimize again with checks, or load with allow_unverified=True",
        )
    return read_program(folder)


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a DIR. Raises ModelError if there is none or it is damaged."""
    try:
        recipe = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
        if not isinstance(recipe["hashes"], dict) or not isinstance(recipe["verified"], bool):
            raise TypeError("hashes or verified are not what they should be")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as problem:
        raise ModelError(f"{RECIPE} cannot be read", where=str(folder / RECIPE), why=str(problem)) from problem
    return dict(recipe)


def _write_recipe(program: Program, ledger: Ledger, folder: Path) -> None:
    recipe = {
        "format": 1,
        "model": ledger.model,
        "pipeline": ledger.pipeline,
        "passes": [row.spec for row in ledger.rows],
        "seed": SEED,
        "calibration": None,
        "verified": ledger.verified,
        "versions": {"laconic": __version__, "torch": str(torch.__version__)},
        "hashes": {name: _hash(folder / name) for name in (PROGRAM, WEIGHTS)},
    }
    (folder / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def _compare(program: Program, reread: Program) -> None:
    """Hold what was read back to the bits of what was written."""
    verify(reread)
    if str(reread) != str(program):
        raise VerificationError("the written program does not read back to the same text")
    try:
        before = Outcomes.of(program, cases(program, program.forward))
        check(Contract.EXACT, program, before, Outcomes.of(reread, before.cases))
    except LaconicError as problem:
        raise VerificationError(
            f"the written program does not read back to the same bits: {problem.what}",
            where=problem.where,
            why=problem.why,
        ) from problem


def _export(program: Program, folder: Path, formats: Sequence[str], progress: Progress) -> None:
    if "onnx" in formats:
        from laconic.codegen.onnx import write_onnx

        write_onnx(program, folder / "model.onnx", progress=progress)
    if "pt2" in formats:
        from laconic.codegen.pt2 import write_pt2

        progress("writing model.pt2")
        write_pt2(program, folder / "model.pt2")


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
