"""What the files beside a tokenizer say, and those that are refused."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tokenizers", reason="the backend's tokenizers are run by it")

from inferflux_backend_torch.tokenizer import HFTokenizer, eos_token_ids
from inferflux_core.errors import ModelFileError
from torch_backend.tiny_tokenizers import BOS, EOS, USER
from torch_backend.tokenizer_case import Document, document, made, put, rename

BYTE_LEVEL_EOS = 381


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {BYTE_LEVEL_EOS}),  # <|im_end|> ends a turn by its name
        ({"generation_config": {"eos_token_id": 7}}, {7, BYTE_LEVEL_EOS}),
        ({"generation_config": {"eos_token_id": [7, 8]}, "config": {"eos_token_id": 9}}, {7, 8, 9, BYTE_LEVEL_EOS}),
        ({"config": {"eos_token_id": None, "text_config": {"eos_token_id": [5]}}}, {5, BYTE_LEVEL_EOS}),
        ({"config": {"vocab_size": 385, "eos_token_id": [384, 385, -1]}}, {384, BYTE_LEVEL_EOS}),
        ({"tokenizer_config": {"eos_token": BOS}}, {380, BYTE_LEVEL_EOS}),
        (
            {"special_tokens_map": {"eos_token": {"content": BOS}}, "tokenizer_config": {"eos_token": None}},
            {380, BYTE_LEVEL_EOS},
        ),
        ({"tokenizer_config": {"eos_token": "!"}}, {0, BYTE_LEVEL_EOS}),
        ({"tokenizer_config": {"eos_token": "not a token"}}, {BYTE_LEVEL_EOS}),
    ],
)
def test_tokens_that_end_a_sequence(tmp_path: Path, files: Mapping[str, Any], expected: set[int]) -> None:
    assert made(tmp_path, **files).eos_token_ids == expected
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert eos_token_ids(tmp_path / "model", config) == expected


def test_where_calls_end_a_turn_the_end_of_a_message_does_not(tmp_path: Path) -> None:
    assert made(tmp_path / "a", rename({BOS: "<|end|>", EOS: "<|call|>"})).eos_token_ids == {380, 381}
    assert made(tmp_path / "b", rename({BOS: "<|end|>", EOS: "<|call|>", USER: "<|return|>"})).eos_token_ids == {381, 382}


def test_a_word_is_no_turn_ender(tmp_path: Path) -> None:
    assert made(tmp_path, rename({EOS: "<|other|>", "<tool_call>": "<end_of_turn>"})).eos_token_ids == frozenset()


@pytest.mark.parametrize(
    ("files", "prefix", "suffix"),
    [
        ({}, [1], [2]),
        ({"add_bos_token": False}, [], [2]),
        ({"add_eos_token": False}, [1], []),
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_bos_token": None, "add_eos_token": "no"}, [1], [2]),
        ({"add_bos_token": False, "add_eos_token": False}, [], []),
    ],
)
def test_tokens_around_a_text(tmp_path: Path, files: dict[str, Any], prefix: list[int], suffix: list[int]) -> None:
    tokenizer = made(tmp_path, kind="none", tokenizer_config={"bos_token": "<s>", "eos_token": "</s>", **files})
    body = tokenizer.encode("the end", add_special=False, parse_special=False)
    for parse in (False, True):
        assert tokenizer.encode("the end", add_special=True, parse_special=parse) == [*prefix, *body, *suffix]
        assert tokenizer.encode("", add_special=True, parse_special=parse) == [*prefix, *suffix]


def test_flags_put_tokens_around_a_text_where_the_post_processor_does_not(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True}
    tokenizer = made(tmp_path, lambda content: content.update(post_processor=None), "none", tokenizer_config=config)
    assert tokenizer.encode("", add_special=True, parse_special=False) == [1, 2]


def test_the_chat_template_comes_from_the_newest_file(tmp_path: Path) -> None:
    def template(name: str, **files: Any) -> str | None:
        return made(tmp_path / name, **files).chat_template

    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}, "junk"]
    assert template("none") is None
    assert template("text", tokenizer_config={"chat_template": "C"}) == "C"
    assert template("named", tokenizer_config={"chat_template": named}) == "D"
    assert template("nameless", tokenizer_config={"chat_template": named[:1]}) is None
    assert template("json", chat_template={"chat_template": "J"}) == "J"
    assert template("odd", tokenizer_config={"chat_template": 3}) is None
    (tmp_path / "both" / "model").mkdir(parents=True)
    jinja = tmp_path / "both" / "model" / "chat_template.jinja"
    jinja.write_text("{{ 'ü' }}", encoding="utf-8")
    assert template("both", tokenizer_config={"chat_template": "C"}, chat_template={"chat_template": "J"}) == "{{ 'ü' }}"
    jinja.write_bytes(b"\xff")
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja: is not UTF-8 at byte 0"):
        template("both")
    with open(jinja, "r+b") as file:
        file.truncate(4_000_001)
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja: has 4000001 bytes, more than 4000000"):
        template("both")


def test_added_tokens_that_only_other_files_list(tmp_path: Path) -> None:
    extra = {
        "385": {"content": "<|x|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False},
        "381": {"content": EOS, "special": True},
    }
    tokenizer = made(
        tmp_path, config={"vocab_size": 387}, tokenizer_config={"added_tokens_decoder": extra}, added_tokens={"plain": 386}
    )
    assert tokenizer.encode("a<|x|>plain", add_special=False, parse_special=True)[1:] == [385, 386]
    assert 385 not in tokenizer.encode("a<|x|>", add_special=False, parse_special=False)
    assert tokenizer.encode("plain", add_special=False, parse_special=False) == [386]
    assert (tokenizer.token_bytes(385), tokenizer.token_bytes(386)) == (b"", b"plain")


def test_added_tokens_without_an_embedding_are_text(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, config={"vocab_size": 383})  # <tool_call> is 383, three spaces are 384
    for parse in (False, True):
        ids = tokenizer.encode("<tool_call>   ", add_special=False, parse_special=parse)
        assert max(ids) < 383
        assert tokenizer.decode(ids) == "<tool_call>   "
    assert tokenizer.token_bytes(383) == b""


# --- refusals ---------------------------------------------------------------------------------------------------------


CHARSMAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


@pytest.mark.parametrize(
    ("kind", "change", "fault"),
    [
        ("byte_level", put("model", value=None), "it has no object 'model'"),
        ("byte_level", put("model", "type", value="WordPiece"), "tokenizers of type 'WordPiece' cannot give"),
        ("byte_level", put("model", "type", value="WordLevel"), "tokenizers of type 'WordLevel' cannot give"),
        ("byte_level", put("model", "vocab", value=[["a", 0.0]]), "'vocab' of its model is malformed"),
        ("byte_level", put("model", "vocab", "a", value="0"), "'vocab' of its model is malformed"),
        ("unigram", put("model", "vocab", 0, value=["<unk>"]), "'vocab' of its model is malformed"),
        ("byte_level", put("model", "merges", 0, value=["q", "zzz"]), "Token `zzz` out of vocabulary"),
        ("unigram", put("model", "unk_id", value=10_000), "UnkIdNotInVocabulary"),
        ("unigram", put("normalizer", value=CHARSMAP), "Cannot parse precompiled_charsmap"),
        ("byte_level", put("decoder", value=None), "it has no decoder"),
        ("byte_level", put("decoder", value={"type": "WordPiece"}), "its decoder 'WordPiece' is not supported"),
        ("byte_level", put("decoder", value={"type": "BPEDecoder", "suffix": "</w>"}), "its decoder 'BPEDecoder' is not"),
        (
            "byte_level",
            put("decoder", value={"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}),
            "its decoder replaces {'Regex': 'a+'}; only plain text is supported",
        ),
        ("byte_level", put("added_tokens", value={}), "'added_tokens' is malformed"),
        ("byte_level", put("added_tokens", 0, "id", value="380"), "'added_tokens' is malformed"),
        ("byte_level", put("added_tokens", 0, "id", value=-1), "'added_tokens' is malformed"),
        ("byte_level", put("added_tokens", 0, "special", value=1), "'added_tokens' is malformed"),
        (
            "byte_level",
            put("added_tokens", 4, "id", value=390),
            "the added token '   ' has the id 390, but by its place it gets 384",
        ),
    ],
)  # fmt: skip
def test_a_bad_tokenizer_is_refused_with_its_fault(
    tmp_path: Path, kind: str, change: Callable[[Document], None], fault: str
) -> None:
    content = json.loads(document(kind))
    change(content)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"vocab_size": 1000}')
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelFileError) as refusal:
        HFTokenizer(folder)
    assert str(refusal.value).startswith(f"{folder / 'tokenizer.json'}: ")
    assert fault in str(refusal.value)


JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 3, -1, 2.5, "", "x", [], ["x"], {}, {"x": 1}, {"type": "Sequence"}, [[]], 2**40]
)


@settings(deadline=None, max_examples=150)
@given(kind=st.sampled_from(["byte_level", "unigram"]), data=st.data())
def test_whatever_is_wrong_with_the_files_is_refused_as_such(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    settings_of = {"eos_token": "</s>", "added_tokens_decoder": {"0": {"content": "!"}}, "additional_special_tokens": ["x"]}
    content = {"tokenizer": small(kind), "tokenizer_config": settings_of, "generation_config": {"eos_token_id": [1]}}
    node: Any = content[data.draw(st.sampled_from(sorted(content)))]
    while True:  # some way down, replace one value
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            break
        node = node[key]
    node[key] = data.draw(JUNK)
    folder = tmp_path_factory.mktemp("junk")
    (folder / "config.json").write_text('{"vocab_size": 1000}')
    for name, value in content.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    try:
        tokenizer = HFTokenizer(folder)
    except ModelFileError:
        return
    for parse in (False, True):  # what is accepted works
        ids = tokenizer.encode("a</s>", add_special=True, parse_special=parse)
        tokenizer.decode(ids)


def small(kind: str) -> Document:
    """A tokenizer with few enough tokens that a random place in its file is often an interesting one."""
    content: Document = json.loads(document(kind))
    model = content["model"]
    if kind == "unigram":
        model["vocab"] = [["<unk>", 0.0], ["</s>", 0.0], ["a", -1.0], ["▁", -1.0]]
        content["added_tokens"] = [
            {**content["added_tokens"][0], "id": n, "content": t} for n, t in enumerate(["<unk>", "</s>"])
        ]
        content["post_processor"]["special_tokens"]["</s>"]["ids"] = [1]
    else:
        model["vocab"] = {"a": 0, "b": 1, "ab": 2}
        model["merges"] = [["a", "b"]]
        content["added_tokens"] = [{**content["added_tokens"][0], "id": 3}]
        content["post_processor"] = None
    return content


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"config": {"vocab_size": 300}}, "its vocabulary has ids up to 379, but config.json states a vocab_size of 300"),
        ({"config": {"text_config": {"vocab_size": 300}}}, "config.json states a vocab_size of 300"),
        ({"config": {"vocab_size": "many"}}, "config.json: vocab_size is 'many', not a positive whole number"),
        ({"config": {"vocab_size": 0}}, "config.json: vocab_size is 0, not a positive whole number"),
        ({"config": {"vocab_size": 380}}, "it puts the id 380 around a text, but the model has only 380"),
        ({"config": {"eos_token_id": "2"}}, "config.json: eos_token_id holds '2', not a whole number"),
        (
            {"generation_config": {"eos_token_id": [2, 2.5]}},
            "generation_config.json: eos_token_id holds 2.5, not a whole number",
        ),
        ({"added_tokens": {"x": 88}}, "the added token 'x' has the id 88, but by its place it gets 87"),
        ({"added_tokens": {"x": -1}}, "added token 'x' has the id -1, not a whole number"),
        ({"added_tokens": {"new": 400}}, "the added token 'new' has the id 400, but by its place it gets 385"),
        ({"tokenizer_config": {"added_tokens_decoder": {"one": {"content": "x"}}}}, "has the id 'one', not a whole number"),
        ({"tokenizer_config": []}, "tokenizer_config.json: not a usable tokenizer configuration: it is not a JSON object"),
    ],
)
def test_files_that_contradict_each_other_are_refused(tmp_path: Path, files: Mapping[str, Any], fault: str) -> None:
    with pytest.raises(ModelFileError) as refusal:
        made(tmp_path, **files)
    assert fault in str(refusal.value)


def test_a_folder_without_tokenizer_json_is_told_how_to_get_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelFileError, match=r"holds no tokenizer\.json; fetch it from the model's repository, or make it"):
        HFTokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelFileError, match=r"holds no tokenizer\.json, and 'tokenizer\.model' alone cannot be read; "):
        HFTokenizer(tmp_path)
