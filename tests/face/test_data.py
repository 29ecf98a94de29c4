"""Data as people name it, and what is said where it does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from architectures import llama, vit
from laconic.cli.main import run
from laconic.data.load import load_data
from laconic.data.named import NamedData, listed
from laconic.data.text import TextData, read_texts, windows
from laconic.ir.capture import capture_module
from laconic.ir.data import flat_inputs, refuse_overlap
from laconic.ir.errors import LaconicError, UsageError
from laconic.ir.metrics.quality import IGNORED
from laconic.ir.program import Program
from laconic.models import tokenizer
from laconic.schema import schema_of


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    model, inputs, axes = llama(2)
    return capture_module(model.eval(), (), inputs, axes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with the zoo's tokenizer, as a folder of transformers."""
    import transformers as hf

    path = tmp_path_factory.mktemp("model") / "llama"
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=tokenizer.VOCABULARY,
        max_position_embeddings=64,
    )
    hf.LlamaForCausalLM(config).save_pretrained(path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((tokenizer.FOLDER / name).read_bytes())
    return path


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, captured and saved once."""
    path = tmp_path_factory.mktemp("saved") / "out"
    assert run(["optimize", str(folder), "-o", str(path), "-p", "none", "-q"]) == 0
    return path


TEXTS = ["import os\n\n\ndef here() -> str:\n    return os.getcwd()\n" * 4, "class A:\n    pass\n", "x = 1\n" * 90]


def written(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": text, "group": f"g{k}"}) + "\n" for k, text in enumerate(texts)))
    return path


def test_each_token_is_predicted_once() -> None:
    cut = windows(list(range(10)), 4, "u")
    assert [w.ids for w in cut] == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    assert [t for w in cut for t in w.following] == [*range(1, 10), IGNORED]
    assert windows([3], 4, "u") == []


def test_text_in_batches(program: Program, tmp_path: Path) -> None:
    texts = read_texts(written(tmp_path / "a.jsonl"))
    torch.manual_seed(0)
    model, inputs, axes = llama(2, max_position_embeddings=64)
    model.resize_token_embeddings(tokenizer.VOCABULARY)
    wide = capture_module(model.eval(), (), inputs, axes)
    data = TextData("a", texts, tokenizer.FOLDER / "tokenizer.json", wide, batch=2)
    ids = [tokenizer.load().encode(text).ids for text in TEXTS]
    batches = [data.batch(k) for k in range(len(data))]
    assert sum(int(b.mask.sum()) for b in batches if b.mask is not None) == sum(map(len, ids))
    labels = torch.cat([b.labels[b.labels != IGNORED] for b in batches if b.labels is not None])
    assert sorted(labels.tolist()) == sorted(token for row in ids for token in row[1:])
    assert {unit for b in batches for unit in b.units} == {"g0", "g1", "g2"}
    assert max(b.inputs["input_ids"].shape[1] for b in batches) == 64
    for k, batch in enumerate(batches):
        flat_inputs(wide, batch, data.place(k))
        assert batch.mask is not None
        assert torch.equal(batch.inputs["attention_mask"].bool(), batch.mask)


def test_another_models_tokenizer_is_told(program: Program, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"not this model's: it says .* knows 100"):
        load_data(str(written(tmp_path / "a.jsonl")), program, folder=tokenizer.FOLDER, split="test")


def test_a_fixed_batch_and_length_are_filled_up(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs, _ = llama(2)
    model.resize_token_embeddings(tokenizer.VOCABULARY)
    fixed = capture_module(model.eval(), (), inputs)
    data = TextData("a", read_texts(written(tmp_path / "a.jsonl")), tokenizer.FOLDER / "tokenizer.json", fixed)
    for k in range(len(data)):
        assert flat_inputs(fixed, data.batch(k), data.place(k))[0].shape == (3, 7)
    last = data.batch(len(data) - 1)
    assert last.labels is not None
    assert "" in last.units or len(set(last.units)) <= 3


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"text": "a b"}\nnot json\n', "a.jsonl:2"),
        ("a.jsonl", '{"words": "a b"}\n', "a.jsonl:1"),
        ("a.jsonl", '{"text": 3}\n', "must be a string"),
        ("a.jsonl", "", "holds no tokens"),
        ("a.txt", "", "holds no tokens"),
        ("a.csv", "a,b\n", "there is no data"),
    ],
)
def test_text_that_is_none(program: Program, tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(LaconicError) as caught:
        load_data(str(tmp_path / name), program, folder=tokenizer.FOLDER, split="test")
    assert said in str(caught.value)


def test_text_as_people_keep_it(tmp_path: Path) -> None:
    """What JSON strings may hold, and rules of dashes anywhere."""
    odd = "a\u2028b\u0085c"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": odd}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [text.text for text in read_texts(tmp_path / "a.jsonl")] == [odd]
    (tmp_path / "a.txt").write_text("---\none\n---\ntwo ---\n---", encoding="utf-8")
    assert [text.text.strip() for text in read_texts(tmp_path / "a.txt")] == ["one", "two ---"]
    (tmp_path / "b.txt").write_bytes("äöü".encode("latin-1"))
    with pytest.raises(UsageError, match="is no UTF-8"):
        read_texts(tmp_path / "b.txt")
    (tmp_path / "b.jsonl").write_text('{"text": "\\ud800"}\n')
    with pytest.raises(UsageError, match="must be an object"):
        read_texts(tmp_path / "b.jsonl")


def test_a_smaller_tokenizer_is_not_the_models(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs, axes = llama(2)
    model.resize_token_embeddings(2 * tokenizer.VOCABULARY)
    wide = capture_module(model.eval(), (), inputs, axes)
    with pytest.raises(UsageError, match="it has 2048 tokens, and the model knows 4096"):
        load_data(str(written(tmp_path / "a.jsonl")), wide, folder=tokenizer.FOLDER, split="test")


def test_samples_are_known_again_however_they_come(program: Program, tmp_path: Path) -> None:
    ids, ones = torch.randint(0, 100, (5, 6)), torch.ones(5, 6, dtype=torch.long)
    save_file({"input_ids": ids, "attention_mask": ones}, tmp_path / "a.safetensors")
    one = load_data(tmp_path / "a.safetensors", program, split="test")
    parts = [{"input_ids": ids[part], "attention_mask": ones[part]} for part in (slice(0, 2), slice(2, 5))]
    other = listed("parts", parts)
    assert one.samples == other.samples == listed("whole", [{"input_ids": ids, "attention_mask": ones}]).samples
    assert len(one.samples) == 5
    with pytest.raises(UsageError, match="overlaps the calibration set"):
        refuse_overlap(one, other)
    masked = [part | {"mask": torch.arange(6).expand(len(part["input_ids"]), -1) < 3} for part in parts]
    assert listed("parts", masked).digest != other.digest
    halves = {"input_ids": ids.reshape(10, 3), "attention_mask": ones.reshape(10, 3)}
    assert NamedData("a", halves, inputs=list(halves)).digest != NamedData("a", parts[0], inputs=list(halves)).digest


def test_an_input_may_be_called_mask() -> None:
    (batch,) = listed("a", [{"x": torch.zeros(2, 3), "mask": torch.ones(2, 3)}], ["x", "mask"])
    assert batch.inputs.keys() == {"x", "mask"}
    assert batch.mask is None
    with pytest.raises(UsageError, match="returned a dict"):
        listed("a", {"x": torch.zeros(2, 3)})


def test_text_needs_a_tokenizer(program: Program, tmp_path: Path) -> None:
    path = str(written(tmp_path / "a.jsonl"))
    with pytest.raises(UsageError, match="no tokenizer"):
        load_data(path, program, split="test")
    with pytest.raises(UsageError, match="there is no tokenizer"):
        load_data(path, program, folder=tmp_path, split="test")


@pytest.mark.parametrize("kind", [".safetensors", ".npz"])
def test_named_tensors(program: Program, tmp_path: Path, kind: str) -> None:
    tensors = {"input_ids": torch.randint(0, 100, (5, 6)), "attention_mask": torch.ones(5, 6, dtype=torch.long)}
    tensors["labels"] = torch.randint(0, 100, (5, 6))
    path = tmp_path / f"a{kind}"
    if kind == ".npz":
        np.savez(path, **{name: value.numpy() for name, value in tensors.items()})
    else:
        save_file(tensors, path)
    data = load_data(str(path), program, split="test", batch=2)
    assert len(data) == 3
    assert torch.equal(data.batch(2).inputs["input_ids"], tensors["input_ids"][4:])
    labels = data.batch(1).labels
    assert labels is not None
    assert torch.equal(labels, tensors["labels"][2:4])
    assert len(data.samples) == 5


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"input_ids": torch.zeros(3, 4, dtype=torch.long)}, "no values for the input 'attention_mask'"),
        ({"ids": torch.zeros(3, 4, dtype=torch.long)}, "'ids', which the model does not take"),
        (
            {"input_ids": torch.zeros(3, 4), "attention_mask": torch.zeros(3, 4, dtype=torch.long)},
            "input 'input_ids' must be i64",
        ),
        (
            {"input_ids": torch.zeros(3, 4, dtype=torch.long), "attention_mask": torch.zeros(3, 5, dtype=torch.long)},
            "input 'attention_mask' must be",
        ),
        (
            {"input_ids": torch.zeros(3, 4, dtype=torch.long), "attention_mask": torch.zeros(2, 4, dtype=torch.long)},
            "different numbers of samples",
        ),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, "is empty"),
    ],
)
def test_wrong_keys_and_shapes(program: Program, tmp_path: Path, tensors: dict[str, torch.Tensor], said: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors")

    def read() -> None:
        data = load_data(str(tmp_path / "a.safetensors"), program, split="test")
        flat_inputs(program, data.batch(0), data.place(0))

    with pytest.raises(UsageError) as caught:
        read()
    assert said in str(caught.value)


def test_a_damaged_file_and_a_pickle(program: Program, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(UsageError, match="cannot be read"):
        load_data(str(tmp_path / "a.safetensors"), program, split="test")
    np.savez(tmp_path / "b.npz", input_ids=np.array([{}], dtype=object))
    with pytest.raises(UsageError, match="cannot be read"):
        load_data(str(tmp_path / "b.npz"), program, split="test")


def test_a_folder_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    model, inputs, axes = vit(2)
    program = capture_module(model.eval(), (), inputs, axes)
    size = inputs["pixel_values"].shape[-1]
    for name, shade in (("cats/a.png", 0), ("cats/b.png", 255), ("dogs/c.png", 51)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        image.new("RGB", (40, 30), (shade, shade, shade)).save(tmp_path / name)
    data = load_data(str(tmp_path), program, split="test")
    batch = data.batch(0)
    assert batch.inputs["pixel_values"].shape == (3, 3, size, size)
    assert batch.inputs["pixel_values"].amax((1, 2, 3)).tolist() == pytest.approx([-1.0, 1.0, -0.6])
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 0, 1]
    flat_inputs(program, data.batch(0), data.place(0))
    _as_the_processor_has_them(tmp_path, program, size)
    (tmp_path / "cats" / "d.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="no image that can be read"):
        load_data(str(tmp_path), program, split="test")


def _as_the_processor_has_them(path: Path, program: Program, size: int) -> None:
    from PIL import Image
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    for changed in ({}, {"resample": 3, "image_mean": [0.1, 0.2, 0.3]}, {"do_normalize": False}, {"do_rescale": False}):
        processor = ViTImageProcessorPil(size={"height": size, "width": size}, **changed)
        processor.save_pretrained(path)
        found = load_data(str(path), program, folder=path, split="test").batch(0).inputs["pixel_values"]
        images = [Image.open(file) for file in sorted(path.rglob("*.png"))]
        assert torch.equal(found, processor(images=images, return_tensors="pt")["pixel_values"].float())
    (path / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor", "image_mean": "x"}')
    with pytest.raises(UsageError, match="as the model's settings say"):
        load_data(str(path), program, folder=path, split="test")


def test_eval_on_data(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(written(tmp_path / "a.jsonl"))
    line = ["eval", str(saved), "--data", path, "--against", str(saved), "-q"]
    assert run([*line, "--metric", "nats", "--metric", "kl", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    jsonschema.validate(document, schema_of("eval"))
    nats, kl = document["figures"]
    assert 7.3 < nats["value"] < 8.0
    assert nats["low"] <= nats["value"] <= nats["high"]
    assert nats["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert (kl["value"], "against" in kl) == (0.0, False)
    assert run(line) == 0
    assert "difference" in capfd.readouterr().out


@pytest.mark.slow
def test_a_saved_dir_remembers_where_its_tokenizer_is(
    saved: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["eval", str(saved), "--data", str(written(tmp_path / "a.jsonl")), "--against", str(folder), "-q", "--json"]
    assert run(line) == 0
    figures = json.loads(capfd.readouterr().out)["figures"]
    assert all(row["difference"]["value"] == 0.0 for row in figures)


def test_eval_refuses_what_was_calibrated_on(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one, other = written(tmp_path / "a.jsonl"), written(tmp_path / "b.jsonl", [TEXTS[1], "y = 2\n" * 9])
    assert run(["eval", str(saved), "--data", str(one), "--calibration", str(other), "-q"]) == 2
    assert "overlaps the calibration set" in capfd.readouterr().err
    apart = written(tmp_path / "c.jsonl", ["y = 2\n" * 9])
    assert run(["eval", str(saved), "--data", str(one), "--calibration", str(apart), "-q"]) == 0


def test_optimize_tells_metrics_after_each_pass(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["optimize", str(saved), "--data", str(written(tmp_path / "a.jsonl")), "--metric", "nats", "--metric", "kl"]
    assert run([*line, "--max-drop", "0", "-o", str(tmp_path / "out"), "--json", "-q"]) == 0
    document = json.loads(capfd.readouterr().out)
    jsonschema.validate(document, schema_of("optimize"))
    assert document["before"]["metrics"]["nats"] > 7
    for row in document["passes"]:
        assert row["after"]["metrics"] == document["before"]["metrics"]
        assert row["after"]["kl"] == 0.0
    assert run([*line, "--dry-run", "-q"]) == 0
    assert "nats" in capfd.readouterr().out


def test_a_drop_that_is_not_allowed_writes_nothing(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("laconic.figures.Judge.drop", lambda self, before, after: 0.25)
    line = ["optimize", str(saved), "--data", str(written(tmp_path / "a.jsonl")), "-o", str(tmp_path / "out"), "-q"]
    assert run([*line, "--max-drop", "0.2"]) == 3
    assert "kl gets worse by 0.25, more than 0.2" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run([*line, "--max-drop", "0.3"]) == 0


def test_optimize_refuses_what_it_decides_on(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = str(written(tmp_path / "a.jsonl"))
    assert run(["optimize", str(saved), "--data", path, "--calibration", path, "--dry-run", "-q"]) == 2
    assert "overlaps the calibration set" in capfd.readouterr().err
    assert run(["optimize", str(saved), "--max-drop", "0.1", "--dry-run", "-q"]) == 2
    assert "--max-drop says nothing without data" in capfd.readouterr().err
    assert run(["optimize", str(saved), "--calibration", path, "--dry-run", "-q"]) == 2
    assert "--calibration says nothing without data" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--metric", "nats"], "measured on data"),
        (["--metric", "nat"], "there is no metric 'nat'"),
        (["--data", "zoo:llama-mha:tests"], "no split 'tests'"),
        (["--data", "zoo:llama:test"], "no data zoo:llama"),
        (["--data", "zoo:vit:test"], "does not take"),
        (["--calibration", "a.jsonl"], "says nothing without data"),
    ],
)
def test_slips(saved: Path, capfd: pytest.CaptureFixture[str], more: list[str], said: str) -> None:
    assert run(["eval", str(saved), *more, "-q"]) == 2
    assert said in capfd.readouterr().err


@pytest.mark.slow
def test_two_processes_have_the_sums_of_one(saved: Path, tmp_path: Path) -> None:
    path = str(written(tmp_path / "a.jsonl"))
    line = ["audit", str(saved), "--calibration", path, "--batch", "2", "--threads", "1", "-q", "--json"]

    def found(*start: str) -> Any:
        import os

        env = os.environ | {"LACONIC_CACHE_DIR": str(tmp_path / "-".join(start[-1:]).replace("/", "_"))}
        done = subprocess.run([sys.executable, *start, "laconic", *line], capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["redundancy"]

    one = found("-m")
    two = found("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    assert len(one) == len(two) > 5
    for ours, theirs in zip(one, two, strict=True):
        assert ours["name"] == theirs["name"]
        here, there = ({(row["what"], row["where"]): row["score"] for row in t["findings"]} for t in (ours, theirs))
        shared = here.keys() & there.keys()  # lists end somewhere, and what ties there may be either
        assert len(shared) >= 0.9 * max(len(here), len(there))
        assert {key: here[key] for key in shared} == pytest.approx(
            {key: there[key] for key in shared}, rel=1e-6, abs=1e-9
        )
