"""Hugging Face folders: seven architectures load and are captured, and each way in which a folder is wrong is named."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch.export import Dim

from laconic.ir.capture import capture_module
from laconic.ir.errors import LaconicError, MissingDependencyError, ModelError, UnsupportedError, UsageError
from laconic.ir.hf import load_folder, load_model
from laconic.ir.tensor_file import write_tensors

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}


def _bert() -> Any:
    return hf.BertModel(hf.BertConfig(**SMALL, max_position_embeddings=48))


def _gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def _llama() -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2))


def _t5() -> Any:
    sizes = {"d_model": 32, "num_layers": 1, "num_heads": 4, "d_kv": 8, "d_ff": 64, "vocab_size": 100}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes))


def _vit() -> Any:
    return hf.ViTModel(hf.ViTConfig(**SMALL, image_size=32, patch_size=8))


def _resnet() -> Any:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes))


def _whisper(kind: Any = hf.WhisperForConditionalGeneration, **changes: Any) -> Any:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 50, "num_mel_bins": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    places = {"max_source_positions": 10, "max_target_positions": 24}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return kind(hf.WhisperConfig(**sizes, **heads, **places, **tokens, **changes))


ARCHITECTURES: dict[str, tuple[Callable[[], Any], dict[str, int | None]]] = {
    "bert": (_bert, {"batch": None, "sequence": 48}),
    "gpt2": (_gpt2, {"batch": None, "sequence": 64}),
    "llama": (_llama, {"batch": None, "sequence": None}),
    "t5": (_t5, {"batch": None, "sequence": None, "decoder_sequence": None}),
    "vit": (_vit, {"batch": None}),
    "resnet": (_resnet, {"batch": None}),
    "whisper": (_whisper, {"batch": None, "decoder_sequence": 24}),
}


@pytest.fixture(autouse=True)
def quiet_saving() -> Iterator[None]:
    hf.logging.disable_progress_bar()
    yield
    hf.logging.enable_progress_bar()


def save(model: Any, path: Path, **options: Any) -> Path:
    model.save_pretrained(path, **options)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small BERT, to be spoilt."""
    torch.manual_seed(0)
    return save(_bert(), tmp_path / "bert")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in data.items() if v is not None}))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {k: v.clone() for k, v in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refused(error: type[LaconicError], path: Path, *said: str) -> LaconicError:
    with pytest.raises(error) as caught:
        load_folder(path)
    for text in said:
        assert text in str(caught.value), str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_loads_and_is_captured_with_named_axes(name: str, tmp_path: Path) -> None:
    make, axes = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = make().eval()
    source = load_folder(save(model, tmp_path / name))
    assert source.name == name
    assert type(source.module) is type(model)
    for key, value in model.state_dict().items():
        assert torch.equal(value, source.module.state_dict()[key]), key
    program = capture_module(source.module, source.args, source.kwargs, source.dynamic_shapes)
    assert {s.name: s.high for s in program.symbols.values()} == axes
    assert {s.low for s in program.symbols.values()} == {1}
    assert "specialized" not in program.facts
    assert program.facts["capture"]["bit_identical_cases"] >= 4


def test_text_inputs(tmp_path: Path) -> None:
    source = load_folder(save(_t5(), tmp_path / "t5"))
    assert {k: tuple(v.shape) for k, v in source.kwargs.items() if k != "use_cache"} == {
        "input_ids": (3, 7),
        "attention_mask": (3, 7),
        "decoder_input_ids": (3, 5),
    }
    assert source.kwargs["use_cache"] is False
    mask = source.kwargs["attention_mask"]
    assert mask.sum(1).max() == 7
    assert (mask[:, :-1] >= mask[:, 1:]).all()
    assert mask[:, 0].all()
    again = load_folder(tmp_path / "t5")
    other = load_folder(tmp_path / "t5", seed=1)
    assert torch.equal(source.kwargs["input_ids"], again.kwargs["input_ids"])
    assert not torch.equal(source.kwargs["input_ids"], other.kwargs["input_ids"])


def test_auto_dims(folder: Path) -> None:
    shapes = load_folder(folder).with_auto_dims().dynamic_shapes
    assert shapes["input_ids"][1] == Dim.AUTO(min=1, max=48)
    assert not any(isinstance(d, Dim) for axes in shapes.values() for d in axes.values())


def test_a_table_of_positions_bounds_the_sequence(tmp_path: Path) -> None:
    small = {**SMALL, "num_hidden_layers": 1}
    roberta = hf.RobertaModel(hf.RobertaConfig(**small, max_position_embeddings=10, pad_token_id=1))
    source = load_folder(save(roberta, tmp_path / "roberta"))
    assert source.dynamic_shapes["input_ids"][1].max == 8  # positions start after the padding index
    source.module(input_ids=torch.full((1, 8), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        source.module(input_ids=torch.full((1, 9), 5))


def test_sharded(tmp_path: Path) -> None:
    model = _llama()
    path = save(model, tmp_path / "sharded", max_shard_size="20KB")
    shards = sorted(path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_model(path).state_dict()["lm_head.weight"], model.state_dict()["lm_head.weight"])
    shards[0].unlink()
    refused(ModelError, path, "shards are missing", shards[0].name)
    (path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    refused(ModelError, path, "../other.safetensors")
    (path / "model.safetensors.index.json").write_text("{}")
    refused(ModelError, path, "no weight_map")


def test_dtype_is_that_of_the_files(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_tensors(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    assert load_model(folder).dtype == torch.bfloat16  # config.json still says float32
    edit_tensors(folder, lambda t: t.update({"pooler.dense.bias": t["pooler.dense.bias"].float()}))
    with caplog.at_level(logging.INFO, "laconic"):
        assert load_model(folder).dtype == torch.float32
    assert "all loaded as torch.float32" in caplog.text


def test_nothing_global_changes(folder: Path) -> None:
    level, seed = hf.logging.get_verbosity(), torch.initial_seed()
    hf.logging.enable_progress_bar()
    state = torch.get_rng_state()
    load_model(folder)
    assert hf.logging.is_progress_bar_enabled()
    (folder / "model.safetensors").unlink()
    refused(ModelError, folder)
    assert hf.logging.get_verbosity() == level
    assert hf.logging.is_progress_bar_enabled()
    assert torch.initial_seed() == seed
    assert torch.equal(torch.get_rng_state(), state)


def test_silent(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_folder(folder)
    assert capfd.readouterr() == ("", "")


def test_without_an_architecture_the_model_type_decides(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_config(folder, architectures=None)
    assert type(load_model(folder)) is hf.BertModel
    edit_config(folder, architectures=["NoSuchModel"])
    with caplog.at_level(logging.WARNING, "laconic"):
        assert type(load_model(folder)) is hf.BertModel
    assert "NoSuchModel" in caplog.text
    edit_config(folder, architectures=["BertModel"], model_type=None)
    assert type(load_model(folder)) is hf.BertModel


def test_names_that_are_no_models_are_not_used(folder: Path) -> None:
    edit_config(folder, architectures=["pipeline"])
    assert type(load_model(folder)) is hf.BertModel


def test_kernels_from_elsewhere_are_not_used(folder: Path) -> None:
    edit_config(folder, attn_implementation="someone/flash-kernels")
    assert load_model(folder).config._attn_implementation == "sdpa"


def test_missing_path(folder: Path) -> None:
    error = refused(UsageError, folder.parent / "bart", "did you mean 'bert'")
    assert error.exit_code == 2
    refused(UsageError, folder.parent / "no" / "such", "there is no folder")
    refused(UsageError, folder / "config.json", "is a file")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(ModelError, folder, "no config.json")
    refused(ModelError, folder.parent, "no config.json")


def test_config_in_a_folder_below(folder: Path) -> None:
    refused(ModelError, folder.parent, f"did you mean {folder}")


@pytest.mark.parametrize("text", ["{not json", "", "\ufffe{", "[1]"])
def test_config_is_not_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text, encoding="utf-16" if "\ufffe" in text else "utf-8")
    refused(ModelError, folder, "config.json", "JSON")


def test_unknown_model_type(folder: Path) -> None:
    edit_config(folder, model_type="brt", auto_map={"AutoModel": "code.Model"})
    (folder / "code.py").write_text("raise SystemExit('run')")
    error = refused(UnsupportedError, folder, "'brt'", "did you mean", "'bert'", "code of its own")
    assert error.exit_code == 4
    edit_config(folder, model_type=None, architectures=None)
    refused(UnsupportedError, folder, "names no model_type")


def test_config_that_builds_nothing(folder: Path) -> None:
    edit_config(folder, num_attention_heads=5)
    refused(ModelError, folder, "cannot build BertModel", "ValueError")
    edit_config(folder, num_attention_heads="many")
    refused(UnsupportedError, folder, "num_attention_heads")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"num_labels": 10**12}, "num_labels = 1000000000000"),
        ({"num_hidden_layers": 10**5}, "far larger model"),
        ({"hidden_size": 40 * 10**4}, "far larger model"),
        ({"vocab_size": 10**10}, "far larger model"),
    ],
)
def test_absurd_sizes_cost_nothing(folder: Path, change: dict[str, int], said: str) -> None:
    edit_config(folder, **change)
    refused(ModelError, folder, said, "config.json")


def test_weights_are_aligned_and_mapped_where_they_can_be(tmp_path: Path) -> None:
    torch.manual_seed(0)
    wide = hf.BertModel(hf.BertConfig(**{**SMALL, "vocab_size": 20000}, max_position_embeddings=48))
    path = save(wide, tmp_path / "wide")
    model = load_model(path)
    assert all(p.data_ptr() % 64 == 0 for p in model.parameters())
    tensors = {k: v.clone() for k, v in load_file(path / "model.safetensors").items()}
    write_tensors(path / "model.safetensors", tensors, {"format": "pt"})
    again = load_model(path)
    assert str(path / "model.safetensors") in Path("/proc/self/maps").read_text()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    before = (path / "model.safetensors").read_bytes()
    with torch.no_grad():
        again.embeddings.word_embeddings.weight.zero_()
    assert (path / "model.safetensors").read_bytes() == before


def test_quantised(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq"})
    refused(UnsupportedError, folder, "quantised", "gptq")
    edit_config(folder, quantization_config=None)
    edit_tensors(folder, lambda t: t.update({"pooler.dense.weight": t["pooler.dense.weight"].to(torch.float8_e4m3fn)}))
    refused(UnsupportedError, folder, "float8_e4m3fn")


def test_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(UnsupportedError, tmp_path, "adapter", "merge")


def test_pickled_weights_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(ModelError, folder, "no weights")
    torch.save({"a": torch.ones(1)}, folder / "pytorch_model.bin")
    refused(UnsupportedError, folder, "pickled weights are refused", "pytorch_model.bin", "save_pretrained")


def test_safetensors_under_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    refused(ModelError, folder, "model.fp16.safetensors", "name the file")


@pytest.mark.parametrize("kept", [0.0, 5.0, 8.0, 100.0, 0.02, 0.5, 0.999, -1.0])
def test_truncated(folder: Path, kept: float) -> None:
    """Cut at a byte (whole numbers, -1 from the end) or a fraction: in the length, the header and the tensors."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    size = int(kept) % len(data) if kept == int(kept) else int(kept * len(data))
    file.write_bytes(data[:size])
    error = refused(ModelError, folder, "model.safetensors is damaged", "expected", f"found {size}")
    assert error.exit_code == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d + b"more", "expected"),
        (lambda d: d[:8] + b"?" + d[9:], "header"),
        (lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS"),
        (lambda d: d.replace(b"F32", b"F99", 1), "F99"),
        (lambda d: (4).to_bytes(8, "little") + b"[1] ", "header"),
    ],
)
def test_corrupt(folder: Path, change: Callable[[bytes], bytes], said: str) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    refused(ModelError, folder, "model.safetensors is damaged", said)


@pytest.mark.parametrize("name", ["embeddings.word_embeddings.weight", "encoder.layer.1.output.LayerNorm.bias"])
def test_missing_tensor(folder: Path, name: str) -> None:
    edit_tensors(folder, lambda t: t.pop(name))
    refused(ModelError, folder, "1 weights of BertModel are not in the files", name)


def test_tied_weights_may_be_missing_but_not_both(tmp_path: Path) -> None:
    path = save(_gpt2(), tmp_path / "gpt2")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    model = load_model(path)
    assert model.lm_head.weight is model.transformer.wte.weight
    edit_tensors(path, lambda t: t.pop("transformer.wte.weight"))
    refused(ModelError, path, "transformer.wte.weight")


def test_missing_tensor_that_transformers_does_not_report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf.BertModel, "_keys_to_ignore_on_load_missing", ["pooler"])
    assert load_model(folder)
    edit_tensors(folder, lambda t: t.pop("pooler.dense.weight"))
    refused(ModelError, folder, "pooler.dense.weight")


def test_missing_step_counter(tmp_path: Path) -> None:
    path = save(_resnet(), tmp_path / "resnet")
    names = [n for n in load_file(path / "model.safetensors") if n.endswith("num_batches_tracked")]
    edit_tensors(path, lambda t: [t.pop(n) for n in names])
    assert names
    assert load_model(path)
    edit_tensors(path, lambda t: t.pop(names[0].replace("num_batches_tracked", "running_var")))
    refused(ModelError, path, "running_var")


def test_mismatched_shapes(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"pooler.dense.bias": torch.zeros(31)}))
    refused(ModelError, folder, "pooler.dense.bias: the file has (31,), the model (32,)")


def test_unused_tensors_are_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit_tensors(folder, lambda t: t.update({"extra.weight": torch.zeros(3)}))
    with caplog.at_level(logging.WARNING, "laconic"):
        load_model(folder)
    assert "extra.weight" in caplog.text


def test_neither_text_nor_images(tmp_path: Path) -> None:
    classifier = save(_whisper(hf.WhisperForAudioClassification), tmp_path / "w")
    refused(UnsupportedError, classifier, "WhisperForAudioClassification", "input_features", "package.module:callable")


def test_sound_of_the_length_that_the_encoder_wants(tmp_path: Path) -> None:
    source = load_folder(save(_whisper().bfloat16(), tmp_path / "w"))
    features = source.kwargs["input_features"]
    assert (tuple(features.shape), features.dtype) == ((3, 8, 20), torch.bfloat16)
    assert set(source.dynamic_shapes["input_features"]) == {0}
    assert source.kwargs["decoder_input_ids"].shape == (3, 5)
    assert source.kwargs["use_cache"] is False
    with torch.no_grad(), pytest.raises(ValueError, match="to be of length 20"):
        source.module(**{**source.kwargs, "input_features": features[..., :-1]})


def test_transformers_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(MissingDependencyError, folder, 'pip install "laconic-compiler[hf]"')
    assert error.exit_code == 5


def test_folder_is_not_written(folder: Path) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    copy = shutil.copytree(folder, folder.parent / "copy")
    load_folder(copy)
    assert {p.name: p.read_bytes() for p in copy.iterdir()} == before
