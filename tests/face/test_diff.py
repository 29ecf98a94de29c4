"""`diff`: one change shows as one, and what did not change does not show."""

from __future__ import annotations

import itertools
import random
import time

import pytest
import torch

from helpers import optimize, parse
from laconic.align import common_subsequence
from laconic.diff import Change, Diff, diff_programs
from laconic.ir.program import Program
from laconic.ir.rewrite import find

HEAD = """
size batch in [1, 9] like 2
parameter @a: f32[4, 4] trainable
parameter @b: f32[4, 4] trainable
"""
A, B = torch.arange(16.0).reshape(4, 4), torch.arange(16.0).reshape(4, 4) * 2


def entry(*calls: str, returns: str = "%z", head: str = HEAD, sites: str = 'site 0..9 = "block" "m.py:3"') -> Program:
    """A program of one input %x with these calls."""
    lines = "\n".join(calls)
    body = f"entry forward {{\ninput %x: f32[batch, 4] in [-1.0, 1.0]\nargument x = %x\n{lines}\nreturn {returns}\n}}"
    text = f"{head}\n{body}\n{sites}"
    given = {name: value for name, value in (("a", A), ("b", B)) if f"@{name}:" in text}
    return parse(text, **given)


def op(name: str, call: str, site: int | None = None, kind: str = "f32[batch, 4]") -> str:
    return f"%{name}: {kind} = aten.{call}" + ("" if site is None else f" !{site}")


def changes(diff: Diff, section: str) -> list[tuple[str | None, str | None, str]]:
    """The changes of a section, calls by their names."""

    def short(line: str | None) -> str | None:
        return line.split(":")[0] if line and line.startswith("%") else line

    found = next((s.changes for s in diff.sections if s.name == section), [])
    return [(short(c.before), short(c.after), c.note) for c in found]


BASE = [
    op("p", "linear(%x, @a)", 0),
    op("q", "exp(%p)", 1),
    op("r", "linear(%q, @b)", 2),
    op("z", "add.Tensor(%r, %p)", 3),
]


def test_a_program_is_no_different_from_itself_by_other_names() -> None:
    renamed = [line.replace("%p", "%first").replace("%q", "%second") for line in BASE]
    for other in (BASE, renamed):
        diff = diff_programs(entry(*BASE), entry(*other))
        assert diff.equal
        assert diff.sections == []
        assert diff.to_json()["equal"] is True


def test_sites_of_another_capture_have_other_numbers() -> None:
    moved = [line[:-1] + str(int(line[-1]) + 4) for line in BASE]
    assert diff_programs(entry(*BASE), entry(*moved)).equal


def test_the_order_of_independent_calls_says_nothing() -> None:
    calls = [op("p", "exp(%x)", 0), op("q", "sin(%x)", 1), op("z", "add.Tensor(%p, %q)", 2)]
    assert diff_programs(entry(*calls), entry(calls[1], calls[0], calls[2])).equal


def test_a_call_that_is_gone_shows_once_and_its_readers_do_not() -> None:
    readers = [op("r", "linear(%c, @b)", 2), op("s", "exp(%c)", 3), op("z", "add.Tensor(%r, %s)", 4)]
    before = entry(op("p", "linear(%x, @a)", 0), op("c", "clone(%p)", 1), *readers)
    after = entry(op("p", "linear(%x, @a)", 0), *(line.replace("%c", "%p") for line in readers))
    assert changes(diff_programs(before, after), "entry forward") == [("%c", None, "%p is read in its place")]
    assert changes(diff_programs(after, before), "entry forward") == [(None, "%c", "read in the place of %p")]


def test_a_result_that_was_the_removed_call_is_no_change_of_the_result() -> None:
    before = entry(op("p", "exp(%x)", 0), op("z", "clone(%p)", 1))
    after = entry(op("p", "exp(%x)", 0), returns="%p")
    diff = diff_programs(before, after)
    assert changes(diff, "entry forward") == [("%z", None, "%p is read in its place")]


def test_one_call_in_the_place_of_another_is_one_change() -> None:
    after = [BASE[0], op("other", "sin(%p)"), BASE[2].replace("%q", "%other"), BASE[3]]
    assert changes(diff_programs(entry(*BASE), entry(*after)), "entry forward") == [("%q", "%other", "")]


def test_a_constant_or_operand_that_changed_is_a_change_of_this_call_alone() -> None:
    calls = [op("p", "mul.Tensor(%x, 2)", 0), op("q", "exp(%p)", 1), op("z", "add.Tensor(%q, %x)", 2)]
    other = [calls[0].replace("2)", "2.0)"), *calls[1:]]
    diff = diff_programs(entry(*calls), entry(*other))
    lines = [f"%p: f32[batch, 4] = aten.mul.Tensor(%x, {constant}) !0" for constant in ("2", "2.0")]
    assert diff.sections[0].changes == [Change(*lines)]
    rewired = [*calls[:2], calls[2].replace("%x)", "%p)")]
    assert changes(diff_programs(entry(*calls), entry(*rewired)), "entry forward") == [("%z", "%z", "")]


def test_readers_that_part_company_are_changes() -> None:
    """Two read a removed call; now one reads this and the other that."""
    before = entry(
        op("p", "exp(%x)", 0),
        op("c", "clone(%p)", 1),
        op("r", "sin(%c)", 2),
        op("s", "cos(%c)", 3),
        op("z", "add.Tensor(%r, %s)", 4),
    )
    after = entry(op("p", "exp(%x)", 0), op("r", "sin(%p)", 2), op("s", "cos(%x)", 3), op("z", "add.Tensor(%r, %s)", 4))
    found = changes(diff_programs(before, after), "entry forward")
    assert found == [("%c", None, ""), ("%r", "%r", ""), ("%s", "%s", "")]


def test_swapped_operands_and_weights_show() -> None:
    swapped = [*BASE[:3], BASE[3].replace("%r, %p", "%p, %r")]
    assert changes(diff_programs(entry(*BASE), entry(*swapped)), "entry forward") == [("%z", "%z", "")]
    weights = [BASE[0].replace("@a", "@b"), BASE[1], BASE[2].replace("@b", "@a"), BASE[3]]
    found = changes(diff_programs(entry(*BASE), entry(*weights)), "entry forward")
    assert found == [("%p", "%p", ""), ("%r", "%r", "")]


def test_another_type_shows_where_it_begins_and_where_it_goes() -> None:
    calls = [op("p", "exp(%x)", 0), op("z", "sum.dim_IntList(%p, [1], True)", 1, "f32[batch, 1]")]
    other = [calls[0], op("z", "sum.dim_IntList(%p, [1], False)", 1, "f32[batch]")]
    assert changes(diff_programs(entry(*calls), entry(*other)), "entry forward") == [("%z", "%z", "")]


def test_weights_tell_gone_from_moved_and_content_from_type() -> None:
    calls = [op("p", "linear(%x, @a)", 0), op("q", "linear(%x, @b)", 1), op("z", "add.Tensor(%p, %q)", 2)]
    twins = parse(str(entry(*calls)).split("\n", 1)[1], a=A, b=A.clone())
    dedup = optimize(twins, "dedup").program
    diff = diff_programs(twins, dedup)
    assert [s.name for s in diff.sections] == ["weights"]
    assert diff.sections[0].changes == [
        Change("parameter @b: f32[4, 4] trainable", "alias @b = @a", "same bytes"),
    ]
    changed = parse(str(entry(*calls)).split("\n", 1)[1], a=A, b=A + 0.5)
    diff = diff_programs(twins, changed)
    line = "parameter @b: f32[4, 4] trainable"
    assert diff.sections[0].changes == [Change(line, line, "other content, max-abs 0.5")]
    frozen = parse(str(twins).split("\n", 1)[1].replace("@b: f32[4, 4] trainable", "@b: f32[4, 4]"), a=A, b=A.clone())
    assert diff_programs(twins, frozen).sections[0].changes == [
        Change(line, line.removesuffix(" trainable"), "same bytes")
    ]
    negative = parse(str(entry(*calls)).split("\n", 1)[1], a=A, b=A.index_fill(0, torch.tensor([0]), -0.0))
    zero = parse(str(entry(*calls)).split("\n", 1)[1], a=A, b=A.index_fill(0, torch.tensor([0]), 0.0))
    assert changes(diff_programs(zero, negative), "weights")[0][2] == "other content, max-abs 0", "-0.0 is not 0.0"


def test_unused_weights_facts_sizes_and_inputs_show() -> None:
    used = entry(*BASE, head=HEAD + "buffer @spare: f32[64]")
    clean = optimize(used, "dce").program
    diff = diff_programs(used, clean)
    assert changes(diff, "weights") == [("buffer @spare: f32[64]", "alias @spare = none", "")]
    assert (diff.before, diff.after) == ((4, 384), (4, 128))
    other = entry(*BASE, head='fact model = "B"\n' + HEAD.replace("[1, 9]", "[1, 8]"))
    diff = diff_programs(entry(*BASE), other)
    assert changes(diff, "facts") == [(None, 'fact model = "B"', "")]
    assert changes(diff, "sizes") == [("size batch in [1, 9]", "size batch in [1, 8]", "")]
    wide = parse(str(entry(*BASE)).split("\n", 1)[1].replace("in [-1.0, 1.0]", "in [-2.0, 1.0]"), a=A, b=B)
    assert [c[0] for c in changes(diff_programs(entry(*BASE), wide), "entry forward")] == [
        "input %x: f32[batch, 4] in [-1.0, 1.0]"
    ]


def test_results_and_updates_show_by_name() -> None:
    states = HEAD + "state @s: f32[batch, 4]".replace("batch", "2")
    calls = [op("p", "exp(%x)", 0), op("n", "mul.Tensor(@s, 2)", 1, "f32[2, 4]"), op("m", "neg(@s)", 2, "f32[2, 4]")]
    before = entry(*calls, "update @s = %n", returns='{"y": %p, "m": %m}', head=states)
    after = entry(*calls, "update @s = %m", returns='{"y": %p, "m": %m}', head=states)
    found = changes(diff_programs(before, after), "entry forward")
    assert found == [("update s = %n", "update s = %m", "")]
    renamed = entry(*calls, "update @s = %n", returns='{"z": %p, "m": %m}', head=states)
    found = changes(diff_programs(before, renamed), "entry forward")
    assert ("result y = %p", None, "") in found
    assert (None, "result z = %p", "") in found


@pytest.mark.parametrize("layers", [40])
def test_one_layer_less_is_the_calls_of_that_layer(layers: int) -> None:
    """Equal layers from one line of code: the longest common run leaves exactly one layer's calls."""

    def stack(count: int) -> Program:
        calls, last = [], "x"
        for k in range(count):
            calls += [op(f"l{k}", f"linear(%{last}, @a)", 0), op(f"t{k}", f"tanh(%l{k})", 1)]
            last = f"t{k}"
        return entry(*calls, returns=f"%{last}")

    diff = diff_programs(stack(layers), stack(layers - 1))
    gone = [c for c in diff.sections[0].changes if c.after is None]
    assert len(gone) == 2
    assert len(diff.sections[0].changes) == 2


def longest(a: list[int], b: list[int]) -> int:
    """The length of the longest common subsequence, by the textbook's table."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


def test_the_common_subsequence_is_one_and_is_the_longest() -> None:
    generator = random.Random(0)
    for _ in range(500):
        symbols = generator.choice([1, 2, 3, 8])
        a, b = ([generator.randrange(symbols) for _ in range(generator.randrange(14))] for _ in range(2))
        pairs = common_subsequence(a, b)
        assert len(pairs) == longest(a, b)
        assert all(a[i] == b[j] for i, j in pairs)
        assert all(i < k and j < m for (i, j), (k, m) in itertools.pairwise(pairs))


def test_a_large_graph_takes_seconds() -> None:
    """Calls that are all alike, with one changed in the middle."""
    calls = [op("n0", "exp(%x)")]
    calls += [op(f"n{k}", f"{'sin' if k % 2 else 'cos'}(%n{k - 1})") for k in range(1, 1000)]
    before = entry(*calls, returns="%n999", sites="")
    after = before.clone()
    find(after.forward, "n500").target = torch.ops.aten.tan.default
    start = time.perf_counter()
    diff = diff_programs(before, after)
    assert time.perf_counter() - start < 5
    assert changes(diff, "entry forward") == [("%n500", "%n500", "")]
