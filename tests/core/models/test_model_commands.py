"""`inferflux pull` and `inferflux models`, as a user sees them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from core.models.hub_server import Hub, running_hub
from inferflux_core.cli.main import cli


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with running_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        yield hub
        huggingface_hub.close_session()


def configure(folder: Path, *sources: str) -> None:
    models = "".join(f"  - source: {source}\n" for source in sources)
    (folder / "inferflux.yaml").write_text(f"models:\n{models}hub:\n  cache_dir: {folder / 'cache'}\n")


def inferflux(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, arguments, prog_name="inferflux")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_pull_prints_where_the_model_is(hub: Hub, tmp_path: Path) -> None:
    configure(tmp_path, "demo")
    commit = hub.add("acme/tiny", {"tiny-Q4_0.gguf": b"x" * 1500})
    path = tmp_path / "cache" / "models--acme--tiny" / "snapshots" / commit / "tiny-Q4_0.gguf"
    result = inferflux("pull", "hf:acme/tiny")
    assert result.exit_code == 0
    assert result.stdout == f"{path}\ngguf, Q4_0, 0.0 MB\n"
    result = inferflux("pull", "hf:acme/tiny", "--json")
    assert json.loads(result.stdout) == {
        "ref": "hf:acme/tiny",
        "format": "gguf",
        "quantisation": "Q4_0",
        "bytes": 1500,
        "files": 1,
        "path": str(path),
        "revision": commit,
    }


def test_pull_counts_all_parts(hub: Hub, tmp_path: Path) -> None:
    configure(tmp_path, "demo")
    hub.add("acme/big", {f"big-0000{n}-of-00002.gguf": b"x" * 700_000 for n in (1, 2)})
    assert inferflux("pull", "hf:acme/big").stdout.splitlines()[1] == "gguf, 1.4 MB, 2 files"


def test_pull_says_what_is_wrong(hub: Hub, tmp_path: Path) -> None:
    configure(tmp_path, "demo")
    result = inferflux("pull", "hf:acme/absent")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: 'hf:acme/absent': there is no repository 'acme/absent'")
    result = inferflux("pull", "demo", "--config", "absent.yaml")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "absent.yaml" in result.stderr


def test_models_lists_what_is_served_and_what_is_cached(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "own.gguf").write_bytes(b"x" * 10)
    configure(tmp_path, "./own.gguf", "hf:acme/tiny:Q4_0", "hf:acme/absent")
    hub.add("acme/tiny", {"tiny-Q4_0.gguf": b"x", "tiny-Q8_0.gguf": b"xx"})
    hub.add("acme/st", {"config.json": b"{}", "model.safetensors": b"xxx"}, branch="v1")
    for ref in ("hf:acme/tiny:Q4_0", "hf:acme/tiny:Q8_0", "hf:acme/st@v1"):
        assert inferflux("pull", ref).exit_code == 0
    hub.requests.clear()
    result = inferflux("models", "--json")
    assert result.exit_code == 0
    rows = [row for row in json.loads(result.stdout) if row["ref"] != "demo"]
    assert [(row["ref"], row["format"], row["quantisation"], row["bytes"], row["served"]) for row in rows] == [
        (str(tmp_path / "own.gguf"), "gguf", None, 10, True),
        ("hf:acme/tiny:Q4_0", "gguf", "Q4_0", 1, True),
        ("hf:acme/absent", None, None, None, True),
        ("hf:acme/st@v1", "safetensors", None, 3, False),
        ("hf:acme/tiny:tiny-Q8_0.gguf", "gguf", "Q8_0", 2, False),
    ]
    assert [row["problem"] is None for row in rows] == [True, True, False, True, True]
    assert "'hf:acme/absent' is not in the cache" in rows[2]["problem"]
    assert hub.requests == []


def test_models_prints_a_table_and_the_problems(hub: Hub, tmp_path: Path) -> None:
    configure(tmp_path, "hf:acme/absent")
    result = inferflux("models")
    assert result.exit_code == 0
    assert "hf:acme/absent   yes" in result.stdout
    assert "not here" in result.stdout
    assert "'hf:acme/absent' is not in the cache" in result.stderr
