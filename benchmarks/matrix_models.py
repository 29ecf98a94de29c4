"""The models of the support matrix, and what each of them promises: thirty architectures, small and random, and the
reference models as they were trained.

Random ones have 6 or more layers, dropout off, and numbers as after training: biases, norms and statistics that do
something. What is a layer is read from the configuration, and of which kind: layers of one kind are said once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

from architectures import BATCH, SEQUENCE, TARGET, Case, bert, gpt2, inputs_of, llama, qwen3_moe, t5, vit  # noqa: E402
from laconic.models import zoo  # noqa: E402
from laconic.models.canvas import GRID  # noqa: E402
from laconic.models.vlm import prompt  # noqa: E402

DEPTH = 6
SMALL = {"hidden_size": 32, "num_hidden_layers": DEPTH, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = SMALL | {"vocab_size": 100, "max_position_embeddings": 64}
GROUPED = TEXT | {"num_key_value_heads": 2}
IMAGE = SMALL | {"image_size": 32, "patch_size": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BY_TURNS = ["sliding_attention", "full_attention"] * (DEPTH // 2)

Sizes = tuple[int, int, int]
Layers = dict[str, str]


@dataclass(frozen=True)
class Row:
    """How a model of the matrix is made: the case, its layers by the path of their module, each with its kind, told
    from the configuration; and how arguments are drawn at other sizes.

    `training` is False where training mode draws random numbers even with dropout off; gradients are then those of
    evaluation mode.
    """

    case: Callable[[], Case]
    layers: Callable[[Any], Layers]
    draw: Callable[[dict[str, Any], Sizes, int], dict[str, Any]] = inputs_of
    training: bool = True


def stack(path: str, kinds: int | list[str]) -> Layers:
    """Layers `path.0`, `path.1` ... of these kinds, or all of one kind."""
    return {f"{path}.{k}": kind for k, kind in enumerate([path] * kinds if isinstance(kinds, int) else kinds)}


def hidden(path: str) -> Callable[[Any], Layers]:
    return lambda config: stack(path, config.num_hidden_layers)


def typed(path: str) -> Callable[[Any], Layers]:
    return lambda config: stack(path, list(config.layer_types))


# Text

ALONE = {"use_cache": False}


def text(model: nn.Module, **extra: Any) -> Case:
    """Ids with a padding mask."""
    example = {"input_ids": torch.zeros(3, 7, dtype=torch.long), "attention_mask": torch.zeros(3, 7)}
    inputs = inputs_of({k: v.long() for k, v in example.items()} | extra, (3, 7, 5), 0)
    axes: dict[str, Any] = {name: {0: BATCH, 1: SEQUENCE} for name in example}
    return model, inputs, axes | dict.fromkeys(extra)


def roberta() -> Case:
    config = hf.RobertaConfig(**TEXT | {"max_position_embeddings": 66}, pad_token_id=1)
    return text(hf.RobertaModel(config))


def distilbert() -> Case:
    config = hf.DistilBertConfig(
        dim=32, n_layers=DEPTH, n_heads=4, hidden_dim=64, vocab_size=100, max_position_embeddings=64
    )
    return text(hf.DistilBertModel(config))


def albert() -> Case:
    return text(hf.AlbertModel(hf.AlbertConfig(**TEXT, embedding_size=16)))


_ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}


def modernbert() -> Case:
    config = hf.ModernBertConfig(**TEXT | {"num_hidden_layers": 8}, **_ENDS, local_attention=8)
    return text(hf.ModernBertModel(config))


def without_first_norm(config: Any) -> Layers:
    """The first layer of ModernBERT has no norm in front of its attention."""
    return stack("layers", ["first", *config.layer_types[1:]])


def opt() -> Case:
    config = hf.OPTConfig(
        hidden_size=32,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        ffn_dim=64,
        vocab_size=100,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        **IDS,
    )
    return text(hf.OPTForCausalLM(config), **ALONE)


def causal(model: str, settings: dict[str, Any], **changes: Any) -> Callable[[], Case]:
    """A decoder that takes ids and a mask, by the name of its class."""

    def case() -> Case:
        config = getattr(hf, f"{model}Config")(**settings | changes)
        return text(getattr(hf, f"{model}ForCausalLM")(config), **ALONE)

    return case


YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    }
}


def deepseek_v3() -> Case:
    config = hf.DeepseekV3Config(
        **TEXT | {"num_hidden_layers": 8, "num_key_value_heads": 4},
        first_k_dense_replace=2,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return text(hf.DeepseekV3ForCausalLM(config), **ALONE)


def dense_first(config: Any) -> Layers:
    dense = config.first_k_dense_replace
    return stack("model.layers", ["dense"] * dense + ["experts"] * (config.num_hidden_layers - dense))


def mamba2() -> Case:
    config = hf.Mamba2Config(
        hidden_size=32,
        num_hidden_layers=DEPTH,
        num_heads=8,
        head_dim=8,
        state_size=8,
        n_groups=2,
        conv_kernel=3,
        chunk_size=8,
        vocab_size=100,
        **IDS,
    )
    return text(hf.Mamba2ForCausalLM(config), **ALONE)


# Text to text


def encoder_and_decoder(model: nn.Module) -> Case:
    model, inputs, axes = text(model, decoder_input_ids=torch.zeros(3, 5, dtype=torch.long), **ALONE)
    return model, inputs, axes | {"decoder_input_ids": {0: BATCH, 1: TARGET}}


def bart() -> Case:
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in _HALF.items()}
    config = hf.BartConfig(
        d_model=32, vocab_size=100, max_position_embeddings=64, decoder_start_token_id=2, **sizes, **IDS
    )
    return encoder_and_decoder(hf.BartForConditionalGeneration(config))


_HALF = {"layers": DEPTH, "attention_heads": 4, "ffn_dim": 64}


def whisper() -> Case:
    sizes = {f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in _HALF.items()}
    config = hf.WhisperConfig(
        d_model=32,
        vocab_size=100,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=64,
        decoder_start_token_id=1,
        **sizes,
        **IDS,
    )
    inputs = {"input_features": torch.randn(3, 8, 32), "decoder_input_ids": torch.randint(0, 100, (3, 5)), **ALONE}
    axes = {"input_features": {0: BATCH}, "decoder_input_ids": {0: BATCH, 1: TARGET}, "use_cache": None}
    return hf.WhisperForConditionalGeneration(config), inputs, axes


def blocks(config: Any) -> Layers:
    return stack("encoder.block", config.num_layers) | stack("decoder.block", config.num_decoder_layers)


def two_stacks(config: Any) -> Layers:
    return stack("model.encoder.layers", config.encoder_layers) | stack("model.decoder.layers", config.decoder_layers)


# Images and sound


def image(model: nn.Module, size: int = 32) -> Case:
    return model, {"pixel_values": torch.randn(3, 3, size, size)}, {"pixel_values": {0: BATCH}}


def dinov2() -> Case:
    settings = {k: v for k, v in IMAGE.items() if k != "intermediate_size"}
    return image(hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**settings, mlp_ratio=2)))


def swin() -> Case:
    config = hf.SwinConfig(
        image_size=64,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2, 18, 2],
        num_heads=[1, 2, 4, 8],
        window_size=4,
        mlp_ratio=2.0,
    )
    return image(hf.SwinModel(config), 64)


def shifted_by_turns(config: Any) -> Layers:
    """Every second layer of a Swin stage shifts its windows, where the stage is larger than one window."""
    found: Layers = {}
    for stage, depth in enumerate(config.depths):
        single = config.image_size // config.patch_size // 2**stage <= config.window_size
        kinds = [f"stage {stage}{' shifted' if k % 2 and not single else ''}" for k in range(depth)]
        found |= stack(f"encoder.layers.{stage}.blocks", kinds)
    return found


def resnet() -> Case:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32], depths=[6, 8, 6], layer_type="bottleneck")
    return image(hf.ResNetForImageClassification(config))


def shortcut_first(config: Any) -> Layers:
    """The first layer of a ResNet stage has a shortcut of its own."""
    found: Layers = {}
    for stage, depth in enumerate(config.depths):
        kinds = [f"stage {stage} first"] + [f"stage {stage}"] * (depth - 1)
        found |= stack(f"resnet.encoder.stages.{stage}.layers", kinds)
    return found


def wav2vec2() -> Case:
    config = hf.Wav2Vec2Config(
        **SMALL,
        vocab_size=32,
        conv_dim=[16] * 4,
        conv_stride=[5, 2, 2, 2],
        conv_kernel=[10, 3, 3, 2],
        num_feat_extract_layers=4,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        layerdrop=0.0,
        apply_spec_augment=False,
    )
    return hf.Wav2Vec2Model(config), {"input_values": torch.randn(3, 800)}, {"input_values": {0: BATCH}}


# Images and text


def image_and_text(model: nn.Module) -> Case:
    _, pictures, picture_axes = image(model)
    model, inputs, axes = text(model)
    return model, inputs | pictures, axes | picture_axes


def clip() -> Case:
    config = hf.CLIPConfig(text_config=TEXT | IDS, vision_config=dict(IMAGE), projection_dim=16)
    return image_and_text(hf.CLIPModel(config))


def siglip() -> Case:
    return image_and_text(hf.SiglipModel(hf.SiglipConfig(text_config=TEXT | IDS, vision_config=dict(IMAGE))))


def two_towers(config: Any) -> Layers:
    towers = {"text_model": config.text_config, "vision_model": config.vision_config}
    parts = [stack(f"{name}.encoder.layers", part.num_hidden_layers) for name, part in towers.items()]
    return parts[0] | parts[1]


IMAGE_TOKEN, PATCHES = 99, 16


def llava() -> Case:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**GROUPED, use_cache=False),
        vision_config=hf.CLIPVisionConfig(**IMAGE),
        image_token_index=IMAGE_TOKEN,
    )
    model, inputs, axes = image_and_text(hf.LlavaForConditionalGeneration(config))
    return model, with_picture(inputs, (3, 7, 0), 0), axes


def with_picture(example: dict[str, Any], sizes: Sizes, seed: int) -> dict[str, Any]:
    """Arguments in which each row of ids begins with the places of its picture."""
    batch, sequence, _ = sizes
    made = inputs_of(example, (batch, sequence, 0), seed)
    places = torch.full((batch, PATCHES), IMAGE_TOKEN)
    made["input_ids"] = torch.cat([places, made["input_ids"].clamp(max=IMAGE_TOKEN - 1)], 1)
    made["attention_mask"] = torch.cat([torch.ones_like(places), made["attention_mask"]], 1)
    return made


def tower_and_decoder(config: Any) -> Layers:
    """The layers of the tower that the decoder sees, and the decoder's."""
    tower, text = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    seen = tower + 1 + config.vision_feature_layer
    return stack("model.vision_tower.encoder.layers", seen) | stack("model.language_model.layers", text)


DECODER = hidden("model.layers")
ROWS: dict[str, Row] = {
    "bert": Row(partial(bert, DEPTH), hidden("encoder.layer")),
    "roberta": Row(roberta, hidden("encoder.layer")),
    "distilbert": Row(distilbert, hidden("transformer.layer")),
    "albert": Row(albert, lambda c: stack("encoder.albert_layer_groups.0.albert_layers.0", c.num_hidden_layers)),
    "modernbert": Row(modernbert, without_first_norm),
    "gpt2": Row(partial(gpt2, DEPTH), hidden("transformer.h")),
    "gpt_neox": Row(causal("GPTNeoX", TEXT), hidden("gpt_neox.layers")),
    "opt": Row(opt, hidden("model.decoder.layers")),
    "llama": Row(partial(llama, DEPTH), DECODER),
    "mistral": Row(causal("Mistral", GROUPED, sliding_window=4), DECODER),
    "qwen2": Row(causal("Qwen2", GROUPED), DECODER),
    "qwen3": Row(causal("Qwen3", GROUPED, head_dim=16), DECODER),
    "gemma2": Row(
        causal("Gemma2", GROUPED, head_dim=16, sliding_window=4, layer_types=BY_TURNS), typed("model.layers")
    ),
    "phi3": Row(causal("Phi3", GROUPED | IDS), DECODER),
    "t5": Row(partial(t5, DEPTH, DEPTH), blocks),
    "bart": Row(bart, two_stacks),
    "mixtral": Row(causal("Mixtral", GROUPED, num_local_experts=4), DECODER),
    "qwen3_moe": Row(partial(qwen3_moe, num_hidden_layers=DEPTH), DECODER),
    "deepseek_v3": Row(deepseek_v3, dense_first),
    "gpt_oss": Row(
        causal("GptOss", GROUPED | YARN, head_dim=16, sliding_window=4, num_local_experts=4, layer_types=BY_TURNS),
        typed("model.layers"),
    ),
    "mamba2": Row(mamba2, hidden("backbone.layers")),
    "vit": Row(partial(vit, DEPTH), hidden("layers")),
    "dinov2": Row(dinov2, hidden("encoder.layer")),
    "swin": Row(swin, shifted_by_turns),
    "clip": Row(clip, two_towers),
    "siglip": Row(siglip, two_towers),
    "whisper": Row(whisper, two_stacks),
    "wav2vec2": Row(wav2vec2, hidden("encoder.layers"), training=False),
    "resnet": Row(resnet, shortcut_first),
    "llava": Row(llava, tower_and_decoder, with_picture),
}


# The reference models


def trained(name: str) -> Callable[[], Case]:
    def case() -> Case:
        source = zoo.load(name)
        return source.module, source.kwargs, source.dynamic_shapes

    return case


def with_canvas(example: dict[str, Any], sizes: Sizes, seed: int) -> dict[str, Any]:
    """A canvas for each row, the prompt, and tokens drawn as the answer."""
    batch = sizes[0]
    made = inputs_of(example, (batch, GRID.cells, 0), seed)
    prompts = prompt(batch)
    made["input_ids"] = torch.cat([prompts, made["input_ids"]], 1)
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    return made


def tower_and_reader(config: Any) -> Layers:
    tower, text = config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers
    return stack("model.model.vision_tower.layers", tower) | stack("model.model.language_model.layers", text)


ZOO: dict[str, Row] = {
    "zoo:llama-mha": Row(trained("llama-mha"), DECODER),
    "zoo:llama-gqa": Row(trained("llama-gqa"), DECODER),
    "zoo:moe": Row(trained("moe"), DECODER),
    "zoo:moe-sigmoid": Row(trained("moe-sigmoid"), DECODER),
    "zoo:vit": Row(trained("vit"), hidden("vit.layers")),
    "zoo:vlm": Row(trained("vlm"), tower_and_reader, with_canvas),
    "zoo:minilm": Row(trained("minilm"), hidden("encoder.encoder.layer")),
}
ROWS |= ZOO


def make(name: str) -> Case:
    """A model of the matrix in eval mode, its example arguments and dynamic shapes; the same for the same name."""
    torch.manual_seed(0)
    module, inputs, axes = ROWS[name].case()
    for part in module.modules():
        _undrop(part)
        if name not in ZOO:
            _train(part)
    with torch.no_grad():
        module.eval()(**inputs)  # the first call of some models puts hooks in place, which Dynamo does not trace
    return module, inputs, axes


def _undrop(part: nn.Module) -> None:
    for name, value in vars(part).items():
        if isinstance(value, float) and "drop" in name:
            setattr(part, name, 0.0)
    if isinstance(part, nn.Dropout):
        part.p = 0.0


def _train(part: nn.Module) -> None:
    """Give a module's own parameters and statistics numbers that do something."""
    for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
        with torch.no_grad():
            if name == "weight" and value.dim() == 1:
                value += 0.1 * torch.randn_like(value)
            elif name.endswith("bias") and value.is_floating_point():
                value.normal_(std=0.1)
            elif name == "running_var":
                value.uniform_(0.5, 1.5)
            elif name == "running_mean":
                value.normal_(std=0.1)
            elif isinstance(value, nn.Parameter) and value.dim() > 1 and not isinstance(part, nn.Embedding):
                value.normal_(std=value[0].numel() ** -0.5 if value.dim() != 3 else value.shape[-1] ** -0.5)
