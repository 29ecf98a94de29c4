"""The repeat finder, on listings written by hand and planted at random; what it reports is checked from scratch."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest

from laconic.ir.listing import Listing, Operand, Repeat, SlotKind
from laconic.ir.repeats import find_repeats
from laconic.ir.signature import Interner

Node = tuple[str, tuple[Operand, ...]]


def listing(nodes: Sequence[Node], kept: Sequence[int] = (), uncut: Sequence[int] = ()) -> Listing:
    """Nodes as (signature, operands): an int is an earlier node, a string another value, typed by its first letter."""
    number = Interner()
    return Listing(
        [number(op) for op, _ in nodes],
        [operands for _, operands in nodes],
        kind=lambda o: "v" if isinstance(o, int) else str(o)[0],
        kept=frozenset(kept),
        uncut=frozenset(uncut),
    )


def blocks(count: int, start: int = 1) -> list[Node]:
    """`count` residual blocks of 5 nodes, one weight each: v + relu(w v) * w v, then a norm."""
    made: list[Node] = []
    for k in range(count):
        v = start - 1 + 5 * k
        made += [
            ("linear", (v, f"w{k}")),
            ("relu", (v + 1,)),
            ("mul", (v + 1, v + 2)),
            ("add", (v, v + 3)),
            ("norm", (v + 4, "scale")),
        ]
    return made


def says_the_same(nodes: Sequence[Node], repeat: Repeat) -> bool:
    """Whether all repeats are the first one but for a consistent exchange of what stands outside."""
    first = repeat.positions(0)
    for k in range(repeat.count):
        exchange: dict[Operand, Operand] = {}
        for a, b in zip(first, repeat.positions(k), strict=True):
            if nodes[a][0] != nodes[b][0] or len(nodes[a][1]) != len(nodes[b][1]):
                return False
            for x, y in zip(nodes[a][1], nodes[b][1], strict=True):
                inside = isinstance(x, int) and x >= first.start
                if inside != (isinstance(y, int) and y >= repeat.starts[k]):
                    return False
                if inside and x - first.start != y - repeat.starts[k]:  # type: ignore[operator]
                    return False
                if not inside and exchange.setdefault(x, y) != y:
                    return False
        if len(set(exchange.values())) != len(exchange):
            return False
        if [exchange.get(bound[0], bound[0]) for bound in repeat.slots] != [bound[k] for bound in repeat.slots]:
            return False
    return True


def test_a_run_with_its_slots_and_outputs() -> None:
    nodes = [("embed", ("x",)), *blocks(4), ("head", (20, "w9"))]
    (found,) = find_repeats(listing(nodes))
    assert (found.starts, found.period, found.saved, found.contiguous) == ((1, 6, 11, 16), 5, 15, True)
    assert found.slots == ((0, 5, 10, 15), ("w0", "w1", "w2", "w3"), ("scale",) * 4)
    assert found.kinds == (SlotKind.CARRIED, SlotKind.PRIVATE, SlotKind.INVARIANT)
    assert found.outputs == (4,)


def test_values_that_are_returned_leave_their_block() -> None:
    nodes = [("embed", ("x",)), *blocks(3)]
    (found,) = find_repeats(listing(nodes, kept=(2, 15)))
    assert found.outputs == (1, 4)


def test_nothing_is_found_where_nothing_repeats() -> None:
    assert find_repeats(listing([])) == []
    assert find_repeats(listing([(f"op{k}", (k - 1,) if k else ("x",)) for k in range(30)])) == []


@pytest.mark.parametrize(
    ("position", "node"),
    [
        (13, ("mul", (12, 11))),  # operands swapped
        (13, ("mul", (11, 11))),  # one value twice
        (11, ("linear", (10, "b2"))),  # a weight of another type
        (15, ("norm", (14, "w2"))),  # one weight in two places
    ],
)
def test_wiring_that_signatures_do_not_see_splits_a_run(position: int, node: Node) -> None:
    nodes = [("embed", ("x",)), *blocks(5)]
    nodes[position] = node
    found = find_repeats(listing(nodes))
    assert all(says_the_same(nodes, repeat) for repeat in found)
    assert not any(position in repeat.positions(k) for repeat in found for k in range(repeat.count))
    assert sum(repeat.saved for repeat in found) >= 10


def test_a_skip_over_two_blocks_is_another_slot() -> None:
    nodes = [("embed", ("x",)), *blocks(5)]
    nodes[14] = ("add", (5, 13))
    found = find_repeats(listing(nodes))
    assert found
    assert all(says_the_same(nodes, repeat) for repeat in found)


def test_blocks_that_differ_by_turns_make_a_longer_period() -> None:
    nodes = [("embed", ("x",)), *blocks(6)]
    for k in range(6):
        nodes[2 + 5 * k] = ("relu" if k % 2 else "gelu", (1 + 5 * k,))
    (found,) = find_repeats(listing(nodes))
    assert (found.period, found.count) == (10, 3)


def test_turns_that_only_the_wiring_takes_make_a_longer_period() -> None:
    nodes = [("embed", ("x",)), *blocks(6)]
    for k in range(0, 6, 2):
        nodes[3 + 5 * k] = ("mul", (2 + 5 * k, 1 + 5 * k))
    (found,) = find_repeats(listing(nodes))
    assert (found.period, found.count) == (10, 3)


def test_the_longer_saving_wins_over_repeats_inside_a_block() -> None:
    nodes: list[Node] = [("embed", ("x",))]
    for k in range(4):
        v = len(nodes) - 1
        for part in "qkv":
            nodes += [("linear", (v, f"w{part}{k}")), ("heads", (len(nodes),))]
        nodes += [("attend", (v + 2, v + 4, v + 6)), ("add", (v, v + 7))]
    (found,) = find_repeats(listing(nodes))
    assert (found.period, found.count) == (8, 4)


def test_a_block_begins_where_fewest_values_are_alive() -> None:
    """Only one value crosses in front of `linear`; in front of the others it is two."""
    nodes = [("relu", ("x",)), *blocks(4)][:-1]  # the last norm is missing: every phase has as many repeats but one
    (found,) = find_repeats(listing([("norm", ("x", "scale")), *blocks(4)]))
    assert [nodes[s][0] for s in found.starts] == ["linear"] * 4


def test_a_caller_may_choose_where_blocks_begin() -> None:
    nodes = [("norm", ("v", "scale")), *blocks(5)]
    (found,) = find_repeats(listing(nodes), cut_cost=lambda position: nodes[position][0] != "norm")
    assert {nodes[s][0] for s in found.starts} == {"norm"}
    assert found.count == 5
    assert says_the_same(nodes, found)


def test_a_tuple_does_not_leave_its_block() -> None:
    nodes: list[Node] = [("embed", ("x",))]
    for _ in range(4):
        v = len(nodes) - 1
        nodes += [
            ("norm", (v,)),
            ("split", (v + 1,)),
            ("first", (v + 2,)),
            ("second", (v + 2,)),
            ("add", (v + 3, v + 4)),
        ]
    uncut = [k for k, (op, _) in enumerate(nodes) if op == "split"]
    (found,) = find_repeats(listing(nodes, uncut=uncut), cut_cost=lambda position: nodes[position][0] != "first")
    assert {nodes[s][0] for s in found.starts} <= {"norm", "split", "embed", "add"}
    assert found.count >= 3


def test_equal_pieces_are_found_with_others_between_them() -> None:
    nodes: list[Node] = [(f"head{k}", (k - 1,) if k else ("x",)) for k in range(5)]
    for turn, kind in enumerate(["a", "b", "a", "c", "a", "d", "a", "b"]):
        v = len(nodes) - 1
        for step in range(6):
            nodes.append((f"{kind}{step}", (len(nodes) - 1, f"w{turn}")))
        nodes.append((f"{kind}6", (v, len(nodes) - 1)))  # a residual: two values are alive inside, one between
    found = find_repeats(listing(nodes))
    assert all(says_the_same(nodes, repeat) for repeat in found)
    words = {nodes[repeat.starts[0]][0]: (repeat.count, repeat.period) for repeat in found}
    assert any(count == 4 and op.startswith("a") for op, (count, _) in words.items()), words
    assert sum(repeat.saved for repeat in found) >= 3 * 6


def planted(seed: int) -> tuple[list[Node], int, int, int]:
    """A random block several times between unlike ends: the nodes, its first node, its length and how often."""
    draw = random.Random(seed)
    period, count = draw.randint(4, 30), draw.randint(2, 9)
    head = draw.randint(1, 12)
    nodes: list[Node] = [(f"head{k}", ("x",)) for k in range(head)]
    shape = []
    for offset in range(period):
        reads = [draw.randint(-3, offset - 1) if offset else -1 for _ in range(draw.randint(1, 3))]
        shape.append((f"op{draw.randint(0, 40)}", reads))
    shape[-1] = ("last", [period - 2, -1])
    for k in range(count):
        start = head + k * period
        for op, reads in shape:
            outside: dict[int, Operand] = {-1: start - 1, -2: f"w{k}", -3: "shared"}
            nodes.append((op, tuple(outside[r] if r < 0 else start + r for r in reads)))
    nodes += [(f"tail{k}", (len(nodes) - 1,)) for k in range(draw.randint(0, 5))]
    return nodes, head, period, count


def test_planted_blocks_are_found_and_reports_are_true() -> None:
    for seed in range(300):
        nodes, head, period, count = planted(seed)
        found = find_repeats(listing(nodes, kept=(len(nodes) - 1,)))
        assert all(says_the_same(nodes, repeat) for repeat in found), seed
        places = [p for repeat in found for k in range(repeat.count) for p in repeat.positions(k)]
        assert len(places) == len(set(places)), seed
        # The block before the first may differ by what it carries; all else must be said once.
        assert sum(repeat.saved for repeat in found) >= (count - 2) * period, (seed, head, period, count)


@pytest.mark.usefixtures("quick_collections")
def test_time_is_linear_in_the_number_of_nodes() -> None:
    def once(nodes: Listing, count: int) -> float:
        start = time.process_time()
        (found,) = find_repeats(nodes)
        assert found.count == count
        return time.process_time() - start

    def seconds(count: int) -> float:
        nodes = listing([("embed", ("x",)), *blocks(count)])
        return min(once(nodes, count) for _ in range(3))  # a collection of cycles may fall into one of them

    seconds(100)
    assert seconds(4000) < 16 * max(seconds(500), 0.01)
