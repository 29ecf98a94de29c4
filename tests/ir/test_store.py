"""The files of a program: every kind of weight reads back, and what was edited by hand is refused before it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import parse
from laconic.ir.errors import LaconicError, ModelError, ParseError, UnsupportedError, VerificationError
from laconic.ir.memory import ALIGNMENT, PIECE, from_file, misalignment, pieces, placed
from laconic.ir.program import Kind, Program, Weight
from laconic.ir.store import PROGRAM, WEIGHTS, read_back, read_program, write_program
from laconic.ir.tensor_file import TensorFile, write_tensors
from laconic.ir.types import DTYPE_NAMES, type_of

TEXT = """
size batch in [1, 9] like 3
parameter @w: f32[4, 2] trainable
state @s: f32[2]
entry forward {
  input %x: f32[batch, 2] in [-1.0, 1.0]
  argument x = %x
  %a: f32[batch, 4] = aten.linear(%x, @w)
  %c: f32[2] = aten.add.Tensor(@s, 1.5)
  update @s = %c
  return %a
}
"""


def with_rows(**rows: torch.Tensor) -> Program:
    program = parse(TEXT)
    for name, value in rows.items():
        program.weights[name.replace("__", ".")] = Weight(name.replace("__", "."), value, Kind.BUFFER)
    return program


def reread(program: Program, folder: Path) -> Program:
    write_program(program, folder)
    return read_program(folder)


def raw(tensor: torch.Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes() if plain.dim() else raw(plain[None])


def assert_same(program: Program, other: Program) -> None:
    assert str(program) == str(other)
    for name, weight in program.weights.items():
        assert type_of(weight.value) == type_of(other.weights[name].value)
        assert raw(weight.value) == raw(other.weights[name].value), name


@pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=str)
def test_every_dtype_reads_back(dtype: torch.dtype, tmp_path: Path) -> None:
    base = (torch.arange(24) % 2 if dtype == torch.bool else torch.arange(24)).to(dtype)
    rows = {"dense": base.clone().reshape(4, 6), "turned": base.clone().reshape(4, 6).t(), "scalar": base[5].clone()}
    program = with_rows(**rows, low=base[:12], wide=base[2:20:2], none=base[:0])
    assert_same(program, reread(program, tmp_path))


def test_another_dtype_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"'odd' cannot be saved: its dtype torch\.float8_e4m3fnuz"):
        write_program(with_rows(odd=torch.zeros(2, dtype=torch.float8_e4m3fnuz)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_conjugated_values_are_stored_as_what_they_are(tmp_path: Path) -> None:
    base = torch.randn(4, dtype=torch.complex64)
    program = with_rows(plain=base, turned=base.conj(), negative=base.conj().imag)
    again = reread(program, tmp_path)
    assert torch.equal(again.weights["turned"].value, base.conj())
    assert torch.equal(again.weights["negative"].value, -base.imag)


def test_no_weight_has_the_name_of_a_storage(tmp_path: Path) -> None:
    base = torch.randn(8)
    rows = {f"storage__{n}": torch.full((3,), float(n)) for n in range(8)}
    program = with_rows(**rows, low=base[:4], high=base[2:])
    again = reread(program, tmp_path)
    assert_same(program, again)
    low, high = again.weights["low"].value, again.weights["high"].value
    assert low.untyped_storage().data_ptr() == high.untyped_storage().data_ptr()


#: What is edited in program.txt, and what must be said of it.
_EDITS = [
    ("aten.add.Tensor(@s, 1.5)", "aten.relu_(@s)", "writes into an operand"),
    ("update @s", "update @w", "is no state"),
    ("update @s", 'update "nope"', "is no input"),
    ("entry forward", "alias @zz = @w[5:900]\n\nentry forward", "no rows"),
    ("entry forward", "alias @s = @w\n\nentry forward", "declared twice"),
    ("entry forward", "entry other", "no entry 'forward'"),
    ("[-1.0, 1.0]", '["a", "b"]', "two numbers"),
    ("%a: f32[batch, 4] = aten.linear(%x, @w)", "%a: f32[batch, 2] = aten.view(%x, [-1, 2])", "aten.view"),
    ("@w: f32[4, 2]", "@w: f32[4, 2]{1, 1}", "cannot lie in memory"),
    ("@w: f32[4, 2]", f"@w: f32[4, 2]{{{2**60}, 1}}", "cannot lie in memory"),
    ("@w: f32[4, 2]", "@w: f32[4000000000, 4000000000]", "its values are f32[4, 2]"),
    ("@w: f32[4, 2]", f"@w: f32[{2**61}, 2]", "its values are f32[4, 2]"),
    ("@low: f32[4]", "@low: f32[4000000000]", "is not where"),
    ("@low: f32[4]", "@low: c64[4]", ""),
    ("@low: f32[4]", "@low: f32[2, 2]{4611686018427387903, 4611686018427387903}", ""),
]


@pytest.mark.parametrize(("old", "new", "message"), _EDITS, ids=[e[1][:40] for e in _EDITS])
def test_an_edited_program_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    base = torch.randn(8)
    write_program(with_rows(low=base[:4], high=base[2:]), tmp_path)
    text = (tmp_path / PROGRAM).read_text()
    assert text.count(old) == 1
    (tmp_path / PROGRAM).write_text(text.replace(old, new))
    with pytest.raises(LaconicError) as caught:
        read_program(tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [
        {"views": "[" * 100_000},
        {"views": "3"},
        {"alignment": "[1]"},
        {"alignment": '{"w": Infinity}'},
        {"alignment": '{"w": null}'},
        {"views": '{"low": 3}'},
        {"views": '{"low": {"of": "nothing", "offset": 0}}'},
        {"views": '{"low": {"of": "w", "offset": 0}}'},
        {"views": '{"low": {"of": "low", "offset": -3}}'},
        {"views": json.dumps({"low": {"of": "low", "offset": 10**30}})},
    ],
    ids=str,
)
def test_damaged_metadata_is_refused(metadata: dict[str, str], tmp_path: Path) -> None:
    write_program(with_rows(low=torch.randn(4)), tmp_path)
    with safe_open(tmp_path / WEIGHTS, framework="pt") as opened:
        whole = {**(opened.metadata() or {}), **metadata}
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata=whole)
    with pytest.raises((ModelError, ParseError)):
        read_program(tmp_path)


def test_it_is_standard_safetensors_that_can_be_mapped(tmp_path: Path) -> None:
    tensors = {
        "odd": torch.randn(3, 5),
        "turned": torch.randn(40, 64).t(),
        "spread": torch.randn(1, 16).expand(32, 16),
        "half": torch.randn(32).bfloat16(),
        "none": torch.zeros(0, 3),
        "truth": torch.tensor(True),
        "größe": torch.arange(8),
    }
    write_tensors(tmp_path / WEIGHTS, tensors, {"note": "a"})
    read = load_file(tmp_path / WEIGHTS)
    assert {name: raw(value) for name, value in read.items()} == {name: raw(value) for name, value in tensors.items()}
    assert {name: value.shape for name, value in read.items()} == {name: v.shape for name, v in tensors.items()}
    with TensorFile(tmp_path / WEIGHTS) as opened:
        assert opened.metadata == {"note": "a"}
        whole = [name for name, value in tensors.items() if value.nbytes % ALIGNMENT == 0]
        assert len(whole) > 3
        assert all(opened.stored[name].offset % ALIGNMENT == 0 for name in whole)


@pytest.mark.parametrize("start", [0, 4, 60])
@pytest.mark.parametrize("ahead", [0, 4, 64, 4096 + 4])
@pytest.mark.parametrize("count", [0, 3, (1 << 18) + 1])
def test_bytes_of_a_file_lie_where_they_are_wanted(count: int, ahead: int, start: int, tmp_path: Path) -> None:
    values = torch.arange(count, dtype=torch.float32)
    path = tmp_path / "bytes"
    path.write_bytes(b"x" * ahead + values.numpy().tobytes())
    with path.open("rb") as file:
        found = from_file(file, ahead, (count,), torch.float32, start=start)
        with pytest.raises(EOFError):
            from_file(file, ahead + 4, (count,), torch.float32)
    assert torch.equal(found, values)
    assert misalignment(found) == (start if count else 0)
    mapped = str(path) in Path("/proc/self/maps").read_text()
    assert mapped == (count > 3 and ahead % ALIGNMENT == start)
    found.fill_(7)
    assert path.read_bytes()[ahead:] == values.numpy().tobytes(), "writing to it changes memory alone"
    del found
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_pieces_are_small_and_complete() -> None:
    wide = torch.randn(3, 1500, 1000)
    for tensor in (wide, wide.transpose(0, 2), wide[:, ::2], wide[:1, :1, :1].expand(2, 3, 4), wide[0, 0, 0], wide[:0]):
        parts = list(pieces(tensor))
        assert all(part.nbytes <= PIECE and part.is_contiguous() for part in parts)
        assert b"".join(map(raw, parts)) == raw(tensor)


def _spoilt_text(folder: Path) -> None:
    text = (folder / PROGRAM).read_text()
    assert "f32[4, 6]{1, 4}" in text
    (folder / PROGRAM).write_text(text.replace("f32[4, 6]{1, 4}", "f32[4, 6]"))


def _rewritten(change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        with TensorFile(folder / WEIGHTS) as opened:
            tensors, metadata = {name: opened.read(name).clone() for name in opened.stored}, dict(opened.metadata)
        change(tensors, metadata)
        write_tensors(folder / WEIGHTS, tensors, metadata)

    return rewrite


def _apart(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    span = tensors.pop(next(name for name in tensors if name.startswith("storage")))
    tensors["low"], tensors["high"] = span[:4].clone(), span[2:].clone()
    metadata["views"] = "{}"


def _joined(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    views = json.loads(metadata["views"])
    tensors["storage.99"] = torch.cat([tensors.pop("plain"), tensors.pop("other")])
    views |= {"plain": {"of": "storage.99", "offset": 0}, "other": {"of": "storage.99", "offset": 16}}
    metadata["views"] = json.dumps(views)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_spoilt_text, "strides of the row 'turned'"),
        (_rewritten(lambda t, m: t["plain"].view(torch.int32)[3:4].bitwise_xor_(1)), "'plain' does not read back"),
        (_rewritten(lambda t, m: t["turned"][0, 0].neg_()), "'turned' does not read back"),
        (_rewritten(lambda t, m: m.update(alignment="{}")), "alignment of the row 'off'"),
        (_rewritten(_apart), "shared a storage are stored apart"),
        (_rewritten(_joined), "storages of their own are stored as one"),
    ],
)
def test_reading_back_sees_what_is_not_as_it_was(damage: Callable[[Path], None], said: str, tmp_path: Path) -> None:
    base = torch.randn(8)
    rows = {"turned": torch.randn(6, 4).t(), "plain": torch.randn(16), "other": torch.randn(16)}
    rows["off"] = placed(torch.randn(8), (1,), 4)
    program = with_rows(**rows, low=base[:4], high=base[2:])
    write_program(program, tmp_path)
    again = read_back(tmp_path, program)
    assert str(again) == str(program)
    assert all(again.weights[name].value is row.value for name, row in program.weights.items())
    damage(tmp_path)
    with pytest.raises(VerificationError, match=said):
        read_back(tmp_path, program)


def test_a_row_that_is_no_truth_value_is_refused(tmp_path: Path) -> None:
    write_program(with_rows(truth=torch.ones(5, dtype=torch.bool)), tmp_path)
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content.replace(b"\1" * 5, b"\1\1\2\1\1"))
    with pytest.raises(ModelError, match="'truth' holds other bytes than 0 and 1"):
        read_program(tmp_path)
