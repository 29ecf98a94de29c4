"""The saved DIR: program, weights, recipe, plans and ledger, placed whole or not at all.

    program.txt  weights.safetensors     the program (laconic.ir.store)
    recipe.yaml                          pipeline, seed, versions, hashes of all but itself and the exports, and
                                         whether it was verified
    plans/N.json (+ N.safetensors)       what each pass decided
    ledger.json                          what each pass did and cost
    exports                              model.onnx, model.pt2, hf/ where asked for

Written beside its place, read back and compared bit for bit, then moved there in one step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml

from laconic.formats import FORMATS
from laconic.ir.errors import LaconicError, ModelError, UsageError, VerificationError, did_you_mean
from laconic.ir.files import place_directory, read_text, refuse_existing, temporary_beside
from laconic.ir.inputs import cases, cases_beside
from laconic.ir.outcomes import SEED, Outcomes
from laconic.ir.outline import inline
from laconic.ir.parse import parse_program
from laconic.ir.past import DECODE
from laconic.ir.program import Program
from laconic.ir.store import PROGRAM, WEIGHTS, read_back, read_outlined, read_program, write_program
from laconic.ir.verify import verify
from laconic.passes.base import Contract, Plan
from laconic.passes.contracts import check
from laconic.passes.ledger import Ledger
from laconic.passes.plans import PLANS, write_plan
from laconic.schema import finite
from laconic.version import __version__

RECIPE = "recipe.yaml"
LEDGER = "ledger.json"

#: The version of the DIR that this laconic writes and reads.
FORMAT = 1

Progress = Callable[[str], None]


def save(
    program: Program,
    ledger: Ledger,
    plans: Sequence[Plan],
    path: str | Path,
    *,
    formats: Sequence[str] = (),
    force: bool = False,
    seed: int = SEED,
    progress: Progress = lambda stage: None,
) -> Path:
    """Write a DIR and return its path; nothing is left of it if anything fails.

    `seed` is what the inputs of the checks were drawn with, for the recipe.

    Raises UsageError if `path` exists and `force` is not given, if it is no DIR that could be replaced, or for an
    unknown format; VerificationError if what was written does not read back to the same bits.
    """
    final = Path(path)
    refuse_existing(final, force)
    refuse_foreign(final)
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"there is no format {name!r}", hint=did_you_mean(name, FORMATS))
    with temporary_beside(final) as temporary:
        temporary.mkdir()
        progress("writing the program")
        write_program(program, temporary)
        (temporary / PLANS).mkdir()
        for number, plan in enumerate(plans, start=1):
            write_plan(plan, temporary / PLANS, number)
        (temporary / LEDGER).write_text(
            json.dumps(finite(ledger.to_json()), indent=1, allow_nan=False) + "\n", encoding="utf-8"
        )
        progress("reading it back")
        _compare(program, read_back(temporary, program))
        for name in dict.fromkeys(formats):
            EXPORTS[name](program, temporary, folder_of(ledger.model), progress)
        _write_recipe(ledger, seed, temporary)
        progress("moving it into place")
        refuse_foreign(final)
        place_directory(temporary, final, force)
    return final


def load_program(path: str | Path, *, allow_unverified: bool = False) -> Program:
    """The program of a saved DIR. Raises ModelError if a file is missing or not the one that was written,
    VerificationError if the DIR is marked unverified and `allow_unverified` is not given."""
    return read_program(_held_to_recipe(path, allow_unverified))


def load_outlined(path: str | Path, *, allow_unverified: bool = False) -> tuple[Program, Callable[[], Program]]:
    """The program of a saved DIR with its functions, read as `read_outlined` does; and what reads it as `load_program`
    does, around the same rows, even if the DIR is gone by then. Raises what `load_program` raises."""
    program, text = read_outlined(_held_to_recipe(path, allow_unverified))

    def whole() -> Program:
        found = parse_program(text, lambda name, kind: program.weights[name].value, str(path))
        verify(found)
        return inline(found)

    return program, whole


def _held_to_recipe(path: str | Path, allow_unverified: bool) -> Path:
    """A DIR whose files are those that its recipe lists. Raises what `load_program` raises."""
    folder = Path(path)
    recipe = read_recipe(folder)
    for name, state in states(folder, recipe["hashes"]).items():
        if state == "missing":
            raise ModelError(f"{name} is missing", where=str(folder), hint="the DIR is incomplete: write it again")
        if state == "damaged":
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
    return folder


def states(folder: Path, hashes: Mapping[str, str]) -> dict[str, str]:
    """What became of each file that a recipe lists: "ok", "missing" or "damaged"."""

    def state(path: Path, expected: str) -> str:
        if not path.is_file():
            return "missing"
        return "ok" if _hash(path) == expected else "damaged"

    return {name: state(folder / name, expected) for name, expected in hashes.items()}


def read_recipe(folder: Path) -> dict[str, Any]:
    """The recipe of a DIR. Raises ModelError if there is none, it is damaged, or of a format that is not known, or
    lists a file that does not lie in the DIR."""
    try:
        recipe = yaml.safe_load(read_text(folder / RECIPE))
        if not isinstance(recipe, dict) or type(recipe["format"]) is not int:
            raise TypeError("it names no format")
        if recipe["format"] == FORMAT:  # another one may say the rest otherwise
            for key, kind in _KINDS.items():
                if type(recipe[key]) is not kind:
                    raise TypeError(f"{key} is not what it should be")
            _check_names(folder, recipe["hashes"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError, RecursionError) as problem:
        why = f"it lacks {problem}" if isinstance(problem, KeyError) else str(problem)
        raise ModelError(f"{RECIPE} cannot be read", where=str(folder / RECIPE), why=why) from problem
    if recipe["format"] != FORMAT:
        raise ModelError(
            f"{folder} has format {recipe['format']}; this laconic reads format {FORMAT}",
            where=str(folder / RECIPE),
            hint="load it with the laconic that wrote it, or write the DIR again",
        )
    return recipe


#: What stands under each key of a recipe.
_KINDS: dict[str, type] = {
    "model": str,
    "pipeline": str,
    "passes": list,
    "skipped": list,
    "seed": int,
    "verified": bool,
    "versions": dict,
    "hashes": dict,
}


def _check_names(folder: Path, hashes: dict[Any, Any]) -> None:
    """Raise TypeError unless program and weights are listed, and each name is one of the folder's own. What a link in
    it leads to is read, and held to its hash."""
    if not hashes.keys() >= {PROGRAM, WEIGHTS}:
        raise TypeError(f"hashes are of {sorted(map(str, hashes))}, and not of {PROGRAM} and {WEIGHTS}")
    for name, expected in hashes.items():
        if not isinstance(name, str) or not isinstance(expected, str):
            raise TypeError(f"hashes has {name!r}: {expected!r}, and not texts")
        plain = PurePosixPath(name)
        foreign = plain.is_absolute() or ".." in plain.parts or not plain.parts or str(plain) != name
        if foreign or "\0" in name:
            raise TypeError(f"hashes names {name!r}, which is no file in the DIR")


def refuse_foreign(path: Path) -> None:
    """Raise UsageError for what `force` must not replace: anything but an empty folder or a DIR."""
    if path.is_dir():
        if any(path.iterdir()) and not (path / RECIPE).is_file():
            raise UsageError(
                f"{path} is not replaced: it is neither empty nor a DIR that laconic wrote",
                why=f"it holds no {RECIPE}",
                hint="choose another name, or remove the folder yourself",
            )
    elif path.exists():
        raise UsageError(f"{path} is a file, and a folder is to be written", hint="choose another name")


def _write_recipe(ledger: Ledger, seed: int, folder: Path) -> None:
    plans = [f"{PLANS}/{path.name}" for path in sorted((folder / PLANS).iterdir(), key=_by_number)]
    recipe = {
        "format": FORMAT,
        "model": ledger.model,
        "pipeline": ledger.pipeline,
        "passes": [row.spec for row in ledger.rows if not row.skipped],
        "skipped": [{"pass": row.spec, "reason": row.reason} for row in ledger.rows if row.skipped],
        "seed": seed,
        "calibration": None,
        "verified": ledger.verified,
        "versions": {"laconic": __version__, "torch": str(torch.__version__)},
        "hashes": {name: _hash(folder / name) for name in (PROGRAM, WEIGHTS, LEDGER, *plans)},
    }
    (folder / RECIPE).write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")


def _by_number(path: Path) -> tuple[int, str]:
    return int(path.stem), path.suffix


def _compare(program: Program, reread: Program) -> None:
    """Hold what was read back to the bits of what was written."""
    if str(reread) != str(program):
        raise VerificationError("the written program does not read back to the same text")
    try:
        before = Outcomes.of(program, [*cases(program, program.forward), *cases_beside(program)])
        check(Contract.EXACT, program, before, before.again(reread))
    except LaconicError as problem:
        raise VerificationError(
            f"the written program does not read back to the same bits: {problem.what}",
            where=problem.where,
            why=problem.why,
        ) from problem


def folder_of(model: str) -> Path | None:
    """The folder of a model that is named so, where its tokenizer may stand, if it has one and it is still there; a DIR
    remembers that of the model it was made of."""
    if model.startswith("zoo:"):
        from laconic.models import zoo

        return zoo.folder(model.removeprefix("zoo:"))
    path = Path(model)
    if not model or not path.is_dir():
        return None
    return folder_of(str(read_recipe(path).get("model", ""))) if (path / RECIPE).is_file() else path


def _export_hf(program: Program, folder: Path, source: Path | None, progress: Progress) -> None:
    from laconic.codegen.hf import write_hf

    write_hf(program, folder / "hf", beside=source, progress=progress)


def _export_onnx(program: Program, folder: Path, source: Path | None, progress: Progress) -> None:
    from laconic.codegen.onnx import write_onnx
    from laconic.codegen.onnx.entries import write_past

    write_onnx(program, folder / "model.onnx", progress=progress)
    if DECODE in program.entries:
        write_past(program, folder / "model.onnx", progress=progress)


def _export_pt2(program: Program, folder: Path, source: Path | None, progress: Progress) -> None:
    from laconic.codegen.pt2 import write_pt2

    progress("writing model.pt2")
    write_pt2(program, folder / "model.pt2")


#: What writes each of `FORMATS` beside the program, with what stands in the folder of the model.
EXPORTS: dict[str, Callable[[Program, Path, Path | None, Progress], None]] = {
    "hf": _export_hf,
    "onnx": _export_onnx,
    "pt2": _export_pt2,
}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
