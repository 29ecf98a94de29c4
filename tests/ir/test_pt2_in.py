"""Reading .pt2: what torch and what we write come in as they are, and nothing in the file is ever run.

What is planted here does run when sympy or pickle is given it (the controls), which is what torch does.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import Dim
from torch.utils._sympy.functions import FloorDiv

from laconic.codegen.pt2 import write_pt2
from laconic.ir.capture import capture_module
from laconic.ir.errors import LaconicError, ModelError, UnsupportedError
from laconic.ir.inputs import cases, draw
from laconic.ir.metrics.differences import bit_equal
from laconic.ir.outcomes import Outcomes
from laconic.ir.program import Kind, Program
from laconic.ir.pt2 import read_pt2
from laconic.ir.pt2_sizes import is_size
from laconic.ir.run import evaluate
from laconic.passes.base import Contract
from laconic.passes.contracts import check


class Everything(nn.Module):
    """Tied weights, a written buffer, one that is not saved, a constant, dicts, a block without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(17, 8), nn.Linear(8, 17, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("ramp", torch.arange(8.0), persistent=False)

    def forward(self, ids: torch.Tensor, more: dict[str, torch.Tensor], scale: float = 2.0) -> dict[str, Any]:
        self.seen.add_(1)
        with torch.no_grad():
            low, high = (self.ramp * 2).chunk(2)
        shift = torch.cat([high, low]) + torch.tensor([1.0] * 8)
        logits = self.head(self.embed(ids) * scale + more["bias"] + shift)
        return {"logits": logits, "rest": (logits + self.seen, None, 3)}


def everything() -> tuple[nn.Module, tuple[Any, ...], Any]:
    torch.manual_seed(0)
    axes = {0: Dim("batch", max=64), 1: Dim("tokens", min=2)}
    args = (torch.randint(0, 17, (3, 5)), {"bias": torch.randn(3, 5, 8)}, 3.0)
    return Everything().eval(), args, (axes, {"bias": axes}, None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pt2 as torch writes it, of the dialect that training wants: calls in it write into their operands."""
    module, args, shapes = everything()
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    torch.export.save(torch.export.export(module, args, dynamic_shapes=shapes), path)
    return path


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewritten(path: Path, target: Path, changes: dict[str, bytes | None], compress: int = zipfile.ZIP_STORED) -> Path:
    """A copy of an archive with some members replaced, added or (None) left out."""
    content = {k: v for k, v in (members(path) | changes).items() if v is not None}
    with zipfile.ZipFile(target, "w", compress) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return target


def edited(path: Path, target: Path, change: Callable[[Any], Any], member: str = "model/models/model.json") -> Path:
    """A copy with a changed JSON member."""
    data = json.loads(members(path)[member])
    change(data)
    return rewritten(path, target, {member: json.dumps(data).encode()})


def refused(path: Path, kind: type[LaconicError], *said: str) -> None:
    with pytest.raises(kind) as caught:
        read_pt2(path)
    for text in said:
        assert text in str(caught.value), str(caught.value)


class Planted:
    """An object that writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def planted(marker: Path) -> bytes:
    """What torch.save makes of it; loading it does write the file."""
    stream = io.BytesIO()
    torch.save(Planted(marker), stream)
    torch.load(io.BytesIO(stream.getvalue()), weights_only=False)
    assert marker.exists()
    marker.unlink()
    return stream.getvalue()


def test_what_torch_writes(exported: Path) -> None:
    program = read_pt2(exported)
    module, _args, _ = everything()
    assert [i.name for i in program.forward.inputs] == ["ids", "more.bias"]
    assert list(program.forward.arguments) == ["ids", "more", "scale"]
    assert {(s.low, s.high, s.hint) for s in program.symbols.values()} == {(1, 64, 3), (2, None, 5)}
    assert program.aliases["head.weight"].target == "embed.weight"
    assert {n: w.kind for n, w in program.weights.items() if n in ("seen", "ramp")} == {
        "seen": Kind.STATE,
        "ramp": Kind.BUFFER,
    }
    assert program.weights["embed.weight"].trainable
    assert not program.weights["ramp"].persistent
    assert not any("wrap" in str(n.target) for n in program.forward.calls())
    for batch, tokens in ((3, 5), (1, 2), (4, 9)):
        ids, bias = torch.randint(0, 17, (batch, tokens)), torch.randn(batch, tokens, 8)
        with torch.no_grad():
            module.seen.zero_()
            expected = module(ids, {"bias": bias}, 3.0)
        found = evaluate(program, program.forward, [ids, bias])
        assert bit_equal(found.results[0], expected["logits"])
        assert bit_equal(found.results[1], expected["rest"][0])
        assert found.states["seen"] == 1


def test_what_we_write_reads_back_to_the_same_program(tmp_path: Path) -> None:
    module, args, shapes = everything()
    program = capture_module(module, args, {}, shapes)
    again = read_pt2(write_pt2(program, tmp_path / "model.pt2"))
    assert list(again.symbols.values()) == list(program.symbols.values())
    assert [s.name for s in again.symbols.values()] == ["batch", "tokens"]
    assert again.forward.inputs == program.forward.inputs
    assert again.forward.outputs == program.forward.outputs
    assert again.forward.results == program.forward.results
    assert again.facts["model"] == program.facts["model"] == "Everything"
    assert [n.target for n in again.forward.calls()] == [n.target for n in program.forward.calls()]
    before = Outcomes.of(program, cases(program, program.forward))
    check(Contract.EXACT, program, before, Outcomes.of(again, before.cases))
    assert len(before.cases) > 3


@pytest.mark.slow
def test_a_library_model_needs_no_library(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=50))
    given = {"input_ids": torch.randint(0, 50, (2, 5)), "use_cache": False}
    shapes = {"input_ids": {0: Dim("batch"), 1: Dim.AUTO}, "use_cache": None}
    torch.export.save(torch.export.export(model.eval(), (), given, dynamic_shapes=shapes), tmp_path / "m.pt2")
    program = read_pt2(tmp_path / "m.pt2")
    assert program.facts["returned"] == "CausalLMOutputWithPast"
    assert list(program.forward.results) == ["logits"]
    assert program.forward.inputs[0].high > 25, "ids are drawn from the rows of the table that they index"
    case = draw(program, program.forward, {"s0": 4, "s1": 9}, seed=1)
    with torch.no_grad():
        expected = model(input_ids=case.inputs[0], use_cache=False).logits
    assert bit_equal(evaluate(program, program.forward, case.inputs).results[0], expected)


class Pair:
    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second


class Paired(nn.Module):
    def forward(self, x: torch.Tensor) -> Pair:
        return Pair(x + 1, x * 2)


def pair_exported(path: Path, names: list[str] | None) -> Path:
    """A .pt2 whose result is of a class that is not known when it is read; its parts have these names."""
    pytree.register_pytree_node(
        Pair, lambda p: ([p.first, p.second], names), lambda v, _: Pair(*v), serialized_type_name="tests.Pair"
    )
    try:
        torch.export.save(torch.export.export(Paired(), (torch.ones(2),)), path)
    finally:
        pytree._deregister_pytree_node(Pair)
    return path


def test_a_library_class_becomes_what_it_holds(tmp_path: Path) -> None:
    program = read_pt2(pair_exported(tmp_path / "m.pt2", ["first", "second"]))
    assert program.facts["returned"] == "Pair"
    assert list(program.forward.results) == ["first", "second"]
    assert torch.equal(evaluate(program, program.forward, [torch.ones(2) * 3]).results[1], torch.ones(2) * 6)


def test_a_class_whose_parts_have_no_names_is_refused(tmp_path: Path) -> None:
    refused(pair_exported(tmp_path / "m.pt2", None), UnsupportedError, "a Pair, whose parts cannot be named")


def test_large_weights_are_mapped_and_the_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "large.pt2"
    torch.export.save(torch.export.export(nn.Linear(512, 1024), (torch.ones(1, 512),)), path)
    before = path.read_bytes()
    program = read_pt2(path)
    weight = program.weights["weight"].value
    assert str(path) in Path("/proc/self/maps").read_text()
    assert weight.data_ptr() % 64 == 0
    with torch.no_grad():
        weight.zero_()
    assert path.read_bytes() == before


def test_sample_inputs_are_never_unpickled(exported: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    evil = rewritten(exported, tmp_path / "m.pt2", {"model/data/sample_inputs/model.pt": planted(marker)})
    assert isinstance(read_pt2(evil), Program)
    assert not marker.exists()


def test_no_unpickler_is_called(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("an unpickler was called")

    monkeypatch.setattr(torch, "load", called)
    monkeypatch.setattr(torch._C, "_pickle_load_obj", called)
    monkeypatch.setattr(pickle, "loads", called)
    monkeypatch.setattr(pickle, "load", called)
    monkeypatch.setattr(pickle, "Unpickler", called)
    read_pt2(exported)


@pytest.mark.parametrize("what", ["weights", "constants"])
@pytest.mark.parametrize("how", ["entry", "whole", "object", "opaque"])
def test_pickled_tensors_and_objects_are_refused(what: str, how: str, exported: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    data = planted(marker)
    folder = f"model/data/{what}/"
    config = f"{folder}model_{what}_config.json"
    table = json.loads(members(exported)[config])
    name = next(iter(table["config"]))
    member = {"object": "custom_obj_0", "opaque": "opaque_obj_0"}.get(how, table["config"][name]["path_name"])
    table["config"][name].update(path_name=member, use_pickle=True)
    if how in ("object", "opaque"):
        table["config"][name].update(tensor_meta=None, use_pickle=how == "object")
    changes: dict[str, bytes | None] = {config: json.dumps(table).encode(), folder + member: data}
    if how == "whole":
        changes = {f"{folder}model.pt": data}
    refused(
        rewritten(exported, tmp_path / "m.pt2", changes), UnsupportedError, f"pickled {what}", "runs the code in it"
    )
    assert not marker.exists()


def _set(data: Any, path: str, value: Any) -> None:
    *keys, last = path.split("/")
    for key in keys:
        data = data[int(key) if key.isdigit() else key]
    data[int(last) if last.isdigit() else last] = value


GRAPH = "graph_module/graph"
SIZE = f"{GRAPH}/tensor_values/ids/sizes/0/as_expr/expr_str"
CALL = "graph_module/module_call_graph/0/signature"
LEAF = {"type": None, "context": None, "children_spec": []}


def _spec(kind: str, context: Any) -> str:
    return json.dumps([1, {"type": kind, "context": json.dumps(context), "children_spec": [LEAF] * 4}])


#: Where in the graph a string stands that torch would run or believe, the string, and what must be said.
_STRINGS: list[tuple[str, Any, str]] = [
    (SIZE, "__import__('pathlib').Path('MARKER').touch()", "is no size"),
    (SIZE, "Symbol('s0').__class__", "is no size"),
    (SIZE, "Add('__import__(\"os\")', 1)", "is no size"),
    (SIZE, "Pow(Integer(9), Pow(Integer(9), Integer(9)))", "is no size"),
    (SIZE, "9**9**9", "is no size"),
    (SIZE, "(lambda: 1)()", "is no size"),
    (SIZE, "CeilToInt(Float('1e300000000'))", "is no size"),
    (SIZE, "(" * 3000 + "1" + ")" * 3000, "is no size"),
    (f"{GRAPH}/inputs/0/as_tensor/name", "x=__import__('os').system('touch MARKER')", "is no name"),
    (f"{GRAPH}/nodes/0/name", "a\n    import os", "is no name"),
    ("graph_module/signature/input_specs/0/parameter/parameter_name", 'x"); import os; ("', "no name of a weight"),
    (f"{GRAPH}/nodes/0/outputs/0/as_tensor/name", "import", "cannot"),
    (f"{GRAPH}/nodes/0/target", "torch.os.system", "no op of torch's own"),
    (f"{GRAPH}/nodes/0/target", "torch.ops.load_library", "no op of torch's own"),
    (f"{GRAPH}/nodes/0/target", "torch.ops.higher_order.cond", "graphs of its own"),
    (f"{GRAPH}/nodes/0/target", "torch.ops.aten.from_file.default", "no op that may stand"),
    (f"{GRAPH}/nodes/0/target", "_operator.attrgetter", "no op of torch's own"),
    (
        f"{CALL}/out_spec",
        _spec("collections.defaultdict", {"default_factory_module": "antigravity"}),
        "cannot be named",
    ),
    (f"{CALL}/out_spec", _spec("builtins.dict", {"__enum__": 1, "fqn": "antigravity:x"}), "cannot be named"),
    (f"{CALL}/out_spec", json.dumps([1, LEAF]), "another number of inputs or outputs"),
    (f"{CALL}/forward_arg_names", ["ids", "b): import os #", "scale"], "no name of an argument"),
    ("range_constraints/u99999999999", {"min_val": 0, "max_val": 1}, "is no range"),
    ("range_constraints/u9", {"min_val": 0, "max_val": 1}, "depends on the values"),
    ("verifiers", ["EDGE"], "dialect EDGE"),
    ("graph_module", {}, "KeyError"),
    (f"{GRAPH}/nodes/0/inputs", 3, "damaged"),
    (f"{GRAPH}/nodes/1/outputs/0/as_tensor/name", "ids", "torch cannot read"),
    (f"{GRAPH}/tensor_values/ids/sizes/1/as_expr/hint/as_int", 10**15, "more than 4 GiB"),
    (f"{GRAPH}/tensor_values/ids/dtype", 999, "torch cannot read"),
]


@pytest.mark.parametrize(
    ("path", "value", "said"), _STRINGS, ids=[f"{p.split('/')[-1]}-{k}" for k, (p, _, _) in enumerate(_STRINGS)]
)
def test_strings_that_torch_would_run_are_refused(
    path: str, value: Any, said: str, exported: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "marker"
    if isinstance(value, str):
        value = value.replace("MARKER", str(marker))
    with pytest.raises(LaconicError) as caught:
        read_pt2(edited(exported, tmp_path / "m.pt2", lambda data: _set(data, path, value)))
    assert said in str(caught.value), str(caught.value)
    assert not marker.exists()


def test_a_size_in_a_file_would_be_run(tmp_path: Path) -> None:
    """The control: what torch hands to sympy is evaluated as Python."""
    marker = tmp_path / "marker"
    sympy.sympify(f"__import__('pathlib').Path('{marker}').touch()")
    assert marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "CeilToInt(Float('1e300000000'))",
        r"CeilToInt(Float('\x31e300000000'))",
        "1e-300000000",
        "1e-3_0000_0000",
        f"Float('0.{'1' * 100}')",
        "Float('0.5', 10000000000)",
        "1 << 40000000000",
        "1 << (1 << 40)",
        "1 >> 40000000000",
        "RShift(Integer(1), Integer(40000000000))",
        "RoundDecimal(Integer(5), -10000000000)",
        "((2**64)**64)**64",
        "Mul(" + ", ".join(["CeilToInt(Float('1e999'))"] * 500) + ")",
        "Pow(Add(" + ", ".join(f"Symbol('s{k}')" for k in range(9)) + "), Integer(40))",
        "*".join(f"(s{k} + 1)" for k in range(40)),
        "-" * 5000 + "1",
    ],
)
def test_sizes_that_grow_without_bound_are_none(text: str) -> None:
    assert not is_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "Symbol('s77', positive=True, integer=True)",
        "Add(Symbol('s0', integer=True), Mul(Integer(-1), Integer(1)))",
        "Mul(Integer(2), Pow(FloorDiv(Add(Symbol('s0'), Integer(-1)), Integer(2)), Integer(2)))",
        "CeilToInt(Mul(Float('0.33333333333333331', precision=53), ToFloat(Symbol('s0'))))",
        "CeilToInt(Mul(Rational(1, 3), Symbol('s0')))",
        "Float('1.0e-5', precision=53)",
        "(1 << 20) + s0 - 2**31",
        "Pow(Symbol('s0'), Rational(-1, 2))",
        "Add(" + ", ".join(f"Symbol('s{k}')" for k in range(300)) + ")",
        "*".join(f"(s{k} + {k})" for k in range(6)),
        "RoundDecimal(Symbol('s0'), Integer(2))",
    ],
)
def test_sizes_that_models_have(text: str) -> None:
    assert is_size(text)
    sympy.sympify(text, locals={"FloorDiv": FloorDiv})


@pytest.mark.parametrize("text", ["only", "\nonly\n\n"])
def test_a_reason_is_said_once_and_cut(
    text: str, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError(text.replace("only", "only " + "x" * 1000))

    monkeypatch.setattr("laconic.ir.pt2.read_exported", fail)
    with pytest.raises(ModelError) as caught:
        read_pt2(exported)
    assert str(caught.value).count("only") == 1
    assert max(map(len, caught.value.why.splitlines())) < 250


def test_guards_and_notes_are_left_out(exported: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"

    def change(data: Any) -> None:
        data["guards_code"] = [code]
        data["graph_module"]["metadata"] = {"custom": "no json"}
        data["graph_module"]["graph"]["nodes"][0]["metadata"]["source_fn_stack"] = f"x,{code}"

    assert isinstance(read_pt2(edited(exported, tmp_path / "m.pt2", change)), Program)
    assert not marker.exists()


def test_what_is_no_pt2_is_said(exported: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.pt2"
    refused(file, ModelError, "cannot be read")
    file.write_bytes(pickle.dumps({"a": 1}))
    refused(file, UnsupportedError, "is a pickle")
    torch.save({"a": torch.ones(2)}, file)
    refused(file, UnsupportedError, "what torch.save writes")
    rewritten(exported, file, {"model/data.pkl": b"", "model/code/x.py": b""})
    refused(file, UnsupportedError, "TorchScript")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("version", "8.0")
        archive.writestr("serialized_state_dict.pt", b"")
    refused(file, ModelError, "damaged or no .pt2")
    rewritten(exported, file, {"model/data/aotinductor/model/a.so": b""})
    refused(file, UnsupportedError, "compiled code")
    rewritten(exported, file, {"model/models/second.json": b"{}"})
    refused(file, UnsupportedError, "2 models")
    rewritten(exported, file, {"model/models/model.json": None})
    refused(file, ModelError, "no models/NAME.json")
    file.write_bytes(b"")
    refused(file, ModelError, "damaged or no .pt2")


def test_odd_archives_are_refused(exported: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.pt2"
    refused(rewritten(exported, file, {}, zipfile.ZIP_DEFLATED), ModelError, "is compressed")
    refused(rewritten(exported, file, {"model/../../outside": b"x"}), ModelError, "outside")
    refused(rewritten(exported, file, {"/etc/outside": b"x"}), ModelError, "outside")
    refused(rewritten(exported, file, {"other/x": b"x"}), ModelError, "one folder")
    weight = "model/data/weights/weight_0"
    refused(rewritten(exported, file, {weight: None}), ModelError, "is missing")
    refused(
        rewritten(exported, file, {weight: members(exported)[weight][:-4]}), ModelError, "embed.weight", "cannot be"
    )
    with zipfile.ZipFile(exported) as archive:
        start, table = archive.getinfo(weight).header_offset, archive.start_dir
    content = bytearray(exported.read_bytes())
    content[start + 200] ^= 1
    file.write_bytes(content)
    refused(file, ModelError, "checksum", "weight_0")
    content[start + 200] ^= 1
    content[table + 42 : table + 46] = struct.pack("<I", 7)
    file.write_bytes(content)
    refused(file, ModelError, "not where its table says")
    assert not (tmp_path.parent / "outside").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(path_name="../../secret"), "no name of a member"),
        (lambda m: m["tensor_meta"].update(sizes=[{"as_int": 10**9}, {"as_int": 8}]), "cannot be"),
        (
            lambda m: m["tensor_meta"].update(sizes=[{"as_int": 2**50}, {"as_int": 8}], strides=[{"as_int": 0}] * 2),
            "says",
        ),
        (lambda m: m["tensor_meta"].update(sizes=[{"as_int": -1}, {"as_int": 8}]), "no size"),
        (lambda m: m["tensor_meta"].update(storage_offset={"as_int": 5}), "cannot be"),
        (lambda m: m["tensor_meta"].update(dtype=999), "dtype"),
        (lambda m: m["tensor_meta"].update(device={"type": "cuda", "index": 0}), "CPU"),
        (lambda m: m.pop("path_name"), "path_name"),
    ],
)
def test_tensors_lie_where_there_are_bytes(
    change: Callable[[Any], Any], said: str, exported: Path, tmp_path: Path
) -> None:
    table = "model/data/weights/model_weights_config.json"
    file = edited(exported, tmp_path / "m.pt2", lambda data: change(data["config"]["embed.weight"]), table)
    refused(file, ModelError, said)


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"sizes": 3}', '{"ranges": {"ids": [5, 1]}}', '{"ranges": {"ids": [0, NaN]}}', "[" * 10**5]
)
def test_damaged_notes_are_refused(text: str, exported: Path, tmp_path: Path) -> None:
    file = rewritten(exported, tmp_path / "m.pt2", {"model/extra/laconic.json": text.encode()})
    refused(file, ModelError, "extra/laconic.json")
