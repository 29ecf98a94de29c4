"""Models that see and read: their sides as entries of one Program, generation with images, and files of each entry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import laconic
from laconic.cli.main import run
from laconic.generate import generate
from laconic.generate.onnx import OnnxDecoder
from laconic.ir.entries import combine
from laconic.ir.errors import UnsupportedError, UsageError
from laconic.ir.hf_entries import capture_cached
from laconic.ir.hf_towers import capture_towers, placed
from laconic.ir.program import Program
from laconic.ir.run import evaluate
from laconic.model import Model
from laconic.models import datasets, trained
from laconic.models.canvas import GRID
from laconic.models.corpus import Split
from laconic.models.vlm import prompt

SIDES: Any = {
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"image_size": 32, "patch_size": 8, "projection_dim": 32},
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"vocab_size": 100, "max_position_embeddings": 16, "projection_dim": 32, "eos_token_id": 99},
}
IDS, PIXELS = torch.tensor([[5, 6, 7, 8, 99], [9, 8, 99, 1, 1]]), torch.randn(2, 3, 32, 32)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])


def pair(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made: Any = hf.CLIPModel(hf.CLIPConfig(**SIDES)) if kind == "clip" else hf.SiglipModel(hf.SiglipConfig(**SIDES))
    return made.eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def clip() -> laconic.Result:
    inputs = {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": MASK}
    return laconic.optimize(pair("clip"), "exact,dead-units,permute-units", inputs=inputs, towers=True)


def said(program: Program, name: str, *inputs: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = evaluate(program, program.entries[name], list(inputs)).results[0]
    return found


@pytest.mark.parametrize("kind", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_sides_of_a_pair_are_entries_over_one_table(kind: str) -> None:
    """Each gives what the model's own methods give, and adds no weight."""
    module: Any = pair(kind)
    program = laconic.capture(module, input_ids=IDS, pixel_values=PIXELS, attention_mask=MASK, towers=True)
    assert list(program.entries) == ["forward", "vision", "text"]
    alone = laconic.capture(module, input_ids=IDS, pixel_values=PIXELS, attention_mask=MASK)
    assert program.weight_bytes() == alone.weight_bytes()
    with torch.no_grad():
        image = module.get_image_features(pixel_values=PIXELS).pooler_output
        text = module.get_text_features(input_ids=IDS, attention_mask=MASK).pooler_output
    assert torch.equal(said(program, "vision", PIXELS), image)
    torch.testing.assert_close(said(program, "text", IDS, MASK), text, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sides_take_as_many_as_the_whole_does() -> None:
    module: Any = pair("clip")
    batch, texts = (torch.export.Dim(name, min=2, max=64) for name in ("images", "texts"))
    axes = {"input_ids": {0: texts}, "pixel_values": {0: batch}, "attention_mask": {0: texts}}
    inputs = {"input_ids": IDS, "pixel_values": PIXELS, "attention_mask": MASK}
    program = laconic.capture(module, **inputs, dynamic_shapes=axes, towers=True)
    more = torch.cat([PIXELS, PIXELS, PIXELS])
    with torch.no_grad():
        theirs = module.get_image_features(pixel_values=more).pooler_output
    torch.testing.assert_close(said(program, "vision", more), theirs, rtol=1e-5, atol=1e-5)
    assert said(program, "text", IDS.repeat(3, 1), MASK.repeat(3, 1)).shape[0] == 6


@pytest.mark.slow
def test_passes_rewrite_all_sides(clip: laconic.Result, tmp_path: Path) -> None:
    """What is saved has them, and each can be written as a file."""
    assert clip.report.verified
    loaded = laconic.load(clip.save(tmp_path / "out")).program
    plain = laconic.capture(pair("clip"), input_ids=IDS, pixel_values=PIXELS, attention_mask=MASK, towers=True)
    for name, inputs in (("vision", (PIXELS,)), ("text", (IDS, MASK))):
        torch.testing.assert_close(said(loaded, name, *inputs), said(plain, name, *inputs), rtol=1e-4, atol=1e-5)
    laconic.export_onnx(clip.program, tmp_path / "m.onnx", towers=True)
    assert {file.name for file in tmp_path.glob("*.onnx")} == {"m.vision.onnx", "m.text.onnx"}


def test_images_stand_where_their_token_does() -> None:
    """In order, whatever stands between; what is too many repeats the last."""
    words, features = torch.zeros(2, 5, 3), torch.arange(1.0, 13.0).reshape(2, 2, 3)
    where = torch.tensor([[0, 1, 0, 1, 0], [1, 1, 1, 0, 0]]).bool()
    found = placed(words, features, where)
    expected = torch.zeros(2, 5, 3)
    expected[0, 1], expected[0, 3] = features[0]
    expected[1, 0], expected[1, 1], expected[1, 2] = features[1, 0], features[1, 1], features[1, 1]
    assert torch.equal(found, expected)


def test_a_reader_of_images_says_what_the_model_says() -> None:
    """A random Llava, whose own forward cannot be captured: its number of image tokens is checked by value."""
    torch.manual_seed(0)
    text = SIDES["text_config"] | {"model_type": "llama", "pad_token_id": 0, "max_position_embeddings": 64}
    vision = SIDES["vision_config"] | {"model_type": "clip_vision_model"}
    config: Any = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=3, vision_feature_layer=-1)
    model = hf.LlavaForConditionalGeneration(config).eval()
    ids = torch.tensor([[1, *[3] * 16, 5, 6, 7], [1, 4, *[3] * 16, 5, 6]])
    program = combine(capture_towers(model, {"input_ids": ids, "pixel_values": PIXELS}))
    features = said(program, "vision", PIXELS)
    ours = said(program, "text", ids, torch.ones_like(ids), features)
    with torch.no_grad():
        theirs = model(input_ids=ids, pixel_values=PIXELS).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_has_no_sides_says_so() -> None:
    plain = nn.Linear(3, 4)
    with pytest.raises(UnsupportedError, match="Linear cannot be captured with the entries 'vision' and 'text'"):
        laconic.capture(plain, torch.randn(2, 3), towers=True)
    with pytest.raises(UsageError, match="either a cache or towers"):
        laconic.capture(plain, torch.randn(2, 3), towers=True, cache=(1, 8))
    program = laconic.capture(plain, torch.randn(2, 3))
    with pytest.raises(UsageError, match="the model has no entry 'vision'"):
        laconic.export_onnx(program, "m.onnx", towers=True)
    with pytest.raises(UsageError, match="captured already"):
        laconic.optimize(program, towers=True)


# Generation with images


@pytest.fixture(scope="module")
def vlm() -> Program:
    return laconic.capture("zoo:vlm", cache=(2, 240))


@pytest.mark.slow
def test_images_are_read_as_transformers_reads_them(vlm: Program, tmp_path: Path) -> None:
    """Token for token, from the entries, compiled, and in ONNX Runtime; the shorter prompt alone and padded."""
    drawn = datasets.draw(Split.SELECTION, GRID, 2)
    model: Any = trained.load("vlm")
    ids = prompt(2)
    prompts = [ids[0].tolist(), [*ids[1].tolist(), 16, 23]]
    theirs = []
    for row, own in enumerate(prompts):
        given = torch.tensor([own])
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        pixels = drawn.pixels[row : row + 1]
        out = model.generate(input_ids=given, pixel_values=pixels, attention_mask=torch.ones_like(given), **settings)
        theirs.append(out[0, len(own) :].tolist())
    result = laconic.optimize(vlm, "exact")
    assert result.report.verified
    asked: dict[str, Any] = {"pixel_values": drawn.pixels, "max_new_tokens": 12}
    ours = result.model.generate(prompts, **asked)
    assert ours[:, -12:].tolist() == theirs
    out = result.save(tmp_path / "out")
    compiled = laconic.load(out, compile=True, options={"strict": True})
    assert torch.equal(compiled.generate(prompts, **asked), ours)
    assert run(["export", str(out), "-o", str(tmp_path / "m.onnx"), "--with-past", "-q"]) == 0
    assert {f.name for f in tmp_path.glob("*.onnx")} == {"m.vision.onnx", "m.prefill.onnx", "m.decode.onnx"}
    assert torch.equal(generate(OnnxDecoder(tmp_path / "m.onnx"), prompts, **asked), ours)
    words: Any = {"max_new_tokens": 4}
    assert torch.equal(
        generate(OnnxDecoder(tmp_path / "m.onnx"), [[5, 6, 7]], **words), result.model.generate([[5, 6, 7]], **words)
    )


@pytest.mark.slow
def test_images_that_do_not_fit_are_refused_with_numbers(vlm: Program) -> None:
    model, ids, pixels = Model(vlm), prompt(2), torch.zeros(2, 3, 112, 112)
    for prompts, more, said in (
        (ids, {}, "prompt 0 has 196 image tokens"),
        (ids[:, 1:50], {"pixel_values": pixels}, "prompt 0 has 49 image tokens"),
        (ids, {"pixel_values": pixels[:1]}, r"pixel_values are \(1, 3, 112, 112\)"),
        (ids, {"pixel_values": pixels[:, :, :50]}, r"pixel_values are \(2, 3, 50, 112\)"),
    ):
        with pytest.raises(UsageError, match=said):
            model.generate(prompts, **more)
    with pytest.raises(UsageError, match="a cache of 100 tokens does not hold the 214 of the model's example"):
        laconic.capture("zoo:vlm", cache=(2, 100))
    source = trained.source("vlm")
    plain = laconic.capture(nn.Linear(3, 4), torch.randn(2, 3))
    with pytest.raises(UnsupportedError, match="its example has no pixel_values"):
        capture_cached(source.module, plain, batch=2, length=240)
