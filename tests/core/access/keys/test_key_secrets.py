"""The pepper, the files that hold secrets, and keys of the configuration."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from inferflux_core.access.keys.form import new_key
from inferflux_core.access.keys.pepper import Pepper, SecretHash, load_pepper
from inferflux_core.access.keys.settings import ApiKeySettings, StaticKey
from inferflux_core.access.keys.static import read_static_keys, static_hash
from inferflux_core.errors import ConfigError
from inferflux_core.private_files import create_private

KEY = new_key()[1]
PEPPER = Pepper("b", b"b" * 32, {"a": b"a" * 32})


# --- the pepper -------------------------------------------------------------------------------------------------------


def test_match() -> None:
    old = Pepper("a", b"a" * 32).hash(KEY)
    new = PEPPER.hash(KEY)
    stranger = PEPPER.hash(new_key()[1])
    assert old.hash != new.hash
    assert PEPPER.match(KEY, [new]) is new
    assert PEPPER.match(KEY, [stranger, old]) is old
    assert PEPPER.match(KEY, [stranger, stranger]) is None
    assert PEPPER.match(KEY, []) is None
    assert PEPPER.match(KEY, [SecretHash("gone", old.hash)]) is None
    assert PEPPER.match(KEY, [SecretHash("a", new.hash)]) is None  # of another pepper
    assert PEPPER.match(KEY, [SecretHash("b", b"")]) is None


def test_what_stands_for_a_missing_hash_never_matches() -> None:
    pepper = Pepper("a", b"a" * 32)
    pepper._dummy = pepper.hash(KEY)  # by chance once in 2**256
    assert pepper.match(KEY, []) is None
    assert pepper.match(KEY, [SecretHash("gone", pepper.hash(KEY).hash)]) is None


def test_nothing_shows_a_secret() -> None:
    assert repr(PEPPER) == "Pepper('b')"
    assert repr(PEPPER.hash(KEY)) == "SecretHash(pepper_id='b', valid_until=None)"
    assert "a" * 32 not in repr(ApiKeySettings.model_validate({"pepper": "a" * 32}))


@pytest.mark.parametrize("secret", [b"", b"x" * 31])
def test_a_short_pepper(secret: bytes) -> None:
    with pytest.raises(ConfigError, match=f"'p1' has {len(secret)} bytes, fewer than 32.*openssl rand"):
        Pepper("p1", secret)
    with pytest.raises(ConfigError, match="'old' has"):
        Pepper("p1", b"x" * 32, {"old": secret})


def test_the_pepper_is_made_once(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "state"
    first = load_pepper(ApiKeySettings(), folder)
    path = folder / "pepper"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(bytes.fromhex(path.read_text())) == 32
    assert load_pepper(ApiKeySettings(), folder).hash(KEY) == first.hash(KEY)
    assert [name.name for name in folder.iterdir()] == ["pepper"]
    assert load_pepper(ApiKeySettings.model_validate({"pepper": path.read_text().strip()}), folder).hash(KEY) == first.hash(KEY)


def test_starting_together_makes_one_pepper(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda _: load_pepper(ApiKeySettings(), tmp_path).hash(KEY), range(16)))
    assert made == made[:1] * 16
    assert [name.name for name in tmp_path.iterdir()] == ["pepper"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o660])
def test_a_pepper_that_others_may_read(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "pepper"
    path.write_bytes(b"x" * 32)
    path.chmod(mode)
    for settings in (ApiKeySettings(), ApiKeySettings(pepper_file=path)):
        with pytest.raises(ConfigError, match="chmod 600"):
            load_pepper(settings, tmp_path)


def test_a_pepper_file_that_is_named_is_never_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_pepper(ApiKeySettings(pepper_file=tmp_path / "none"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_pepper_file(tmp_path: Path) -> None:
    assert create_private(tmp_path / "pepper", b"\n")
    with pytest.raises(ConfigError, match="has 0 bytes"):
        load_pepper(ApiKeySettings(), tmp_path)


def test_a_pepper_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "pepper").mkdir()
    with pytest.raises(ConfigError, match="not a regular file"):
        load_pepper(ApiKeySettings(), tmp_path)


def test_previous_peppers_from_files(tmp_path: Path) -> None:
    assert create_private(tmp_path / "old", b"a" * 32 + b"\n")
    settings = {"pepper": "b" * 32, "pepper_id": "b", "previous_peppers": [{"id": "a", "pepper_file": tmp_path / "old"}]}
    loaded = load_pepper(ApiKeySettings.model_validate(settings), tmp_path)
    assert loaded.id == "b"
    assert set(loaded.ids) == {"a", "b"}
    assert loaded.match(KEY, [Pepper("a", b"a" * 32).hash(KEY)]) is not None


def test_a_private_file_is_never_overwritten(tmp_path: Path) -> None:
    assert create_private(tmp_path / "f", b"1")
    assert not create_private(tmp_path / "f", b"2")
    assert (tmp_path / "f").read_bytes() == b"1"
    assert os.listdir(tmp_path) == ["f"]


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pepper": "x" * 32, "pepper_file": "/p"}, "either pepper or pepper_file"),
        ({"previous_peppers": [{"id": "p1", "pepper": "x" * 32}]}, "must differ"),
        ({"previous_peppers": [{"id": "p0"}]}, "either pepper or pepper_file"),
        ({"pepper_id": "a:b"}, "1 to 32"),
        ({"key_env": "PROD"}, "lower-case"),
        ({"keys": [{"name": "k"}]}, "either hash or env"),
        ({"keys": [{"name": "k", "hash": "x", "env": "Y"}]}, "either hash or env"),
        ({"keys": [{"name": "k", "hash": KEY}]}, "not as 'inferctl admin api-keys hash' prints it"),
        ({"keys": [{"name": "k", "env": "X", "scopes": ["root"]}]}, "scopes"),
        ({"key": []}, "Extra inputs"),
    ],
)
def test_settings_that_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words) as caught:
        ApiKeySettings.model_validate(values)
    assert all(KEY not in str(error["msg"]) for error in caught.value.errors())  # what the plugin registry shows


# --- keys of the configuration ----------------------------------------------------------------------------------------


def test_the_hash_of_the_configuration_is_no_credential() -> None:
    text = static_hash(KEY, PEPPER)
    assert text == f"hmac-sha256:b:{KEY[9:21]}:{PEPPER.hash(KEY).hash.hex()}"
    with pytest.raises(ConfigError, match="not a whole key"):
        static_hash(text, PEPPER)


def test_from_hash_and_variable() -> None:
    by_hash, by_variable = new_key(), new_key()
    keys = (StaticKey(hash=static_hash(by_hash[1], PEPPER), name="a"), StaticKey(env="K", name="b"))
    found = read_static_keys(keys, PEPPER, {"K": by_variable[1] + "\n"})
    assert {key_id: (record.name, secret) for key_id, (record, secret) in found.items()} == {
        by_hash[0]: ("a", PEPPER.hash(by_hash[1])),
        by_variable[0]: ("b", PEPPER.hash(by_variable[1])),
    }


@pytest.mark.parametrize(
    ("variable", "words"),
    [({}, "is not set"), ({"K": ""}, "is not set"), ({"K": "sk-secret"}, "whole key"), ({"K": KEY[:-1]}, "whole key")],
)
def test_a_variable_without_a_key(variable: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=f"'K'.*{words}") as caught:
        read_static_keys([StaticKey(env="K", name="shop")], PEPPER, variable)
    assert "'shop'" in str(caught.value)
    assert not variable.get("K") or variable["K"] not in str(caught.value)


def test_two_keys_with_one_id() -> None:
    key = StaticKey(hash=static_hash(KEY, PEPPER), name="a")
    with pytest.raises(ConfigError, match="'a' and 'b' have one id"):
        read_static_keys([key, StaticKey(env="K", name="b")], PEPPER, {"K": KEY})


def test_a_hash_of_an_unknown_pepper() -> None:
    key = StaticKey(hash=static_hash(KEY, Pepper("z", b"z" * 32)), name="a")
    with pytest.raises(ConfigError, match="'z', which is not configured"):
        read_static_keys([key], PEPPER, {})
