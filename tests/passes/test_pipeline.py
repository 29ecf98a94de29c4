"""Pipelines as text: a bijection with objects, and errors that point at the column."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from laconic.ir.errors import PipelineError, UsageError
from laconic.passes.base import Contract, Pass
from laconic.passes.cse import Cse
from laconic.passes.dce import Dce
from laconic.passes.dedup import Dedup
from laconic.passes.pipeline import options_of, parse_pipeline, print_pipeline
from laconic.passes.registry import PRESETS, load, load_all, names

_PASSES = st.one_of(
    st.just(Cse()),
    st.just(Dce()),
    st.builds(Dedup, slices=st.booleans(), min_slice_bytes=st.integers(0, 2**40), trainable=st.booleans()),
    st.builds(load("simplify"), max_bytes=st.integers(0, 2**40), values=st.booleans()),
)


@given(st.lists(_PASSES, max_size=6))
def test_printed_pipelines_parse_to_the_same_passes(passes: list[Pass]) -> None:
    text = print_pipeline(passes)
    assert parse_pipeline(text) == passes
    assert print_pipeline(parse_pipeline(text)) == text


@given(st.lists(_PASSES, min_size=1, max_size=4), st.sampled_from(["", " ", "  "]))
def test_spaces_mean_nothing(passes: list[Pass], space: str) -> None:
    text = print_pipeline(passes)
    for mark in ",}=":
        text = text.replace(mark, f"{space}{mark}{space}")
    text = text.replace("{", "{" + space)
    assert parse_pipeline(f"{space}{text}{space}") == passes


def test_options_at_their_default_are_not_printed() -> None:
    assert print_pipeline([Dedup(slices=True), Dedup(slices=False, min_slice_bytes=1)]) == (
        "dedup,dedup{slices=no,min-slice-bytes=1}"
    )


_BAD = {
    ",dedup": (1, "expected the name of a pass"),
    "dedup,": (6, "expected a pass behind ','"),
    "dedup,,cse": (7, "expected the name of a pass"),
    "dedup cse": (7, "expected ',' between passes, found 'c'"),
    "dedup}": (6, "expected ',' between passes, found '}'"),
    "dedup{": (7, "expected an option"),
    "dedup{}": (7, "expected an option"),
    "dedup{slices}": (13, "expected '=' behind the option 'slices'"),
    "dedup{slices=}": (14, "expected a value for the option 'slices'"),
    "dedup{slices=no": (16, "expected ',' or '}' behind an option"),
    "dedup{slices=no,}": (17, "expected an option"),
    "cse,dedup{slices=maybe}": (18, "option 'slices' is yes or no, not 'maybe'"),
    "dedup{min-slice-bytes=1.5}": (23, "option 'min-slice-bytes' is a whole number, not '1.5'"),
    "dedup{slices=no,slices=no}": (17, "option 'slices' is given twice"),
    "cse,dedup{slice=no}": (11, "the pass 'dedup' has no option 'slice'"),
    "permute-units{by=l3}": (18, "option 'by' is l2/l1/max, not 'l3'"),
    "cse{fast=yes}": (5, "the pass 'cse' has no option 'fast'"),
    "cse,dedupe": (5, "there is no pass 'dedupe'"),
    "exact{slices=no}": (6, "the preset 'exact' takes no options"),
    "cse,exact!": (10, "expected ',' between passes, found '!'"),
    "7": (1, "expected the name of a pass"),
}


@pytest.mark.parametrize("text", _BAD)
def test_errors_point_at_the_column(text: str) -> None:
    column, message = _BAD[text]
    with pytest.raises(PipelineError) as caught:
        parse_pipeline(text)
    assert message in caught.value.what
    assert (caught.value.line, caught.value.column) == (1, column)
    assert caught.value.why == f"{text}\n{' ' * (column - 1)}^"
    assert caught.value.exit_code == 2


@given(st.text(alphabet="cse,dup{}=no1- \t\nx\"'\\é", max_size=20))
def test_damaged_text_gives_passes_or_a_pipeline_error_within_the_text(text: str) -> None:
    refused: PipelineError | None = None
    try:
        passes = parse_pipeline(text)
    except PipelineError as problem:
        refused = problem
    if refused is not None:
        assert 1 <= refused.column <= len(text) + 1
    else:
        assert parse_pipeline(print_pipeline(passes)) == passes


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("dedupe", "did you mean 'dedup' or 'dead-units'?"),
        ("simplfy", "did you mean 'simplify'?"),
        ("exat", "did you mean 'exact'"),
        ("dedup{slice=no}", "did you mean 'slices'"),
        ("cse{x=1}", "cse has no options"),
    ],
)
def test_unknown_names_are_answered_with_a_near_one(text: str, hint: str) -> None:
    with pytest.raises(PipelineError) as caught:
        parse_pipeline(text)
    assert hint in caught.value.hint


def test_presets_stand_for_their_passes() -> None:
    assert [p.name for p in parse_pipeline("exact")] == ["simplify", "dedup", "cse", "dce"]
    assert parse_pipeline("none") == []
    assert parse_pipeline("") == []
    assert parse_pipeline("dce,exact") == [Dce(), *parse_pipeline("exact")]


def test_the_preset_exact_holds_only_exact_passes() -> None:
    assert {p.contract for p in parse_pipeline(PRESETS["exact"])} == {Contract.EXACT}


def test_every_registered_pass_says_what_it_is() -> None:
    for kind in load_all():
        assert kind.name in names()
        assert kind.summary
        assert dataclasses.is_dataclass(kind)
        assert kind().spec == kind.name
        assert set(options_of(kind)) == {f.name.replace("_", "-") for f in dataclasses.fields(kind)}


def test_loading_an_unknown_pass_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="there is no pass 'fold'"):
        load("fold")
