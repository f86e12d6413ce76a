"""Pairs of models that cannot speculate are refused when they are loaded, with the reason, before anyone is served by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from inferflux_core.cli.inferctl import inferctl
from llamacpp.demo_model import demo_files
from llamacpp.tiny_gguf import write_tiny
from served import serving, starting

demo_files()
FORGETFUL = {"swa_full": False, "n_threads": 1}
REASONS = {
    "other vocabulary": ("draft model 'demo' cannot draft for", "name a draft model of the same family"),
    "no such draft": ("draft model of speculative.model: ", "nowhere.gguf': no such file or folder"),
    "draft that forgets": ("the end of a sequence cannot be removed from its cache", "set swa_full to true"),
    "target that forgets": ("cannot verify drafts", "set speculative.method of this model to null"),
}


@pytest.fixture
def models(tmp_path: Path) -> list[dict[str, Any]]:
    """One model for each of the reasons."""
    tiny, windowed = (str(tmp_path / name) for name in ("tiny.gguf", "windowed.gguf"))
    write_tiny(Path(tiny))
    write_tiny(Path(windowed), sliding_window=16)

    def draft(model: str, **settings: Any) -> dict[str, Any]:
        return {"method": "draft_model", "model": model, "backend_settings": settings}

    sources: dict[str, dict[str, Any]] = {
        "other vocabulary": {"source": tiny, "speculative": draft("demo")},
        "no such draft": {"source": tiny, "speculative": draft(str(tmp_path / "nowhere.gguf"))},
        "draft that forgets": {"source": tiny, "speculative": draft(windowed, **FORGETFUL)},
        "target that forgets": {"source": windowed, "backend_settings": FORGETFUL, "speculative": {"method": "ngram"}},
    }
    return [{"name": name, **values} for name, values in sources.items()]


def config(folder: Path, models: list[dict[str, Any]], **more: Any) -> Path:
    path = folder / "inferflux.json"
    engine = {"max_model_len": 128, "max_num_seqs": 2}
    path.write_text(json.dumps({"state_dir": str(folder / "state"), "models": models, "engine": engine, **more}))
    return path


def check(name: str, text: str) -> None:
    for part in REASONS[name]:
        assert part in text


def test_a_server_with_no_other_model_ends_and_says_why(tmp_path: Path, models: list[dict[str, Any]]) -> None:
    with starting("--config", str(config(tmp_path, models))) as server:
        assert server.process.wait(60) == 2
        server._reader.join(30)
    log = "".join(server.log)
    assert "Traceback" not in log
    said = log[log.index("Error: model") :].removeprefix("Error: ").splitlines()
    assert len(said) == len(models)
    for model, line in zip(models, said, strict=True):
        assert line.startswith(f"model {model['name']!r}: ")
        check(model["name"], line)


def test_beside_a_model_that_is_well_administrators_see_why(tmp_path: Path, models: list[dict[str, Any]]) -> None:
    source = models[0]["source"]
    well = {"source": source, "name": "well", "speculative": {"method": "draft_model", "model": source}}
    path = config(tmp_path, [well, *models], auth={"providers": ["api_keys"]})
    scope = "admin,read,generate"
    made = CliRunner().invoke(
        inferctl, ["admin", "api-keys", "create", "--bootstrap", "--config", str(path), "--scope", scope, "--quiet"]
    )
    assert made.exit_code == 0, made.output
    headers = {"authorization": f"Bearer {made.stdout.strip()}"}
    with serving("--config", str(path)) as server, httpx.Client(base_url=server.url, headers=headers, timeout=30) as client:
        shown = {model["id"]: model for model in client.get("/v1/admin/models").json()["data"]}
        health = {model["name"]: model for model in client.get("/healthz").json()["models"]}
        body = {"prompt": "abcabcabc", "max_tokens": 20, "temperature": 0, "ignore_eos": True}
        answers = [
            client.post("/v1/completions", json={"model": "well", **body, "num_speculative_tokens": number}).json()["choices"]
            for number in (0, 8)
        ]
        refused = client.post("/v1/completions", json={"model": models[0]["name"], **body})
    assert (shown["well"]["state"], shown["well"]["last_error"]) == ("ready", None)
    assert answers[0] == answers[1]
    assert refused.status_code == 503
    for name in REASONS:
        for view in (shown[name], health[name]):
            assert view["state"] == "failed"
            check(name, view["last_error"])
