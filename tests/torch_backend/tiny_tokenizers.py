"""Small tokenizers of the kinds that language models use, made by the `tokenizers` library and saved as a model's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

tokenizers = pytest.importorskip("tokenizers", reason="the backend's tokenizers are run by it")

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402 - after the skip

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12 o'clock, isn't it?",
    "ein zwei drei, drei zwei eins; été à la façon de Dürer",
    "def f(x):\n    return x ** 2  # start of the end, im_start im_end user system",
    "the end of the start of the other end; he said that she had started there " * 3,
] * 4

BOS, EOS, USER = "<|im_start|>", "<|im_end|>", "<|user|>"
SENTENCEPIECE_CONTROL = ("<unk>", "<s>", "</s>")


def write_folder(folder: Path, document: Mapping[str, Any], **files: Mapping[str, Any]) -> Path:
    """Write tokenizer.json, config.json (a vocabulary as large as needed unless given) and other files by their stem."""
    folder.mkdir(parents=True, exist_ok=True)
    ids = [token["id"] for token in document.get("added_tokens", [])]
    files = {"config": {"vocab_size": max([len(document["model"]["vocab"]) - 1, *ids]) + 1}, **files}
    for name, content in {"tokenizer": document, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def document_of(tokenizer: Tokenizer) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(tokenizer.to_str())
    return document


def byte_level() -> dict[str, Any]:
    """As Llama 3, Qwen and SmolLM: bytes as letters, control tokens behind the vocabulary, no space in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.add_tokens([USER, AddedToken("<tool_call>", normalized=False), AddedToken("   ", normalized=False)])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]),
        ]
    )
    return document_of(tokenizer)


def sentencepiece(prefix: str) -> dict[str, Any]:
    """As Llama 2 (`prepend`), Mistral (`metaspace`), Gemma (`none`): ▁ for spaces, <0xAB> for bytes, control tokens inside."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if prefix == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
        if prefix == "prepend":
            steps.insert(0, normalizers.Prepend("▁"))
        tokenizer.normalizer = normalizers.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SENTENCEPIECE_CONTROL, *byte_tokens], limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    strip = [decoders.Strip(" ", 1, 0)] if prefix == "prepend" else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    if prefix == "metaspace":
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    document = document_of(tokenizer)
    # the trainer lists what it was given as special tokens; in real files the bytes are not among the added ones
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in SENTENCEPIECE_CONTROL]
    # As converters do, which derive merges from all pieces: text could spell </s>.
    vocab = document["model"]["vocab"]
    for piece in ("<", "/", "s", ">", "</", "</s"):
        vocab.setdefault(piece, len(vocab))
    document["model"]["merges"] += [["<", "/"], ["</", "s"], ["</s", ">"]]
    return document


def unigram() -> dict[str, Any]:
    """As T5's: the most probable split into pieces, among them the control tokens, with a score above all others."""
    pieces = [(text, 0.0) for text in SENTENCEPIECE_CONTROL] + [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    letters = sorted({letter for text in CORPUS for letter in text.replace(" ", "▁")} | {"<", ">", "/"})
    words = [("▁the", -3.0), ("▁of", -4.0), ("▁st", -4.5), ("art", -4.5), ("▁end", -4.2), ("<s", -6.0)]
    pieces += [(letter, -9.0) for letter in letters] + words
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    tokenizer.add_special_tokens(list(SENTENCEPIECE_CONTROL))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return document_of(tokenizer)


KINDS: dict[str, Callable[[], dict[str, Any]]] = {
    "byte_level": byte_level,
    "prepend": lambda: sentencepiece("prepend"),
    "metaspace": lambda: sentencepiece("metaspace"),
    "none": lambda: sentencepiece("none"),
    "unigram": unigram,
}
