"""The byte-level BPE of 2,048 tokens that all text models of the zoo share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from laconic.ir.files import place_file, temporary_beside
from laconic.models.corpus import Document, training_documents

FOLDER = Path(__file__).parent / "data" / "tokenizer"

VOCABULARY = 2048
#: Ids 0, 1 and 2. `<image>` is the vlm's; one tokenizer serves all.
END, PAD, IMAGE = "<|endoftext|>", "<|pad|>", "<image>"

#: What no token crosses. A newline and the indent behind it are one piece: on Python a large part of the text.
_PIECES = r"'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]{1,3}|\n[ ]*| ?[^\sA-Za-z0-9]+|[ ]+(?=[^ ])|\s+"


def train(texts: Iterable[str]) -> Any:
    """A `tokenizers.Tokenizer` learned from these texts. Sennrich et al. 2016, "Neural Machine Translation of Rare
    Words with Subword Units" (arXiv:1508.07909)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD, IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    # A text begins behind <|endoftext|>, as every document of the training stream does.
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


def write(folder: Path = FOLDER) -> None:
    """Learn the tokenizer from the training documents of the running Python. Done once: it is final."""
    folder.mkdir(parents=True, exist_ok=True)
    train(d.text for d in training_documents()).save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "pad_token": PAD,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


@cache
def load() -> Any:
    """The committed tokenizer, a `tokenizers.Tokenizer`."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(FOLDER / "tokenizer.json"))


def encode(documents: Sequence[Document]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The stream of token ids, each document behind `<|endoftext|>`, and for each token the number of its document."""
    ids = [np.array(e.ids, dtype=np.int64) for e in load().encode_batch([d.text for d in documents])]
    owners = np.repeat(np.arange(len(ids)), [len(i) for i in ids])
    return np.concatenate(ids), owners


def training_stream(cache_folder: Path) -> tuple[NDArray[np.int64], str]:
    """The token stream of the training documents and its hash; kept in `cache_folder` between runs."""
    documents = training_documents()
    digest = hashlib.sha256((FOLDER / "tokenizer.json").read_bytes())
    for document in documents:
        digest.update(f"{document.path}\0{document.text}\0".encode())
    name = digest.hexdigest()
    path = cache_folder / f"tokens-{name[:16]}.npy"
    if not path.exists():
        with temporary_beside(path) as temporary:
            with temporary.open("wb") as file:
                np.save(file, encode(documents)[0].astype(np.uint16))
            place_file(temporary, path, force=True)
    return np.load(path).astype(np.int64), name
