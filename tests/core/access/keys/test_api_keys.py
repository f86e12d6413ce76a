"""The provider `api_keys`: whom it lets in, for how long, and what it does when it cannot know."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from core.access.keys.key_stand import NOW, Stand
from inferflux_core.access.keys import provider as api_keys
from inferflux_core.access.keys.form import new_key
from inferflux_core.access.keys.pepper import load_pepper
from inferflux_core.access.keys.records import KeyChange, NewKey, key_principal
from inferflux_core.access.keys.ring import open_keys
from inferflux_core.access.keys.settings import ApiKeySettings, StaticKey
from inferflux_core.access.keys.static import static_hash
from inferflux_core.errors import AccessUnavailableError, AuthenticationError, ConfigError
from inferflux_core.identity import Principal
from inferflux_core.settings import Limits


@pytest.fixture
async def stand(tmp_path: Path) -> AsyncIterator[Stand]:
    stand = Stand(tmp_path)
    await stand.provider.start()
    yield stand
    await stand.provider.close()


async def test_a_good_key(stand: Stand) -> None:
    record, key = await stand.keys.create(NewKey(name="k", tenant="acme", limits=Limits(rpm=5)))
    assert stand.provider.claims(key)
    assert await stand.provider.authenticate(key, "192.0.2.1") == key_principal(record)


@pytest.mark.parametrize("credential", ["", "sk-123", "eyJhbGciOi.J9.x", "IFX_live", " ifx_", "Bearer ifx_"])
async def test_credentials_of_others(stand: Stand, credential: str) -> None:
    assert not stand.provider.claims(credential)


async def test_bad_form_or_checksum_does_not_ask_the_store(stand: Stand) -> None:
    _, key = await stand.keys.create(NewKey(name="k"))
    ((stored,),) = stand.keys.store.read("SELECT hash FROM key_hashes")
    stand.path.unlink()  # asking would be a 503
    wrong = [
        key[:-1] + ("0" if key[-1] != "0" else "1"),
        key.swapcase(),
        "ifx_' OR 1=1 --",
        "ifx_live_\x00",
        "ifx_live_\u0664",
        "ifx_" + "a" * 2**20,
        stored.hex(),
        "ifx_" + stored.hex(),
    ]
    assert [await stand.who(credential) for credential in wrong] == ["malformed_key"] * len(wrong)
    assert stand.reads == 0


async def test_every_reason(stand: Stand) -> None:
    record, key = await stand.keys.create(NewKey(name="k", expires_in_s=100))
    assert await stand.who(new_key()[1]) == "unknown_key"
    assert await stand.who(new_key("live", record.id)[1]) == "wrong_secret"
    assert await stand.who(key) == key_principal(record)
    stand.time = 99.9
    assert await stand.who(key) == key_principal(record)
    stand.time = 100
    assert await stand.who(key) == "expired_key"
    await stand.keys.revoke(record.id, None)
    assert await stand.who(key) == "revoked_key"
    assert await stand.who(new_key("live", record.id)[1]) == "wrong_secret"  # who cannot prove it learns nothing


async def test_what_is_raised_shows_nothing_of_the_key(stand: Stand) -> None:
    record, _ = await stand.keys.create(NewKey(name="k"))
    wrong = new_key("live", record.id)[1]
    with pytest.raises(AuthenticationError) as caught:
        await stand.provider.authenticate(wrong, None)
    assert wrong not in repr(caught.value) + caught.value.message + repr(stand.provider._known)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)


@pytest.mark.parametrize(
    ("address", "fine"),
    [
        ("10.1.2.3", True),
        ("11.0.0.1", False),
        ("2001:db8::7", True),
        ("2001:db9::7", False),
        ("::ffff:10.1.2.3", True),
        ("::ffff:11.0.0.1", False),
        (None, False),
        ("", False),
        ("unix:", False),
        ("10.1.2.3, 11.0.0.1", False),
    ],
)
async def test_networks(stand: Stand, address: str | None, fine: bool) -> None:
    record, key = await stand.keys.create(NewKey(name="k", cidr=("10.0.0.0/8", "2001:db8::/32")))
    assert await stand.who(key, address) == (key_principal(record) if fine else "wrong_address")


# --- the cache -------------------------------------------------------------------------------------------------------


async def test_the_store_is_asked_once_a_second(stand: Stand) -> None:
    record, key = await stand.keys.create(NewKey(name="k"))
    stranger = new_key()[1]
    for _ in range(5):
        assert await stand.who(key) == key_principal(record)
        assert await stand.who(stranger) == "unknown_key"
    assert stand.reads == 2
    stand.time = 0.999
    await stand.who(key)
    assert stand.reads == 2
    stand.time = 1.0
    await stand.who(key)
    await stand.who(stranger)
    assert stand.reads == 4


async def test_a_change_in_this_process_is_in_force_at_once(stand: Stand) -> None:
    record, key = await stand.keys.create(NewKey(name="k"))
    await stand.who(key)
    changed = await stand.keys.update(record.id, KeyChange(scopes=frozenset({"read"})), 1)
    assert await stand.who(key) == key_principal(changed)
    await stand.keys.revoke(record.id, None)
    assert await stand.who(key) == "revoked_key"


async def test_a_revocation_by_another_process_is_in_force_within_a_second(stand: Stand, tmp_path: Path) -> None:
    record, key = await stand.keys.create(NewKey(name="k"))
    assert await stand.who(key) == key_principal(record)
    other = open_keys(ApiKeySettings(), tmp_path)
    await other.revoke(record.id, None)
    _, made_there = await other.create(NewKey(name="new"))
    other.close()
    stand.time = 1.0
    assert await stand.who(key) == "revoked_key"
    assert isinstance(await stand.who(made_there), Principal)


async def test_strangers_neither_fill_memory_nor_push_keys_out(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "MAX_UNKNOWN", 10)
    monkeypatch.setattr(api_keys, "MAX_KNOWN", 3)
    made = [(await stand.keys.create(NewKey(name="k")))[1] for _ in range(4)]
    for key in made[:3]:
        await stand.who(key)
    for _ in range(50):
        await stand.who(new_key()[1])
    assert len(stand.provider._unknown) == 10
    before = stand.reads
    for key in made[:3]:
        assert isinstance(await stand.who(key), Principal)
    assert stand.reads == before
    await stand.who(made[3])
    assert len(stand.provider._known) == 3


# --- constant work ----------------------------------------------------------------------------------------------------


async def test_equal_work_whatever_is_wrong(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two HMACs, two comparisons of 32 bytes, one decoded row and one read: for a good key, a wrong secret, a stranger's."""
    work: list[str] = []

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            work.append(f"{name} {len(args[0])} {len(args[1])}" if name == "compare" else name)
            return function(*args)

        return call

    record, key = await stand.keys.create(NewKey(name="k"))
    rotated, _ = await stand.keys.create(NewKey(name="k"))
    _, twice = await stand.keys.rotate(rotated.id, 60, None)
    monkeypatch.setattr(hmac, "digest", watched("hmac", hmac.digest))
    monkeypatch.setattr(hmac, "compare_digest", watched("compare", hmac.compare_digest))
    monkeypatch.setattr(api_keys.key_rows, "record_of", watched("decode", api_keys.key_rows.record_of))
    for credential in (key, new_key("live", record.id)[1], new_key()[1], twice):
        stand.time += 2
        work.clear()
        reads = stand.reads
        await stand.who(credential)
        assert (work, stand.reads - reads) == (["decode", *["hmac", "compare 32 32"] * 2], 1)
        work.clear()
        await stand.who(credential)
        assert (work, stand.reads - reads) == (["hmac", "compare 32 32"] * 2, 1)


# --- rotation ---------------------------------------------------------------------------------------------------------


async def test_rotation_with_an_overlap(stand: Stand) -> None:
    record, first = await stand.keys.create(NewKey(name="k"))
    rotated, second = await stand.keys.rotate(record.id, 60, None)
    assert await stand.who(second) == key_principal(rotated)
    assert await stand.who(first) == replace(key_principal(rotated), expires_at=NOW + 60)
    stand.time = 59.9
    assert isinstance(await stand.who(first), Principal)
    stand.time = 60
    assert await stand.who(first) == "rotated_key"
    assert await stand.who(second) == key_principal(rotated)


async def test_rotation_without_one(stand: Stand) -> None:
    record, first = await stand.keys.create(NewKey(name="k"))
    await stand.who(first)
    _, second = await stand.keys.rotate(record.id, 0, None)
    assert await stand.who(first) == "rotated_key"
    assert isinstance(await stand.who(second), Principal)


async def test_rotating_twice_ends_the_first_secret(stand: Stand) -> None:
    record, first = await stand.keys.create(NewKey(name="k", expires_in_s=1000))
    _, second = await stand.keys.rotate(record.id, 3600, None)
    rotated, third = await stand.keys.rotate(record.id, 3600, None)
    assert await stand.who(first) == "wrong_secret"
    assert await stand.who(second) == key_principal(rotated)  # the key itself expires before the overlap ends
    assert await stand.who(third) == key_principal(rotated)
    await stand.keys.revoke(record.id, None)
    assert [await stand.who(key) for key in (second, third)] == ["revoked_key"] * 2


# --- peppers and keys of the configuration ----------------------------------------------------------------------------


async def test_peppers_rotate(tmp_path: Path) -> None:
    stand = Stand(tmp_path, ApiKeySettings(pepper="a" * 32, pepper_id="a"))
    record, key = await stand.keys.create(NewKey(name="k"))
    await stand.provider.close()
    both = {"pepper": "b" * 32, "pepper_id": "b", "previous_peppers": [{"id": "a", "pepper": "a" * 32}]}
    stand = Stand(tmp_path, ApiKeySettings.model_validate(both))
    assert await stand.who(key) == key_principal(record)
    rotated, second = await stand.keys.rotate(record.id, 3600, None)
    assert await stand.who(key) == replace(key_principal(rotated), expires_at=NOW + 3600)
    await stand.provider.close()
    stand = Stand(tmp_path, ApiKeySettings.model_validate({"pepper": "b" * 32, "pepper_id": "b"}))
    assert await stand.who(key) == "wrong_secret"
    assert await stand.who(second) == key_principal(rotated)
    await stand.provider.close()


async def test_static_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hashed_id, hashed), (env_id, in_env) = new_key(), new_key("prod")
    monkeypatch.setenv("SHOP_KEY", in_env)
    settings = ApiKeySettings(
        keys=(
            StaticKey(hash=static_hash(hashed, load_pepper(ApiKeySettings(), tmp_path)), name="a", tenant="acme", priority=3),
            StaticKey.model_validate({"env": "SHOP_KEY", "name": "b", "cidr": ["10.0.0.0/8"], "expires_at": NOW + 10}),
        )
    )
    stand = Stand(tmp_path, settings)
    monkeypatch.delenv("SHOP_KEY")
    a = Principal(subject=f"key:{hashed_id}", tenant="acme", method="api_keys", priority=3, name="a")
    assert await stand.who(hashed) == a
    b = Principal(subject=f"key:{env_id}", method="api_keys", expires_at=NOW + 10, name="b")
    assert await stand.who(in_env, "10.0.0.1") == b
    assert await stand.who(in_env, "11.0.0.1") == "wrong_address"
    assert await stand.who(new_key("prod", env_id)[1]) == "wrong_secret"
    stand.path.unlink()
    stand.time = 10
    assert await stand.who(in_env, "10.0.0.1") == "expired_key"
    assert await stand.who(hashed) == a  # the store has no part in it
    assert in_env not in repr(stand.provider._static)
    await stand.provider.close()


async def test_a_static_key_that_is_in_the_store_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = open_keys(ApiKeySettings(), tmp_path)
    _, key = await keys.create(NewKey(name="k"))
    keys.close()
    monkeypatch.setenv("SHOP_KEY", key)
    with pytest.raises(ConfigError, match="also a key of the store") as caught:
        Stand(tmp_path, ApiKeySettings(keys=(StaticKey(env="SHOP_KEY", name="a"),)))
    assert key not in str(caught.value)


# --- when it cannot know ----------------------------------------------------------------------------------------------


async def test_a_store_that_is_gone(stand: Stand) -> None:
    record, key = await stand.keys.create(NewKey(name="k"))
    assert await stand.who(key) == key_principal(record)
    stand.path.unlink()
    stand.time = 1.0
    for credential in (key, new_key()[1]):
        with pytest.raises(AccessUnavailableError) as caught:
            await stand.provider.authenticate(credential, None)
        assert (caught.value.status, caught.value.code) == (503, "auth_unavailable")
        assert caught.value.headers["Retry-After"] == "1"
    assert stand.counts["store_error"] == 2


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE keys SET scopes = '[\"root\"]'",
        "UPDATE keys SET cidr = '[\"everywhere\"]'",
        "UPDATE keys SET roles = '{'",
        "ALTER TABLE keys RENAME COLUMN revoked_at TO revoked",
        "DROP TABLE key_hashes",
    ],
)
async def test_a_store_that_is_damaged(stand: Stand, damage: str) -> None:
    _, key = await stand.keys.create(NewKey(name="k"))
    await stand.keys.store.write(lambda connection: connection.execute(damage))
    with pytest.raises(AccessUnavailableError):
        await stand.provider.authenticate(key, None)


async def test_a_key_without_hashes(stand: Stand) -> None:
    _, key = await stand.keys.create(NewKey(name="k"))
    await stand.keys.store.write(lambda connection: connection.execute("DELETE FROM key_hashes"))
    assert await stand.who(key) == "wrong_secret"


async def test_a_closed_provider_lets_nobody_in(tmp_path: Path) -> None:
    stand = Stand(tmp_path)
    _, key = await stand.keys.create(NewKey(name="k"))
    await stand.provider.close()
    await stand.provider.close()
    with pytest.raises(AccessUnavailableError):
        await stand.provider.authenticate(key, None)
