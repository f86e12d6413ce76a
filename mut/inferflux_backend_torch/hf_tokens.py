"""What the files of a Hugging Face model say about its tokens: which end a sequence, and which are no text.

    tokenizer.json           vocabulary, added tokens, and how text becomes tokens: the only one that must be there
    tokenizer_config.json    names of special tokens, chat template, more added tokens
    special_tokens_map.json, added_tokens.json, chat_template.jinja, chat_template.json    the same, as older or newer files
    generation_config.json, config.json    ids that end a sequence; size of the vocabulary

Not one of them can name code to run: `auto_map` and tokenizer classes are not looked at.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from inferflux_backend_torch.model_file import open_regular, read_exactly, read_json, read_optional_json
from inferflux_core.errors import ModelFileError

_MAX_TOKENIZER_BYTES = 256_000_000  # the largest published ones have 40 MB
_MAX_TEMPLATE_BYTES = 4_000_000
_TOKENIZER = "tokenizer.json"

# Some makers leave their control tokens unmarked (DeepSeek's turn markers, Qwen's for infilling). llama.cpp's converter goes by
# the same looks: does_token_look_special in convert_hf_to_gguf.py.
_LOOKS_CONTROL = re.compile(r"<\|.*\|>|<｜.*｜>", re.DOTALL)
# A named token that the tokenizer does not list as added is believed only if no text would hold it by accident.
_MARKUP = re.compile(r"<.+>|\[.+\]", re.DOTALL)

# Tokens that end a turn whatever the configuration says of EOS. From llama.cpp's list in llama-vocab.cpp (special_eog_ids).
_TURN_ENDERS = (
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<turn|>",
    "<end_of_utterance>", "<|return|>", "<|call|>", "<EOT>", "[EOT]", "<｜end▁of▁sentence｜>",
)  # fmt: skip
_CALL_ENDERS = frozenset({"<|return|>", "<|call|>"})  # where a vocabulary has these, <|end|> ends a message, not the turn


@dataclass(frozen=True, slots=True, kw_only=True)
class HFTokens:
    """The tokens of a model.

    Attributes:
        path: tokenizer.json.
        document: its contents, with added tokens that only other files list.
        vocab_size: rows of the model's embedding; ids of tokens that text is read as or that are decoded are below it.
        special: ids that are no part of a text: skipped when decoding. Those that the maker marked.
        control: text -> id of tokens that only a template may write: those of `special`, and unmarked ones that look like them.
        beyond: texts of added tokens for which the model has no embedding.
        bos_token, eos_token: texts; "" where the model has none.
        add_bos, add_eos: whether to put them around a text; None leaves it to tokenizer.json's post-processor.
        eos_token_ids: ids that end a sequence.
        chat_template: Jinja, from a stranger.
    """

    path: Path
    document: dict[str, Any]
    vocab_size: int
    special: frozenset[int]
    control: Mapping[str, int]
    beyond: frozenset[str]
    bos_token: str
    eos_token: str
    add_bos: bool | None
    add_eos: bool | None
    eos_token_ids: frozenset[int]
    chat_template: str | None


def eos_token_ids(folder: Path, config: Mapping[str, Any]) -> frozenset[int]:
    """Ids that end a sequence, without building a tokenizer; takes as long as parsing tokenizer.json.

    The union of what generation_config.json, config.json and tokenizer_config.json call EOS and of the vocabulary's control
    tokens known to end a turn. Ids that the model has no embedding for are left out.

    Args:
        folder: of the model.
        config: contents of its config.json.

    Raises:
        ModelFileError: as `read_hf_tokens`.
    """
    return read_hf_tokens(folder, config).eos_token_ids


def read_hf_tokens(folder: Path, config: Mapping[str, Any] | None = None) -> HFTokens:
    """Read and check the files of a folder.

    Args:
        config: contents of config.json, where they have been read already.

    Raises:
        ModelFileError: there is no tokenizer.json; a file is malformed; the vocabulary is larger than the model's.
    """
    path = folder / _TOKENIZER
    if not os.path.lexists(path):
        _refuse_missing(folder)
    document = read_json(path, "tokenizer", max_bytes=_MAX_TOKENIZER_BYTES)
    if config is None:
        config = read_json(folder / "config.json", "model configuration")
    settings = read_optional_json(folder / "special_tokens_map.json", "map of special tokens")
    tokenizer_config = read_optional_json(folder / "tokenizer_config.json", "tokenizer configuration")
    settings |= {key: value for key, value in tokenizer_config.items() if value is not None}
    vocab = _vocab(path, document)
    added = _added_tokens(folder, path, document, settings, vocab)
    stated = _stated_vocab_size(folder, config)
    largest = max(vocab.values(), default=-1)
    if stated is not None and largest >= stated:
        raise ModelFileError(
            f"{path}: its vocabulary has ids up to {largest}, but config.json states a vocab_size of {stated}; the files "
            f"belong to different models, fetch them again from one place"
        )
    vocab_size = stated or max([largest, *(token["id"] for token in added.values())], default=-1) + 1
    known = {text: token for text, token in added.items() if token["id"] < vocab_size}
    control = {text: token["id"] for text, token in known.items() if token["special"] or _LOOKS_CONTROL.fullmatch(text)}
    eos_token = _text(settings.get("eos_token"))
    ends = {control[text] for text in _TURN_ENDERS if text in control}
    if control.keys() >= _CALL_ENDERS:
        ends.discard(control.get("<|end|>", -1))
    ends |= set(_stated_eos(folder, config))
    if (end := known[eos_token]["id"] if eos_token in known else vocab.get(eos_token)) is not None:
        ends.add(end)
    return HFTokens(
        path=path,
        document=document,
        vocab_size=vocab_size,
        special=frozenset(token["id"] for token in known.values() if token["special"]),
        control=control,
        beyond=frozenset(added.keys() - known.keys()),
        bos_token=_text(settings.get("bos_token")),
        eos_token=eos_token,
        add_bos=_flag(settings, "add_bos_token"),
        add_eos=_flag(settings, "add_eos_token"),
        eos_token_ids=frozenset(end for end in ends if 0 <= end < vocab_size),
        chat_template=_chat_template(folder, settings),
    )


def _refuse_missing(folder: Path) -> NoReturn:
    others = [name for name in ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt") if os.path.lexists(folder / name)]
    has = f", and {', '.join(map(repr, others))} alone cannot be read" if others else ""
    raise ModelFileError(
        f"{folder}: holds no {_TOKENIZER}{has}; fetch it from the model's repository, or make it: "
        f"transformers.AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
    )


def _vocab(path: Path, document: Mapping[str, Any]) -> dict[str, int]:
    """Token -> id of the model inside tokenizer.json, without added tokens."""
    model = document.get("model")
    if not isinstance(model, dict):
        raise ModelFileError(f"{path}: not a usable tokenizer: it has no object 'model'; fetch the file again")
    vocab = model.get("vocab")
    kind = model.get("type") or ("Unigram" if isinstance(vocab, list) else "BPE" if "merges" in model else "WordPiece")
    if kind not in ("BPE", "Unigram"):
        raise ModelFileError(
            f"{path}: tokenizers of type {kind!r} cannot give back the exact text and are not supported, only BPE and "
            f"Unigram; choose another model"
        )
    if kind == "BPE" and isinstance(vocab, dict) and all(type(number) is int for number in vocab.values()):
        return vocab
    if (
        kind == "Unigram"
        and isinstance(vocab, list)
        and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in vocab)
    ):
        return {piece: number for number, (piece, _) in enumerate(vocab)}
    raise ModelFileError(f"{path}: not a usable tokenizer: 'vocab' of its model is malformed; fetch the file again")


def _added_tokens(
    folder: Path, path: Path, document: dict[str, Any], settings: Mapping[str, Any], vocab: Mapping[str, int]
) -> dict[str, dict[str, Any]]:
    """Text -> added token, as tokenizer.json writes them; puts into `document` what only other files list."""
    listed = document.setdefault("added_tokens", [])
    if not isinstance(listed, list) or not all(map(_is_added_token, listed)):
        raise ModelFileError(f"{path}: not a usable tokenizer: 'added_tokens' is malformed; fetch the file again")
    added = {token["content"]: dict(token) for token in listed if token["content"]}  # the library skips empty ones
    for number, token in _listed_elsewhere(folder, settings):
        if (text := _text(token)) in added:
            added[text]["special"] |= _is_special(token)
        else:
            extra = {flag: isinstance(token, dict) and token.get(flag) is True for flag in ("single_word", "lstrip", "rstrip")}
            normalized = isinstance(token, dict) and token.get("normalized") is True
            added[text] = {"id": number, "content": text, **extra, "normalized": normalized, "special": _is_special(token)}
    for text in _named(settings):
        if text in added:
            added[text]["special"] = True
        elif text in vocab and _MARKUP.fullmatch(text):
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
            added[text] = {"id": vocab[text], "content": text, **flags}
    document["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    return added


def _is_added_token(token: Any) -> bool:
    return (
        isinstance(token, dict)
        and type(token.get("id")) is int
        and token["id"] >= 0
        and isinstance(token.get("content"), str)
        and isinstance(token.setdefault("special", False), bool)
    )


def _listed_elsewhere(folder: Path, settings: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """(id, token) of added_tokens.json and of tokenizer_config.json's added_tokens_decoder."""
    by_text = read_optional_json(folder / "added_tokens.json", "list of added tokens")
    by_id = settings.get("added_tokens_decoder")
    pairs = [(number, text) for text, number in by_text.items()]
    pairs += by_id.items() if isinstance(by_id, dict) else []
    for number, token in pairs:
        digits = str(number)  # the one file writes numbers, the other texts
        if not (digits.isascii() and digits.isdigit()):
            raise ModelFileError(
                f"{folder}: added token {token!r} has the id {number!r}, not a whole number; fetch the files again"
            )
        if _text(token):
            yield int(digits), token


def _named(settings: Mapping[str, Any]) -> Iterator[str]:
    """Texts that have a role by name: `bos_token` and its like, and the lists of further ones."""
    for key, value in settings.items():
        if key.endswith("_token"):
            values = [value]
        elif key in ("additional_special_tokens", "extra_special_tokens"):
            values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        else:
            continue
        yield from filter(None, map(_text, values))


def _text(token: Any) -> str:
    """Of a token given as text or as an object; "" for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _is_special(token: Any) -> bool:
    return isinstance(token, dict) and token.get("special") is True


def _flag(settings: Mapping[str, Any], key: str) -> bool | None:
    value = settings.get(key)
    return value if isinstance(value, bool) else None


def _stated_vocab_size(folder: Path, config: Mapping[str, Any]) -> int | None:
    text_config = config.get("text_config")
    size = config.get("vocab_size", text_config.get("vocab_size") if isinstance(text_config, dict) else None)
    if size is not None and (type(size) is not int or size <= 0):
        raise ModelFileError(f"{folder / 'config.json'}: vocab_size is {size!r}, not a positive whole number")
    return size


def _stated_eos(folder: Path, config: Mapping[str, Any]) -> Iterator[int]:
    generation = read_optional_json(folder / "generation_config.json", "generation configuration")
    for name, source in (("generation_config", generation), ("config", config), ("config", config.get("text_config"))):
        value = source.get("eos_token_id") if isinstance(source, Mapping) else None
        for number in value if isinstance(value, list) else [] if value is None else [value]:
            if type(number) is not int:
                raise ModelFileError(f"{folder / name}.json: eos_token_id holds {number!r}, not a whole number; correct it")
            yield number


def _chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        return _read_text(path)
    template = settings.get("chat_template")
    if template is None:
        template = read_optional_json(folder / "chat_template.json", "chat template").get("chat_template")
    if isinstance(template, list):  # several by name; requests cannot choose, so only the default one counts
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_text(path: Path) -> str:
    with open_regular(path) as (fd, size):
        if size > _MAX_TEMPLATE_BYTES:
            raise ModelFileError(f"{path}: has {size} bytes, more than {_MAX_TEMPLATE_BYTES}; it is no chat template")
        try:
            return read_exactly(fd, size, 0).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ModelFileError(f"{path}: is not UTF-8 at byte {error.start}; fetch the file again") from None
        except OSError as error:
            raise ModelFileError(f"{path}: reading it failed: {error.strerror}") from None
