"""Generation: transformers' own tokens, whatever the lengths of prompts; what does not fit is refused with numbers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from safetensors import safe_open
from torch import nn

import laconic
from architectures import BATCH as BATCHES
from architectures import EIGHT, TARGET, Case, gpt2, llama, local_by_turns, qwen3_moe, t5, text
from helpers import sampled
from laconic.cli.main import run
from laconic.generate import generate
from laconic.generate.onnx import OnnxDecoder
from laconic.ir.capture import capture_module
from laconic.ir.entries import combine
from laconic.ir.errors import UnsupportedError, UsageError
from laconic.ir.hf_entries import capture_cached
from laconic.ir.program import Kind
from laconic.model import Model

BATCH, LENGTH, NEW = 3, 24, 12
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 11, 12], [4]]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}


def small(config: Any, model: Any, **more: Any) -> Callable[[], Case]:
    def make() -> Case:
        module = model(config(**SMALL, max_position_embeddings=64, pad_token_id=0, **more))
        return module, *text(use_cache=False)

    return make


MODELS: dict[str, Callable[[], Case]] = {
    "llama": llama,
    "gpt2": gpt2,
    "qwen3_moe": qwen3_moe,
    "gemma3": local_by_turns,
    "mistral": small(
        hf.MistralConfig, hf.MistralForCausalLM, num_key_value_heads=2, intermediate_size=64, sliding_window=6
    ),
    "opt": small(hf.OPTConfig, hf.OPTForCausalLM, ffn_dim=64, word_embed_proj_dim=32),
    "qwen2": small(hf.Qwen2Config, hf.Qwen2ForCausalLM, num_key_value_heads=2, intermediate_size=64),
    "neox": small(hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, intermediate_size=64),
    "falcon": small(hf.FalconConfig, hf.FalconForCausalLM, multi_query=True, new_decoder_architecture=False),
    "deepseek": small(
        hf.DeepseekV3Config,
        hf.DeepseekV3ForCausalLM,
        **{"num_key_value_heads": 4, "intermediate_size": 64, "moe_intermediate_size": 16, "n_routed_experts": 4},
        **{"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "kv_lora_rank": 16, "q_lora_rank": 16},
        **{"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 4, "first_k_dense_replace": 1},
    ),
    "phi3": small(hf.Phi3Config, hf.Phi3ForCausalLM, num_key_value_heads=2, intermediate_size=64),
}


def made(name: str) -> tuple[nn.Module, laconic.Result]:
    torch.manual_seed(0)
    module, inputs, axes = MODELS[name]()
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(3)  # so that tokens differ
    result = laconic.optimize(module.eval(), inputs=inputs, dynamic_shapes=axes, cache=(BATCH, LENGTH))
    assert result.report.verified
    return module, result


@pytest.fixture(scope="module")
def decoder() -> tuple[nn.Module, laconic.Result]:
    return made("llama")


def theirs(module: Any, prompts: list[list[int]], new: int = NEW, **settings: Any) -> list[list[int]]:
    """What transformers' own greedy generation gives for each prompt, one by one: what it adds, or the answer to a
    source with the token that it starts with."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            **({"eos_token_id": None, "pad_token_id": 0} | settings),
        )
        found.append(out[0, 0 if module.config.is_encoder_decoder else len(prompt) :].tolist())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    """Prompts of different length in one batch, each as transformers continues it alone."""
    module, result = made(name)
    ours = result.model.generate(PROMPTS, max_new_tokens=NEW)
    assert ours[:, -NEW:].tolist() == theirs(module, PROMPTS)
    width = max(map(len, PROMPTS))
    padded = [[0] * (width - len(p)) + p for p in PROMPTS]
    assert ours[:, :-NEW].tolist() == padded


def test_a_batch_is_its_prompts_one_by_one(decoder: tuple[nn.Module, laconic.Result]) -> None:
    module, result = decoder
    together = result.model.generate(PROMPTS, max_new_tokens=NEW)[:, -NEW:].tolist()
    assert together == [result.model.generate([p], max_new_tokens=NEW)[0, -NEW:].tolist() for p in PROMPTS]
    assert together == theirs(module, PROMPTS)
    assert together[:2] == result.model.generate(PROMPTS[:2], max_new_tokens=NEW)[:, -NEW:].tolist()


def test_prompts_as_a_tensor_padded_on_either_side(decoder: tuple[nn.Module, laconic.Result]) -> None:
    _, result = decoder
    expected = result.model.generate(PROMPTS, max_new_tokens=NEW)
    width = max(map(len, PROMPTS))
    for left in (True, False):
        pads = [[0] * (width - len(p)) for p in PROMPTS]
        ids = torch.tensor([q + p if left else p + q for p, q in zip(PROMPTS, pads, strict=True)])
        mask = torch.tensor(
            [
                [0] * len(q) + [1] * len(p) if left else [1] * len(p) + [0] * len(q)
                for p, q in zip(PROMPTS, pads, strict=True)
            ]
        )
        assert torch.equal(result.model.generate(ids, attention_mask=mask, max_new_tokens=NEW), expected)


def test_logits_of_a_padded_batch_are_those_of_single_runs(decoder: tuple[nn.Module, laconic.Result]) -> None:
    _, result = decoder
    seen: list[torch.Tensor] = []

    def keep(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        return scores

    result.model.generate(PROMPTS, max_new_tokens=4, logits_processor=[keep])
    together, seen[:] = list(seen), []
    for row, prompt in enumerate(PROMPTS):
        result.model.generate([prompt], max_new_tokens=4, logits_processor=[keep])
        for a, b in zip(together, seen, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=1e-5, atol=1e-5)
        seen.clear()


@pytest.mark.slow
def test_penalties_are_of_the_prompt_and_not_of_its_padding(decoder: tuple[nn.Module, laconic.Result]) -> None:
    module, result = decoder
    for penalty in (1.3, 2.0):
        ours = result.model.generate(PROMPTS, max_new_tokens=NEW, repetition_penalty=penalty)
        assert ours[:, -NEW:].tolist() == theirs(module, PROMPTS, repetition_penalty=penalty)


def test_prompts_criteria_and_ends_of_other_types(decoder: tuple[nn.Module, laconic.Result]) -> None:
    """Arrays and tensors as prompts, criteria that say one thing of all, ends as a tensor, no token that pads."""
    _, result = decoder
    plain = result.model.generate(PROMPTS, max_new_tokens=NEW)
    others: list[Any] = [[torch.tensor(p) for p in PROMPTS], [np.array(p) for p in PROMPTS], tuple(map(tuple, PROMPTS))]
    for prompts in others:
        assert torch.equal(result.model.generate(prompts, max_new_tokens=NEW, pad_token_id=None), plain)
    nine: list[Any] = [[lambda ids, _: ids.shape[1] >= 9], hf.MaxLengthCriteria(9)]
    for criteria in nine:
        stopped = result.model.generate(PROMPTS, max_new_tokens=NEW, stopping_criteria=criteria)
        assert torch.equal(stopped, plain[:, :9])
    end: Any = plain[0, -NEW]
    assert torch.equal(*(result.model.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=e) for e in (end, [int(end)])))


def test_a_sequence_ends_and_is_padded(decoder: tuple[nn.Module, laconic.Result]) -> None:
    module, result = decoder
    plain = result.model.generate(PROMPTS, max_new_tokens=NEW)[:, -NEW:]
    end = int(plain[0, 4])
    ours = result.model.generate(PROMPTS, max_new_tokens=NEW, eos_token_id=end, pad_token_id=99)
    for row, wanted in zip(ours[:, 7:].tolist(), theirs(module, PROMPTS, eos_token_id=end), strict=True):
        assert row[: len(wanted)] == wanted
        assert set(row[len(wanted) :]) <= {99}


def test_sampling_is_drawn_by_a_seed(decoder: tuple[nn.Module, laconic.Result]) -> None:
    _, result = decoder
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": True, "temperature": 1.5}
    first, again, other = (result.model.generate(PROMPTS, seed=s, **settings) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    greedy = result.model.generate(PROMPTS, max_new_tokens=NEW)
    assert torch.equal(result.model.generate(PROMPTS, seed=1, top_k=1, **settings), greedy)
    assert torch.equal(result.model.generate(PROMPTS, seed=1, top_p=1e-6, **settings), greedy)


def test_parts_of_transformers_are_used(decoder: tuple[nn.Module, laconic.Result]) -> None:
    _, result = decoder
    plain = result.model.generate(PROMPTS, max_new_tokens=NEW)
    banned = int(plain[0, -NEW])
    other = result.model.generate(
        PROMPTS, max_new_tokens=NEW, logits_processor=[hf.NoBadWordsLogitsProcessor([[banned]], eos_token_id=None)]
    )
    assert banned not in other[:, -NEW:]
    stopped = result.model.generate(PROMPTS, max_new_tokens=NEW, stopping_criteria=[hf.MaxLengthCriteria(7 + 5)])
    assert torch.equal(stopped, plain[:, : 7 + 5])
    seen: list[list[int]] = []
    result.model.generate(PROMPTS, max_new_tokens=NEW, streamer=lambda token: seen.append(token.tolist()))
    assert torch.tensor(seen).t().tolist() == plain[:, -NEW:].tolist()

    class Words:  # only so much of a tokenizer as a streamer needs
        def decode(self, ids: list[int], **settings: Any) -> str:
            return " ".join(map(str, ids)) + "\n"

    found: list[str] = []
    streamer = hf.TextStreamer(Words(), skip_prompt=True)
    streamer.on_finalized_text = lambda words, stream_end=False: found.append(words)
    one = result.model.generate(PROMPTS[:1], max_new_tokens=4, streamer=streamer)
    assert "".join(found).split() == [str(int(token)) for token in one[0, -4:]]


def test_caches_are_as_large_as_computed_and_kept_apart(decoder: tuple[nn.Module, laconic.Result]) -> None:
    """Two layers of keys and values, two heads of width 8, 4 bytes each; whoever generates has caches of his own."""
    _, result = decoder
    assert result.model.decoding().cache_bytes == 2 * 2 * BATCH * 2 * LENGTH * 8 * 4
    assert result.report.after.cache_bytes_per_token == 2 * 2 * 2 * 8 * 4
    one, two = result.model, Model(result.program)
    assert torch.equal(*(m.generate(PROMPTS, max_new_tokens=NEW) for m in (one, two)))
    assert all(not w.value.any() for w in result.program.weights.values() if w.kind is Kind.STATE)


def test_what_is_saved_generates(decoder: tuple[nn.Module, laconic.Result], tmp_path: Path) -> None:
    _, result = decoder
    out = result.save(tmp_path / "out")
    loaded: Any = laconic.load(out)
    assert torch.equal(loaded.generate(PROMPTS, max_new_tokens=NEW), result.model.generate(PROMPTS, max_new_tokens=NEW))
    with safe_open(out / "weights.safetensors", "pt") as stored:  # empty caches are not stored
        assert set(stored.keys()) == {n for n, w in result.program.weights.items() if w.kind is not Kind.STATE}


@pytest.mark.slow
def test_axes_of_caches_shrink_with_their_heads() -> None:
    """One of two groups of heads adds nothing in any layer: its keys and values are cached no more."""
    torch.manual_seed(0)
    module, inputs, axes = llama()
    with torch.no_grad():
        for layer in module.model.layers:
            layer.self_attn.v_proj.weight[8:] = 0
    before = laconic.optimize(module.eval(), "none", inputs=inputs, dynamic_shapes=axes, cache=(BATCH, LENGTH))
    after = laconic.optimize(before.program, "dead-units,permute-units")
    assert after.report.verified
    assert after.report.after.cache_bytes_per_token == before.report.after.cache_bytes_per_token / 2
    assert after.model.decoding().cache_bytes == before.model.decoding().cache_bytes // 2
    assert torch.equal(*(r.model.generate(PROMPTS, max_new_tokens=NEW) for r in (before, after)))


# Compiled


@pytest.mark.slow
def test_nothing_is_compiled_again_over_two_hundred_steps(tmp_path: Path) -> None:
    """Prompts of three lengths and 200 tokens, by one compilation of each entry."""
    torch.manual_seed(0)
    module, inputs, axes = llama(max_position_embeddings=256)
    result = laconic.optimize(module.eval(), inputs=inputs, dynamic_shapes=axes, cache=(BATCH, 216))
    model = laconic.load(result.save(tmp_path / "out"), compile=True, options={"strict": True})
    ours = model.generate(PROMPTS, max_new_tokens=200)
    assert ours.shape == (BATCH, 7 + 200)
    assert torch.equal(ours, result.model.generate(PROMPTS, max_new_tokens=200))
    compiled: Any = model.decoding()
    counted = dict(torch._dynamo.utils.counters["inductor"])
    for prompts in (PROMPTS[:1], [[3, 4, 5, 6, 7, 8, 9, 10, 11]]):
        assert torch.equal(*(m.generate(prompts, max_new_tokens=5) for m in (model, result.model)))
    assert {name: len(entry._variants) for name, entry in compiled.compiled.items()} == {"prefill": 1, "decode": 1}
    assert dict(torch._dynamo.utils.counters["inductor"]) == counted


# Through ONNX Runtime


@pytest.mark.parametrize("name", sampled(["llama", "gpt2", "qwen2", "opt"], 4))
def test_onnx_runtime_gives_the_same_tokens(
    name: str, tmp_path: Path, decoder: tuple[nn.Module, laconic.Result]
) -> None:
    """The same loop on the exported files, whose caches are inputs and outputs."""
    module, result = decoder if name == "llama" else made(name)
    laconic.export_onnx(result.program, tmp_path / "m.onnx", with_past=True)
    assert {file.name for file in tmp_path.iterdir()} == {"m.prefill.onnx", "m.decode.onnx"}
    runtime = OnnxDecoder(tmp_path / "m.onnx")
    ours = generate(runtime, PROMPTS, max_new_tokens=NEW)
    assert ours[:, -NEW:].tolist() == theirs(module, PROMPTS)
    assert runtime.cache_bytes == result.model.decoding().cache_bytes
    assert torch.equal(generate(runtime, PROMPTS[::-1], max_new_tokens=NEW), ours.flip(0))  # it forgets


def test_the_past_of_a_model_without_one_is_refused(tmp_path: Path) -> None:
    program = capture_module(nn.Linear(3, 4), (torch.randn(2, 3),), {})
    with pytest.raises(UsageError, match="has no entry 'decode', so there is no past to write"):
        laconic.export_onnx(program, tmp_path / "m.onnx", with_past=True)
    with pytest.raises(UsageError, match="there is no"):
        OnnxDecoder(tmp_path / "m.onnx")


# On the command line


def test_a_cache_on_the_command_line_is_two_numbers(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for size in ("2", "0x8", "2x", "2x8x3"):
        assert run(["optimize", "zoo:minilm", "-o", str(tmp_path / "out"), "--cache", size, "-q"]) == 2
        assert "sequences and tokens, e.g. --cache 4x2048" in capfd.readouterr().err


@pytest.mark.slow
def test_the_command_line_captures_with_a_cache(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, onnx = str(tmp_path / "out"), str(tmp_path / "m.onnx")
    assert run(["optimize", "zoo:llama-gqa", "-o", out, "--cache", "2x32", "-q"]) == 0
    capfd.readouterr()
    assert run(["export", out, "-o", onnx, "--with-past", "--json", "-q"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert [Path(path).name for path in told["paths"]] == ["m.prefill.onnx", "m.decode.onnx"]
    loaded: Any = laconic.load(out)
    prompts = [[5, 6, 7], [300, 12]]
    expected = loaded.generate(prompts, max_new_tokens=8)
    assert torch.equal(generate(OnnxDecoder(onnx), prompts, max_new_tokens=8), expected)
    capfd.readouterr()
    for arguments, said in [
        (["export", out, "-o", onnx, "--cache", "2x32"], "is captured already"),
        (["export", "zoo:minilm", "-o", onnx, "--with-past", "--cache", "1x8"], "cannot be captured with a cache"),
        (["export", out, "-o", str(tmp_path / "m.pt2"), "--with-past"], "--with-past is for ONNX"),
        (["export", out, "-o", onnx, "--with-past"], "exists"),
    ]:
        assert run([*arguments, "-q"]) in (2, 4)
        assert said in capfd.readouterr().err


# What does not fit


@pytest.mark.parametrize(
    ("settings", "what", "hint"),
    [
        ({"prompts": [list(range(2, 40))]}, "the longest prompt has 38 tokens, and the cache holds 24", "longer cache"),
        ({"prompts": [[1]] * 4}, "there are 4 prompts, and the cache holds 3", "larger cache"),
        ({"prompts": [[1, 2]], "max_new_tokens": 40}, "need a cache of 41", "max_new_tokens=23"),
        ({"prompts": [[1], []]}, "there is no prompt, or an empty one", "one token at least"),
        ({"prompts": []}, "there is no prompt, or an empty one", "one token at least"),
        ({"prompts": [[1]], "max_new_tokens": 0}, "max_new_tokens is 0", "one token at least"),
        ({"prompts": torch.ones(3, dtype=torch.long)}, "prompts are (3,)", "(sequences, tokens)"),
        ({"prompts": torch.ones(2, 3)}, "prompts are (2, 3) of torch.float32", "token ids"),
        ({"prompts": torch.ones(0, 3, dtype=torch.long)}, "there is no prompt", "one token at least"),
        ({"prompts": [1, 2, 3]}, "a prompt is a int, and no list of token ids", "[[5, 6, 7], [9, 8]]"),
        ({"prompts": ["once", "upon"]}, "a prompt is a str", "a tokenizer makes them of text"),
        ({"prompts": [[1.5, 2]]}, "a prompt is a list, and no list of token ids", "tokenizer"),
        ({"prompts": [[1, 100]]}, "does not know the token 100 of prompts", "from 0 to 99"),
        ({"prompts": [[-1, 1]]}, "does not know the token -1 of prompts", "from 0 to 99"),
        ({"prompts": [[1]], "pad_token_id": -1}, "does not know the token -1 of pad_token_id", "from 0 to 99"),
        ({"prompts": [[1]], "eos_token_id": 100}, "does not know the token 100 of eos_token_id", "from 0 to 99"),
        ({"prompts": [[1]], "attention_mask": torch.ones(1, 1)}, "an attention_mask beside lists", "as they are"),
        (
            {"prompts": torch.ones(2, 2, dtype=torch.long), "attention_mask": torch.tensor([[1, 1], [0, 0]])},
            "or an empty one",
            "one token at least",
        ),
        ({"prompts": [[1]], "max_new_tokens": 2.5}, "max_new_tokens is 2.5", "one token at least"),
        ({"prompts": [[1]], "temperature": 0}, "temperature is 0", "do_sample=False"),
        ({"prompts": [[1]], "top_p": 2.0}, "top_p is 2.0", "1 at most"),
        ({"prompts": [[1]], "top_k": -1}, "top_k is -1", "1 or more"),
        ({"prompts": [[1]], "repetition_penalty": 0.0}, "repetition_penalty is 0.0", "1 changes nothing"),
        ({"prompts": [[1]], "logits_processor": ["x"]}, "logits_processor has a str", "functions of ids and scores"),
        ({"prompts": [[1]], "stopping_criteria": 3}, "stopping_criteria has a int", "functions of ids and scores"),
        ({"prompts": [[1]], "streamer": 3}, "streamer is a int", "put()"),
        ({"prompts": [[1]], "seed": "a"}, "seed is 'a'", "a whole number"),
        ({"prompts": [[1]], "pixel_values": torch.zeros(1, 3, 4, 4)}, "captured without images", "leave them out"),
    ],
)
def test_misfits_are_refused_with_numbers(
    decoder: tuple[nn.Module, laconic.Result], settings: dict[str, Any], what: str, hint: str
) -> None:
    with pytest.raises(UsageError) as caught:
        decoder[1].model.generate(**settings)
    assert what in str(caught.value)
    assert hint in str(caught.value)


def test_the_largest_that_fits_fits(decoder: tuple[nn.Module, laconic.Result]) -> None:
    module, result = decoder
    ours = result.model.generate([[1, 2]], max_new_tokens=23)
    assert ours[0, 2:].tolist() == theirs(module, [[1, 2]], 23)[0]


def test_a_model_without_these_entries_says_so() -> None:
    result = laconic.optimize(nn.Linear(3, 4), inputs=(torch.randn(2, 3),))
    with pytest.raises(UsageError, match="has no entry 'decode', so it cannot generate") as caught:
        result.model.generate(PROMPTS)
    assert "cache=(batch, length)" in str(caught.value)


def test_entries_of_other_weights_are_refused() -> None:
    programs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        programs.append(capture_module(nn.Linear(3, 4), (torch.randn(2, 3),), {}))
    with pytest.raises(UsageError, match="the entry 'decode' was captured with another parameter 'weight'"):
        combine({"forward": programs[0], "decode": programs[1]})


def test_a_cache_that_is_not_known_is_refused_with_the_reason() -> None:
    plain = nn.Linear(3, 4)
    with pytest.raises(UnsupportedError, match="Linear cannot be captured with a cache") as caught:
        laconic.capture(plain, torch.randn(2, 3), cache=(1, 8))
    assert "models of transformers with attention" in str(caught.value)
    wrong: list[Any] = [(0, 8), (1, 2), (3,), 3, "3x24", (3, 24, 2), (1.5, 9), (True, 9)]
    for cache in wrong:
        with pytest.raises(UsageError, match="a cache of"):
            laconic.capture(plain, torch.randn(2, 3), cache=cache)


@pytest.mark.slow
def test_a_cache_beyond_memory_or_positions_is_refused() -> None:
    torch.manual_seed(0)
    module, inputs, _ = gpt2()
    program = capture_module(module.eval(), (), inputs, None)
    with pytest.raises(UsageError, match=r"take .* GiB") as caught:
        capture_cached(module, program, batch=10**6, length=10**6)
    assert "the machine has" in str(caught.value)
    with pytest.raises(UnsupportedError, match="cannot be captured with a cache of 200 tokens") as refused:
        capture_cached(module, program, batch=1, length=200)
    assert "it does not run on so many" in str(refused.value)


@pytest.mark.slow
def test_a_model_without_attention_is_refused() -> None:
    module, inputs, axes = EIGHT["mamba"]()
    with pytest.raises(UnsupportedError, match="cannot be captured with a cache"):
        laconic.capture(module.eval(), **inputs, dynamic_shapes=axes, cache=(1, 8))


# Encoders with decoders


def bart() -> Case:
    config = hf.BartConfig(
        **{"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "vocab_size": 100, "max_position_embeddings": 64},
        **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64},
        **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2},
        forced_eos_token_id=None,
    )
    inputs, axes = text(decoder_input_ids=torch.randint(0, 100, (3, 5)), use_cache=False)
    return hf.BartForConditionalGeneration(config), inputs, axes | {"decoder_input_ids": {0: BATCHES, 1: TARGET}}


@pytest.mark.slow
@pytest.mark.parametrize("make", [t5, bart])
def test_sources_of_different_length_are_answered_as_transformers_does(
    make: Callable[[], Case], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    module, inputs, axes = make()
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(3 if make is t5 else 20)
    result = laconic.optimize(module.eval(), inputs=inputs, dynamic_shapes=axes, cache=(BATCH, LENGTH))
    assert result.report.verified
    settings: Any = module.generation_config
    start, pad = settings.decoder_start_token_id or 0, settings.pad_token_id or 0
    again = laconic.load(result.save(tmp_path / "out"))
    ours, loaded = (
        m.generate(PROMPTS, max_new_tokens=NEW, decoder_start_token_id=start, pad_token_id=pad)
        for m in (result.model, again)
    )
    assert torch.equal(ours, loaded)
    assert ours.tolist() == theirs(module, PROMPTS, decoder_start_token_id=start, pad_token_id=pad)
    with pytest.raises(UsageError, match="the longest source has 30 tokens, and its cache holds 24"):
        result.model.generate([list(range(30))])
    with pytest.raises(UsageError, match="40 new tokens need a cache of 40"):
        result.model.generate(PROMPTS, max_new_tokens=40)
    laconic.export_onnx(result.program, tmp_path / "m.onnx", with_past=True)
    assert {file.name for file in tmp_path.glob("*.onnx")} == {"m.encode.onnx", "m.decode.onnx"}
    runtime = OnnxDecoder(tmp_path / "m.onnx")
    answers = generate(runtime, PROMPTS, max_new_tokens=NEW, decoder_start_token_id=start, pad_token_id=pad)
    assert torch.equal(answers, ours)
    assert runtime.cache_bytes == result.model.decoding().cache_bytes


# What a capture is held to


@pytest.mark.slow
def test_what_the_model_caches_by_itself_is_not_asked_for() -> None:
    torch.manual_seed(0)
    module, inputs, axes = gpt2()
    own = {name: value for name, value in inputs.items() if name != "use_cache"}
    shapes = {name: axis for name, axis in axes.items() if name != "use_cache"}
    program = laconic.capture(module.eval(), **own, dynamic_shapes=shapes, cache=(1, 8))
    assert Model(program).generate([[1, 2]], max_new_tokens=3).shape == (1, 5)
    with pytest.raises(UnsupportedError, match="call it with use_cache=False"):
        laconic.capture(module.eval(), **own)


@pytest.mark.slow
def test_a_capture_leaves_the_model_as_it_was() -> None:
    """A model in training stays in training; what is captured is in inference."""
    torch.manual_seed(0)
    module, inputs, axes = gpt2()
    module.train()
    inner: Any = module
    inner.transformer.drop.eval()
    laconic.capture(module, **inputs, dynamic_shapes=axes, cache=(1, 8))
    assert module.training
    assert inner.transformer.h[0].training
    assert not inner.transformer.drop.training


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_to_what_is_near_is_refused_in_halves_too(dtype: torch.dtype) -> None:
    """GPT-Neo makes its own mask, in a way that caches of fixed size do not allow; the model stays what it was."""
    torch.manual_seed(0)
    local: dict[str, Any] = {"attention_types": [[["global", "local"], 1]], "window_size": 12}
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 100, "max_position_embeddings": 64}
    module = hf.GPTNeoForCausalLM(hf.GPTNeoConfig(**sizes, **local)).to(dtype).eval()
    before = {name: (weight, weight.data_ptr()) for name, weight in module.named_parameters()}
    ids = torch.randint(2, 90, (2, 5))
    with pytest.raises(UnsupportedError, match="away from the model's own"):
        laconic.capture(module, input_ids=ids, attention_mask=torch.ones_like(ids), cache=(2, 24))
    assert {name: (weight, weight.data_ptr()) for name, weight in module.named_parameters()} == before
    assert {weight.dtype for weight in module.parameters()} == {dtype}


@pytest.mark.parametrize("wrong", [pytest.param(wrong, marks=pytest.mark.slow) for wrong in ("positions", "mask")])
def test_a_model_that_takes_caches_otherwise_is_refused(wrong: str) -> None:
    """Logits of a padded prompt, and of one token more, that are not the model's own."""
    torch.manual_seed(0)
    module, inputs, _ = llama()
    with torch.no_grad():
        for weight in module.parameters():
            weight.mul_(3)
    forward = module.forward

    @functools.wraps(forward)
    def otherwise(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            if wrong == "positions":
                kwargs["position_ids"] = kwargs["position_ids"] * 2
            else:
                kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        return forward(*args, **kwargs)

    module.forward = otherwise  # type: ignore[method-assign]
    program = capture_module(module.eval(), (), inputs, None)
    with pytest.raises(UnsupportedError, match="away from the model's own"):
        capture_cached(module, program, batch=2, length=8)
