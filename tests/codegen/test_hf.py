"""Hugging Face folders: `from_pretrained` gives the program's bits, and what no configuration says is refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import laconic
from architectures import albert, bert, gpt2, llama, local_by_turns, t5, vit
from laconic.codegen.hf import write_hf
from laconic.ir.depth import Depth
from laconic.ir.errors import UnsupportedError, UsageError
from laconic.ir.program import Program
from laconic.ir.run import Runnable
from laconic.passes.share_layers import ShareLayers


def captured(case: Any) -> tuple[Program, dict[str, Any]]:
    torch.manual_seed(0)
    module, inputs, axes = case
    return laconic.capture(module.eval(), dynamic_shapes=axes, **inputs), inputs


def without(program: Program, *numbers: int) -> Program:
    return Depth(program).skip_blocks([block for block in Depth(program).blocks if block.number in numbers])


def first_of(module: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return next(iter(module(**inputs).values()))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (partial(llama, 5, eos_token_id=[1, 2, 5, 7, 9]), "num_hidden_layers"),
        pytest.param(partial(gpt2, 5), "n_layer", marks=SLOW),
        pytest.param(partial(bert, 5), "num_hidden_layers", marks=SLOW),
        pytest.param(partial(vit, 5), "num_hidden_layers", marks=SLOW),
        pytest.param(partial(t5, 5, 4), "num_layers", marks=SLOW),
        pytest.param(partial(t5, 5, 5), "num_layers", marks=SLOW),
    ],
    ids=["llama", "gpt2", "bert", "vit", "t5", "t5 as long as wide"],
)
def test_blocks_that_are_gone_are_counted_out(build: Any, count: str, tmp_path: Path) -> None:
    case = build()
    program, inputs = captured(case)
    depth = Depth(program)
    gone = [block for block in depth.blocks if block.run == 0 and block.number in (1, 3)]
    short = depth.skip_blocks(gone)
    folder = write_hf(short, tmp_path / "hf")
    said = json.loads((folder / "config.json").read_text())
    assert said[count] == 3
    ends = said.get("eos_token_id")
    assert not isinstance(ends, list) or len(ends) == 5, "as many as there were blocks, and not of them"
    module = type(case[0]).from_pretrained(folder).eval()
    assert torch.equal(first_of(module, inputs), first_of(Runnable(short), inputs))
    stored = sum(weight.value.nbytes for weight in short.weights.values() if weight.trainable)
    assert sum(weight.nbytes for weight in module.parameters()) == stored
    assert (folder / "model.safetensors").stat().st_size < stored + 20_000


@pytest.mark.parametrize(
    ("inner", "gone", "left"),
    [(1, (1, 2), 3), pytest.param(1, (0, 1, 2, 3), 1, marks=SLOW), pytest.param(2, (2, 3), 4, marks=SLOW)],
)
def test_rounds_over_the_same_weights_are_counted(inner: int, gone: tuple[int, ...], left: int, tmp_path: Path) -> None:
    program, inputs = captured(albert(5, inner_group_num=inner))
    folder = write_hf(short := without(program, *gone), tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == left
    module = hf.AlbertModel.from_pretrained(folder).eval()
    assert torch.equal(first_of(module, inputs), first_of(Runnable(short), inputs))


@pytest.mark.slow
def test_lists_that_say_something_of_each_block_lose_the_same_ones(tmp_path: Path) -> None:
    program, inputs = captured(local_by_turns())
    short = without(program, 1)  # a global one
    folder = write_hf(short, tmp_path / "hf")
    said = json.loads((folder / "config.json").read_text())
    assert [kind[:4] for kind in said["layer_types"]] == ["slid", "slid", "full", "slid", "full"]
    module = hf.Gemma3ForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(first_of(module, inputs), first_of(Runnable(short), inputs))


@pytest.mark.slow
def test_a_whole_model_with_changed_weights_and_its_tokenizer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama(3, tie_word_embeddings=True)[0].save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    result = laconic.optimize(str(tmp_path / "model"), "none")
    result.program.weights["model.norm.weight"].value.detach().mul_(2)
    with pytest.raises(Exception, match="weight"):
        result.save(tmp_path / "out", formats=["hf"])
    folder = write_hf(result.program, tmp_path / "hf", beside=tmp_path / "model")
    assert {file.name for file in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    before = hf.LlamaForCausalLM.from_pretrained(tmp_path / "model").eval()
    after = hf.LlamaForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(after.model.norm.weight, 2 * before.model.norm.weight)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    with pytest.raises(UsageError, match="exists already"):
        write_hf(result.program, folder)


@pytest.fixture(scope="module")
def program() -> Program:
    return captured(llama(4))[0]


def refused(program: Program, path: Path) -> UnsupportedError:
    with pytest.raises(UnsupportedError) as caught:
        write_hf(program, path / "hf")
    assert not list(path.iterdir())
    return caught.value


def test_a_branch_that_is_gone_is_refused(program: Program, tmp_path: Path) -> None:
    depth = Depth(program)
    problem = refused(depth.skip([depth.units[2]]), tmp_path)
    assert "needs weights that the program does not have" in problem.what
    assert "model.layers.1.self_attn.q_proj.weight" in problem.why


def test_blocks_that_share_are_refused(program: Program, tmp_path: Path) -> None:
    item = ShareLayers(keep=0.5, method="fixed")
    problem = refused(item.apply(program, item.plan(program)).program, tmp_path)
    assert "cannot say that these share" in problem.what
    assert "model.layers.1.mlp.down_proj.weight and model.layers.0.mlp.down_proj.weight" in problem.why


@pytest.mark.slow
def test_what_is_computed_otherwise_is_refused(program: Program, tmp_path: Path) -> None:
    changed = program.clone()
    node = next(node for node in changed.forward.graph.nodes if node.target is torch.ops.aten.silu.default)
    node.target = torch.ops.aten.relu.default
    assert "does not compute what the program does" in refused(changed, tmp_path).what


def test_a_model_of_nobody_is_refused(tmp_path: Path) -> None:
    program = laconic.capture(nn.Linear(3, 2), torch.ones(1, 3))
    assert "no model of transformers" in refused(program, tmp_path).what
