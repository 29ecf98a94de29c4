"""Pipelines as text and as objects, one a bijection of the other.

    pipeline := pass ("," pass)*         pass := name [ "{" option ("," option)* "}" ]         option := key "=" value

Values are typed by the pass's dataclass fields: yes/no, whole numbers, numbers, words. Printing leaves out options at
their default, so equal passes print equally. A preset's name stands for its passes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

from laconic.ir.errors import PipelineError, UsageError, did_you_mean
from laconic.passes.base import Contract, Pass
from laconic.passes.registry import EXACT_PRESETS, PRESETS, load, names

_NAME = re.compile(r"[A-Za-z][\w-]*")
_VALUE = re.compile(r"[^\s,{}=]+")


def parse_pipeline(text: str) -> list[Pass]:
    """The passes that `text` names. Raises PipelineError at the column that does not fit."""
    passes: list[Pass] = []
    at = 0
    while text[at:].strip():
        at = _skip(text, at)
        found = _NAME.match(text, at)
        if found is None:
            _fail(text, at, "expected the name of a pass")
        name = found.group()
        options, after = _options(text, found.end())
        if name in PRESETS:
            if options:
                _fail(text, found.end(), f"the preset {name!r} takes no options")
            passes += _preset(name)
        else:
            passes.append(_make(text, at, name, options))
        at = _skip(text, after)
        if at < len(text):
            if text[at] != ",":
                _fail(text, at, f"expected ',' between passes, found {text[at]!r}")
            at += 1
            if not text[at:].strip():
                _fail(text, at - 1, "expected a pass behind ','")
    return passes


def _preset(name: str) -> list[Pass]:
    """The passes of a preset. Raises UsageError if it promises to be exact and holds a pass that is not."""
    passes = parse_pipeline(PRESETS[name])
    loose = [f"{p.spec} ({p.contract})" for p in passes if p.contract is not Contract.EXACT]
    if name in EXACT_PRESETS and loose:
        raise UsageError(f"the preset {name!r} holds only exact passes", why=", ".join(loose))
    return passes


def positions(text: str, passes: Sequence[Pass]) -> set[int]:
    """Where in a pipeline the pass stands that `text` names: `dedup` is any, `dedup{slices=no}` one with these options.

    Raises PipelineError for text that is no pass, UsageError if none in the pipeline is meant.
    """
    name = _NAME.match(text, _skip(text, 0))
    if name is not None and name.group() not in (*names(), *PRESETS):  # a preset, which is no pass, is not suggested
        _fail(text, name.start(), f"there is no pass {name.group()!r}", hint=did_you_mean(name.group(), names()))
    named = parse_pipeline(text)
    if len(named) != 1 or text.strip() in PRESETS:
        raise UsageError(f"{text!r} is not one pass", hint=did_you_mean(text, [p.name for p in passes]))
    found = {k for k, p in enumerate(passes) if (p == named[0] if "{" in text else p.name == named[0].name)}
    if not found:
        raise UsageError(
            f"the pipeline has no pass {text!r}",
            why=f"it is {print_pipeline(passes) or 'empty'}",
            hint=did_you_mean(text, [p.spec for p in passes]),
        )
    return found


def print_pipeline(passes: Sequence[Pass]) -> str:
    return ",".join(p.spec for p in passes)


def print_pass(item: Pass) -> str:
    """`name`, or `name{key=value,...}` with the options that are not at their default, in field order."""
    given = [
        f"{_dashed(f.name)}={_print_value(getattr(item, f.name))}"
        for f in dataclasses.fields(item)
        if getattr(item, f.name) != f.default
    ]
    return item.name + ("{" + ",".join(given) + "}" if given else "")


def options_of(kind: type[Pass]) -> dict[str, tuple[str, Any]]:
    """Each option of a pass: its type in words and its default."""
    hints = get_type_hints(kind)
    return {_dashed(f.name): (_in_words(hints[f.name]), f.default) for f in dataclasses.fields(kind)}


_TYPES = {bool: "yes/no", int: "whole number", float: "number", str: "word"}


def _in_words(kind: Any) -> str:
    """The type of an option; of one with few values, these."""
    return "/".join(get_args(kind)) if get_origin(kind) is Literal else _TYPES[kind]


def _options(text: str, at: int) -> tuple[dict[str, tuple[str, int, int]], int]:
    """Raw options (key: value, key column, value column), and the place behind them."""
    options: dict[str, tuple[str, int, int]] = {}
    if at >= len(text) or text[at] != "{":
        return options, at
    at += 1
    while True:
        at = _skip(text, at)
        key = _NAME.match(text, at)
        if key is None:
            _fail(text, at, "expected an option (key=value)")
        if key.group() in options:
            _fail(text, at, f"option {key.group()!r} is given twice")
        equals = _skip(text, key.end())
        if text[equals : equals + 1] != "=":
            _fail(text, equals, f"expected '=' behind the option {key.group()!r}")
        start = _skip(text, equals + 1)
        value = _VALUE.match(text, start)
        if value is None:
            _fail(text, start, f"expected a value for the option {key.group()!r}")
        options[key.group()] = (value.group(), at, start)
        at = _skip(text, value.end())
        if text[at : at + 1] == "}":
            return options, at + 1
        if text[at : at + 1] != ",":
            _fail(text, at, "expected ',' or '}' behind an option")
        at += 1


def _make(text: str, at: int, name: str, options: dict[str, tuple[str, int, int]]) -> Pass:
    try:
        kind = load(name)
    except UsageError as problem:
        _fail(text, at, problem.what, hint=problem.hint)
    hints = get_type_hints(kind)
    fields = {_dashed(f.name): f.name for f in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, (raw, key_at, value_at) in options.items():
        if key not in fields:
            hint = did_you_mean(key, fields) or f"{name} has no options"
            _fail(text, key_at, f"the pass {name!r} has no option {key!r}", hint=hint)
        values[fields[key]] = _parse_value(text, value_at, key, raw, hints[fields[key]])
    try:
        return kind(**values)
    except ValueError as problem:
        _fail(text, at, str(problem))
    except UsageError as problem:
        _fail(text, at, problem.what, hint=problem.hint)


def _parse_value(text: str, at: int, key: str, raw: str, kind: Any) -> Any:
    if kind is bool:
        if raw not in ("yes", "no"):
            _fail(text, at, f"option {key!r} is yes or no, not {raw!r}")
        return raw == "yes"
    if get_origin(kind) is Literal:
        if raw not in get_args(kind):
            _fail(text, at, f"option {key!r} is {_in_words(kind)}, not {raw!r}", hint=did_you_mean(raw, get_args(kind)))
        return raw
    try:
        return kind(raw)
    except ValueError:
        _fail(text, at, f"option {key!r} is a {_TYPES[kind]}, not {raw!r}")


def _print_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return repr(value) if isinstance(value, float) else str(value)


def _dashed(field: str) -> str:
    return field.replace("_", "-")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _fail(text: str, at: int, message: str, hint: str = "") -> NoReturn:
    raise PipelineError(message, source="pipeline", line=1, column=at + 1, text=f"{text}\n{' ' * at}^", hint=hint)
