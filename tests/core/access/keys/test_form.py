"""The form of API keys: what is one, what is not, and that looking costs nothing."""

from __future__ import annotations

import re
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux_core.access.keys.form import KEY_PATTERN, ParsedKey, checksum, is_key_id, new_key, parse_key

KEY = "ifx_live_4fK1c09ZtQpX_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefg"
KEY += checksum(KEY)
BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def test_the_parts() -> None:
    key_id, key = new_key("test")
    assert parse_key(key) == ParsedKey("test", key_id)
    assert len(key) == len("ifx_test_") + 12 + 1 + 43 + 6
    assert new_key("live", key_id)[0] == key_id
    assert new_key("live", key_id)[1] != new_key("live", key_id)[1]


def test_the_checksum_is_crc32_in_base62() -> None:
    body, tail = KEY[:-6], KEY[-6:]
    number = 0
    for digit in tail:
        number = number * 62 + BASE62.index(digit)
    assert number == zlib.crc32(body.encode())
    assert parse_key(KEY) == ParsedKey("live", "4fK1c09ZtQpX")


@given(st.integers(0, len(KEY) - 1), st.sampled_from(BASE62 + "_"))
def test_a_wrong_character_is_noticed(position: int, character: str) -> None:
    typed = KEY[:position] + character + KEY[position + 1 :]
    assert (parse_key(typed) is not None) is (typed == KEY)


@given(st.integers(0, len(KEY) - 2))
def test_swapped_neighbours_are_noticed(position: int) -> None:
    typed = KEY[:position] + KEY[position + 1] + KEY[position] + KEY[position + 2 :]
    assert (parse_key(typed) is not None) is (typed == KEY)


@given(st.text())
def test_no_text_is_a_key_by_accident(text: str) -> None:
    assert parse_key(text) is None


HOSTILE = [
    "",
    "ifx_",
    KEY[:-1],
    KEY + "0",
    KEY + "\n",
    KEY + checksum(KEY),
    " " + KEY,
    KEY.replace("ifx_", "IFX_"),
    KEY.replace("live", "LIVE"),
    KEY.replace("live", ""),
    KEY.replace("live", "a" * 17),
    "' OR 1=1 --",
    "ifx_live_' OR 1=1 --__" + "a" * 49,
    KEY.replace("4", "\x00"),
    KEY.replace("4", "\u0664"),  # a digit for Python's isdigit and int
    KEY.replace("4", "\ud800"),
    "ifx_live_" + "a" * 2**20,
    KEY * 10_000,
    "a" * 64,  # the form of a stored hash
    "hmac-sha256:p1:4fK1c09ZtQpX:" + "a" * 64,
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_key(text: str) -> None:
    assert parse_key(text) is None


@pytest.mark.parametrize("env", ["", "Live", "live_", "1st", "a" * 17, "live\n", "ä"])
def test_env_that_cannot_stand_in_a_key(env: str) -> None:
    with pytest.raises(ValueError, match="cannot stand in a key"):
        new_key(env)


@pytest.mark.parametrize("key_id", ["", "short", "4fK1c09ZtQp!", "4fK1c09ZtQpX\n", "4fK1c09ZtQpXX"])
def test_id_that_cannot_stand_in_a_key(key_id: str) -> None:
    assert not is_key_id(key_id)
    with pytest.raises(ValueError, match="no key id"):
        new_key("live", key_id)


def test_the_pattern_for_secret_scanners() -> None:
    keys = [new_key()[1], new_key("test")[1]]
    text = f"curl -H 'Authorization: Bearer {keys[0]}'\nOPENAI_API_KEY={keys[1]};ifx_live_nothing"
    assert re.findall(KEY_PATTERN, text) == keys


def test_every_position_of_a_secret_is_random() -> None:
    secrets = [new_key()[1][-49:-6] for _ in range(200)]
    for position in range(43):
        assert len({secret[position] for secret in secrets}) > 40  # of 62; by chance fewer than 40 once in 10**20
