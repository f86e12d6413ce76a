"""The tokenizer: exact text back, transformers' and llama.cpp's ids, and no control token from what a user wrote."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.detokenizer import Detokenizer
from torch_backend.tiny_tokenizers import BOS, EOS, KINDS, USER, write_folder
from torch_backend.tokenizer_case import Document, Loaded, document, made, put, rename
from torch_backend.twin import demo_twin

tokenizers = pytest.importorskip("tokenizers", reason="the backend's tokenizers are run by it")

from inferflux_backend_torch.piece_decoder import PieceDecoder  # noqa: E402 - after the skip
from inferflux_backend_torch.tokenizer import HFTokenizer, eos_token_ids  # noqa: E402 - after the skip

QUICK = settings(deadline=None, max_examples=100)
WORDS = st.sampled_from(
    [" ", "  ", "\n", "the", " start", "12", "é", "🙂", "漢", "\u0301", "isn't", "<|", "|>", "<s", ">", "\t"]
)
TEXTS = st.one_of(st.text(max_size=30), st.lists(WORDS, max_size=12).map("".join))


@pytest.fixture(scope="module", params=sorted(KINDS))
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return Loaded(write_folder(tmp_path_factory.mktemp("tiny"), json.loads(document(request.param))))


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return Loaded(demo_twin())


def transformers_ids(folder: Path) -> Callable[[str], list[int]]:
    transformers = pytest.importorskip("transformers", reason="it is what the ids are compared with")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about its own internals
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, tokenizer_class="PreTrainedTokenizerFast")
    return lambda text: list(tokenizer(text)["input_ids"])


# --- text to ids and back ---------------------------------------------------------------------------------------------


def spelt(loaded: Loaded, text: str) -> str:
    """The text as far as this kind of vocabulary can tell it: ▁ is a space, and one space in front may be the tokenizer's."""
    if loaded.document["decoder"]["type"] == "ByteLevel":
        return text
    text = text.replace("▁", " ")
    adds = (loaded.document["pre_tokenizer"] or {}).get("type") == "Metaspace"
    return text[1:] if adds and text.startswith(" ") else text


@QUICK
@given(text=TEXTS)
def test_a_text_comes_back_exactly(tiny: Loaded, text: str) -> None:
    ids = tiny.encode(text)
    assert tiny.tokenizer.decode(ids) == spelt(tiny, text)
    assert tiny.tokenizer.decode(ids, special=True) == spelt(tiny, text)


@QUICK
@given(text=TEXTS)
def test_token_by_token_a_text_has_at_most_a_space_more_in_front(tiny: Loaded, text: str) -> None:
    data = b"".join(map(tiny.tokenizer.token_bytes, tiny.encode(text)))
    adds = tiny.tokenizer.token_bytes(tiny.encode("the")[0]).startswith(b" ")
    assert data == (b" " if adds and text else b"") + spelt(tiny, text).encode()


@QUICK
@given(before=TEXTS, after=TEXTS)
def test_what_goes_on_from_a_prompt_is_exact_from_the_first_token(tiny: Loaded, before: str, after: str) -> None:
    """Streaming the second half of a text's tokens gives the rest of the text."""
    ids = tiny.encode(before + after)
    cut = len(ids) // 2
    detokenizer = Detokenizer(tiny.tokenizer)
    shown = detokenizer.push(ids[cut:]) + detokenizer.finish()
    whole = b"".join(map(tiny.tokenizer.token_bytes, ids))
    assert shown == whole[len(b"".join(map(tiny.tokenizer.token_bytes, ids[:cut]))) :].decode("utf-8", "replace")


def test_ids_are_those_of_transformers(tiny: Loaded) -> None:
    reference = transformers_ids(tiny.folder)
    control = "".join(sorted(tiny.tokenizer.special_tokens))

    @QUICK
    @given(text=st.one_of(TEXTS, st.lists(st.one_of(WORDS, st.sampled_from([control, BOS, EOS, "</s>", "<s>"]))).map("".join)))
    def check(text: str) -> None:
        assert tiny.tokenizer.encode(text, add_special=True, parse_special=True) == reference(text)

    check()


def test_the_demo_s_text_comes_back_exactly(demo: Loaded) -> None:
    tokens = range(demo.tokenizer.vocab_size)
    known = {piece[0] for token in tokens if len(piece := demo.tokenizer.token_bytes(token)) == 1}
    assert len(known) == 235  # its vocabulary lacks the others: those that begin rare code points, or are no UTF-8

    @QUICK
    @given(text=TEXTS)
    def check(text: str) -> None:
        data = bytes(byte for byte in text.encode() if byte in known)
        ids = demo.encode(text)
        assert b"".join(map(demo.tokenizer.token_bytes, ids)) == data
        assert demo.tokenizer.decode(ids) == data.decode("utf-8", "replace")

    check()


def test_the_demo_s_ids_are_those_of_transformers(demo: Loaded) -> None:
    reference = transformers_ids(demo.folder)

    @QUICK
    @given(
        text=st.one_of(TEXTS, st.lists(st.one_of(WORDS, st.sampled_from(sorted(demo.tokenizer.special_tokens)))).map("".join))
    )
    def check(text: str) -> None:
        assert demo.tokenizer.encode(text, add_special=True, parse_special=True) == reference(text)

    check()


def test_the_demo_s_ids_are_those_of_llama_cpp(demo: Loaded) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed, whose ids these are compared with")
    from inferflux_backend_llamacpp.tokenizer import LlamaCppTokenizer
    from inferflux_core.interfaces import SourceContext
    from inferflux_core.models.sources import DemoSource

    other = LlamaCppTokenizer(DemoSource().resolve("demo", SourceContext()))
    own = demo.tokenizer
    assert own.vocab_size == other.vocab_size
    assert (own.bos_token, own.eos_token, own.special_tokens) == (other.bos_token, other.eos_token, other.special_tokens)
    for special in (False, True):
        for token in range(own.vocab_size):
            assert own.token_bytes(token, special=special) == other.token_bytes(token, special=special)

    @QUICK
    @given(text=st.lists(st.one_of(WORDS, st.sampled_from(sorted(own.special_tokens)))).map("".join), parse=st.booleans())
    def check(text: str, parse: bool) -> None:
        ids = own.encode(text, add_special=False, parse_special=parse)
        assert ids == other.encode(text, add_special=False, parse_special=parse)

    check()


def test_the_demo_tells_what_it_is(demo: Loaded) -> None:
    tokenizer = demo.tokenizer
    assert (tokenizer.vocab_size, set(tokenizer.eos_token_ids)) == (49152, {0, 2})
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    assert tokenizer.chat_template is not None
    assert tokenizer.chat_template.startswith("{% for message in messages %}")
    assert eos_token_ids(demo.folder, {"vocab_size": 49152}) == {0, 2}


def test_many_threads_get_the_same_ids(demo: Loaded) -> None:
    texts = [f"{BOS}user\nQuestion {n}: what is {n} times {n + 1}?{EOS}" for n in range(50)]
    expected = [(demo.encode(text), demo.encode(text, parse_special=True)) for text in texts]
    fresh = HFTokenizer(demo.folder)
    with ThreadPoolExecutor(4) as pool:
        plain = pool.map(lambda text: fresh.encode(text, add_special=False, parse_special=False), texts)
        parsed = pool.map(lambda text: fresh.encode(text, add_special=False, parse_special=True), texts)
        assert list(zip(plain, parsed, strict=True)) == expected


# --- what a user writes stays text -----------------------------------------------------------------------------------


@QUICK
@given(data=st.data())
def test_no_text_of_a_user_gives_a_control_token(tiny: Loaded, data: st.DataObject) -> None:
    control = sorted(tiny.tokenizer.special_tokens)
    text = data.draw(st.lists(st.one_of(WORDS, st.sampled_from(control), st.text(max_size=3))).map("".join))
    ids = tiny.encode(text)
    numbers = {tokenizers.Tokenizer.from_file(str(tiny.folder / "tokenizer.json")).token_to_id(text) for text in control}
    assert not numbers.intersection(ids)
    assert tiny.tokenizer.decode(ids) == spelt(tiny, text)


def test_control_tokens_in_text_are_read_as_if_the_vocabulary_had_none(demo: Loaded) -> None:
    # all of the demo's added tokens are control tokens, and their texts come out of no merge
    without = tokenizers.Tokenizer.from_str(json.dumps({**demo.document, "added_tokens": []}))

    @QUICK
    @given(text=st.lists(st.one_of(WORDS, st.sampled_from(sorted(demo.tokenizer.special_tokens)))).map("".join))
    def check(text: str) -> None:
        assert demo.encode(text) == without.encode(text).ids

    check()


def test_the_spelling_of_a_control_token(demo: Loaded) -> None:
    assert demo.encode("<|im_start|>user", parse_special=True) == [1, 4093]
    plain = demo.encode("<|im_start|>user")
    assert [demo.tokenizer.token_bytes(token) for token in plain] == [b"<", b"|", b"im", b"_", b"start", b"|", b">", b"user"]


def test_unmarked_tokens_that_look_like_control_tokens_are_read_from_templates_only(tmp_path: Path) -> None:
    tokenizer = made(tmp_path)
    assert USER in tokenizer.special_tokens
    [number] = tokenizer.encode(USER, add_special=False, parse_special=True)
    assert number not in tokenizer.encode(USER, add_special=False, parse_special=False)
    assert tokenizer.token_bytes(number) == USER.encode()  # the maker wants to see it in the output
    assert "<tool_call>" not in tokenizer.special_tokens
    [number] = tokenizer.encode("<tool_call>", add_special=False, parse_special=False)
    assert tokenizer.token_bytes(number) == b"<tool_call>"


def test_a_token_that_only_its_name_makes_special_is_control(tmp_path: Path) -> None:
    def unlist(content: Document) -> None:
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "</s>"]

    for number, name in enumerate(({"eos_token": "</s>"}, {"eos_token": {"content": "</s>", "special": True}})):
        tokenizer = made(tmp_path / str(number), unlist, "none", tokenizer_config=name)
        assert tokenizer.special_tokens == {"<unk>", "<s>", "</s>"}
        assert tokenizer.encode("</s>", add_special=False, parse_special=True) == [2]
        assert 2 not in tokenizer.encode("</s>", add_special=False, parse_special=False)
    tokenizer = made(tmp_path / "extra", unlist, "none", special_tokens_map={"additional_special_tokens": ["</s>", "end"]})
    assert tokenizer.token_bytes(tokenizer.encode("end", add_special=False, parse_special=False)[0]) == b"end"
    assert tokenizer.special_tokens == {"<unk>", "<s>", "</s>"}  # ordinary words stay words


def test_truncation_and_padding_of_the_file_do_not_apply(tmp_path: Path) -> None:
    def cut(content: Document) -> None:
        content["truncation"] = {"max_length": 2, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
        padding = {"strategy": {"Fixed": 99}, "direction": "Left", "pad_id": 3, "pad_type_id": 0, "pad_token": "x"}
        content["padding"] = {**padding, "pad_to_multiple_of": None}

    tokenizer = made(tmp_path, cut)
    for parse in (False, True):
        ids = tokenizer.encode("the start of the end", add_special=False, parse_special=parse)
        assert tokenizer.decode(ids) == "the start of the end"
        assert 2 < len(ids) < 99


def test_text_that_is_no_unicode_is_the_request_s_fault(demo: Loaded) -> None:
    with pytest.raises(InvalidRequestError, match="the text cannot be tokenised"):
        demo.encode("a\ud800b")


# --- bytes of tokens --------------------------------------------------------------------------------------------------


def test_control_tokens_are_no_text_unless_asked_for(tiny: Loaded) -> None:
    marked = [token for token in tiny.document["added_tokens"] if token["special"]]
    assert marked
    for token in marked:
        assert tiny.tokenizer.token_bytes(token["id"]) == b""
        assert tiny.tokenizer.token_bytes(token["id"], special=True) == token["content"].encode()
    ids = [marked[0]["id"], *tiny.encode("the end"), marked[1]["id"]]
    assert tiny.tokenizer.decode(ids) == "the end"
    if tiny.tokenizer.token_bytes(ids[1]).startswith(b" "):  # it stands behind a control token, not at the beginning
        assert tiny.tokenizer.decode(ids, special=True) == f"{marked[0]['content']} the end{marked[1]['content']}"
    else:
        assert tiny.tokenizer.decode(ids, special=True) == f"{marked[0]['content']}the end{marked[1]['content']}"


def test_ids_that_no_token_has_are_no_text(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, config={"vocab_size": 1000})  # padded, as many models are
    assert tokenizer.vocab_size == 1000
    for token in (-1, 385, 999, 1000, 2**40):
        assert tokenizer.token_bytes(token) == tokenizer.token_bytes(token, special=True) == b""
    assert tokenizer.token_bytes(384) == b"   "


def test_every_byte_has_its_token(tmp_path: Path) -> None:
    for kind in ("byte_level", "none"):
        tokenizer = made(tmp_path / kind, kind=kind)
        single = {tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)}
        assert single.issuperset(bytes([byte]) for byte in range(256))


def test_added_tokens_are_spelt_out(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, rename({"<tool_call>": "<été>"}))
    assert tokenizer.encode("<été>", add_special=False, parse_special=False) == [383]
    assert tokenizer.token_bytes(383) == "<été>".encode()  # though each of its letters stands for a byte in this vocabulary


def test_what_the_vocabulary_cannot_spell_is_its_unknown_token(tmp_path: Path) -> None:
    tokenizer = made(tmp_path, put("model", "byte_fallback", value=False), "none")
    for parse in (False, True):
        ids = tokenizer.encode("the 漢字 end", add_special=False, parse_special=parse)
        assert ids.count(0) == 1  # both characters fused
        assert tokenizer.decode(ids) == "the  end"


@pytest.mark.parametrize(
    ("decoder", "pieces"),
    [
        ({"type": "ByteLevel"}, {"Ġthe": b" the", "Ċ": b"\n", "Ã": b"\xc3", "Ã©": "é".encode(), "▁a": "▁a".encode()}),
        ({"type": "Metaspace", "replacement": "▁"}, {"▁the▁end": b" the end", "<0x0A>": b"<0x0A>"}),
        ({"type": "Metaspace", "replacement": "_"}, {"_a": b" a", "▁a": "▁a".encode()}),
        (
            {
                "type": "Sequence",
                "decoders": [
                    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                    {"type": "ByteFallback"},
                    {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
                ],
            },
            {"▁▁": b"  ", "<0x0A>": b"\n", "<0xfF>": b"\xff", "<0x0A>.": b"<0x0A>.", "<0xG0>": b"<0xG0>", "é": "é".encode()},
        ),
    ],
)
def test_pieces_become_bytes(decoder: Document, pieces: Mapping[str, bytes]) -> None:
    decode = PieceDecoder(decoder).piece_bytes
    assert {piece: decode(piece) for piece in pieces} == pieces


@QUICK
@given(data=st.binary(max_size=40))
def test_the_byte_alphabet_is_that_of_the_library(data: bytes) -> None:
    """What the library spells a text as, read back letter by letter."""
    text = data.decode("utf-8", "ignore")
    pieces = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    decode = PieceDecoder({"type": "ByteLevel"}).piece_bytes
    assert b"".join(decode(piece) for piece, _ in pieces) == text.encode()
