"""`inferctl admin`: every verb against a real server, from the first administrator's key on."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from inferflux_core.cli.admin.group import admin
from inferflux_core.cli.inferctl import inferctl
from served import ServedInferFlux, serving, until

POLICY = """\
role, boss
role, user
p, role:boss, *, **, admin, allow
p, role:user, *, model/*, generate, allow
p, role:user, *, api/models, read, allow
"""
CASES = "role:user,default,api/keys,admin,deny\nrole:user,default,model/fake,generate,allow\n"


@dataclass
class Stand:
    """A server, its folder and the administrator's key."""

    folder: Path
    served: ServedInferFlux
    key: str

    def run(self, *arguments: str, key: str | None = None, stdin: str | None = None) -> Result:
        """`inferctl admin ...`."""
        env = {"INFERCTL_API_KEY": key or self.key, "INFERCTL_URL": self.served.url, "COLUMNS": "200"}
        return CliRunner().invoke(inferctl, ["admin", *arguments], input=stdin, env=env)

    def ok(self, *arguments: str, **options: Any) -> str:
        """What it prints for people, when it must not fail."""
        result = self.run(*arguments, **options)
        assert (result.exit_code, result.exception) == (0, None), result.output
        return result.stdout

    def json(self, *arguments: str, **options: Any) -> Any:
        """What it prints for programs."""
        return json.loads(self.ok(*arguments, "--json", **options))


@pytest.fixture(scope="module")
def stand(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    folder = tmp_path_factory.mktemp("admin")
    (folder / "policy.csv").write_text(POLICY)
    (folder / "tests.csv").write_text(CASES)
    config = folder / "inferflux.yaml"
    settings = {
        "state_dir": str(folder / "state"),
        "models": [{"source": "fake"}],
        "auth": {"providers": ["api_keys"]},
        "policy": {"file": "policy.csv", "reload_interval_s": 600},
    }
    config.write_text(json.dumps(settings))
    made = invoke("api-keys", "create", "--bootstrap", "--config", str(config), "--role", "boss", "--quiet")
    assert made.exit_code == 0, made.output
    with serving("--config", str(config)) as served:
        yield Stand(folder, served, made.stdout.strip())


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(inferctl, ["admin", *arguments], input=stdin)


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_key_from_its_making_to_its_end(stand: Stand) -> None:
    made = stand.run(
        *("api-keys", "create", "--name", "ci", "--tenant", "acme", "--role", "user", "--rpm", "600", "--tpm", "none"),
        *("--scope", "generate,read", "--model", "fake*", "--cidr", "127.0.0.0/8", "--expires-in", "1d"),
    )
    assert made.exit_code == 0, made.output
    [secret] = made.stdout.splitlines()
    assert secret.startswith("ifx_live_")
    assert "shown this once" in made.stderr
    key_id = secret.split("_")[2]
    shown = stand.json("api-keys", "show", key_id)
    assert (shown["tenant"], shown["scopes"], shown["roles"], shown["models"]) == (
        "acme",
        ["generate", "read"],
        ["user"],
        ["fake*"],
    )
    assert (shown["limits"]["rpm"], shown["limits"]["tpm"], shown["cidr"]) == (600, None, ["127.0.0.0/8"])
    assert shown["expires_at"] is not None
    assert CliRunner().invoke(inferctl, ["--url", stand.served.url, "--api-key", secret, "chat", "Hi"]).exit_code == 0

    changed = stand.json("api-keys", "update", key_id, "--tpm", "9000", "--any-model", "--never-expires", "--owner", "me")
    assert (changed["limits"]["rpm"], changed["limits"]["tpm"]) == (600, 9000)  # what is not named stays
    assert (changed["models"], changed["expires_at"], changed["owner"], changed["version"]) == (None, None, "me", 2)
    assert stand.json("api-keys", "update", key_id, "--default-limits")["limits"] is None

    rotated = stand.ok("api-keys", "rotate", key_id, "--overlap", "1m", "--quiet").strip()
    assert rotated != secret
    assert rotated.split("_")[2] == key_id
    listing = stand.ok("api-keys", "list")
    assert key_id in listing
    assert "active" in listing
    assert "revoked" in stand.ok("api-keys", "revoke", key_id)
    states = {key["id"]: key["revoked_at"] for key in stand.json("api-keys", "list")["data"]}
    assert states[key_id] is not None
    refused = CliRunner().invoke(inferctl, ["--url", stand.served.url, "--api-key", rotated, "models"])
    assert refused.exit_code == 1
    for output in (listing, stand.ok("api-keys", "show", key_id)):
        assert secret.split("_")[3] not in output


def test_a_key_made_beside_the_running_server_is_accepted_at_once(stand: Stand) -> None:
    config = str(stand.folder / "inferflux.yaml")
    made = invoke("api-keys", "create", "--bootstrap", "--config", config, "--role", "boss", "--name", "second", "--json")
    key = json.loads(made.stdout)
    assert (key["scopes"], key["name"]) == (["admin"], "second")
    assert stand.run("api-keys", "list", key=key["key"]).exit_code == 0


def test_the_hash_of_a_key_for_the_configuration(stand: Stand) -> None:
    config = str(stand.folder / "inferflux.yaml")
    new = invoke("api-keys", "hash", "--new", "--config", config)
    key, hashed = new.stdout.splitlines()
    assert hashed.startswith(f"hmac-sha256:p1:{key.split('_')[2]}:")
    assert invoke("api-keys", "hash", "--config", config, stdin=f"{key}\n").stdout.strip() == hashed
    assert json.loads(invoke("api-keys", "hash", "--config", config, "--json", stdin=key).stdout) == {"hash": hashed}
    typo = invoke("api-keys", "hash", "--config", config, stdin=f"{key[:-1]}\n")
    assert (typo.exit_code, "this is no key" in typo.stderr) == (2, True)
    assert key[:-1] not in typo.output


def test_wrong_uses_of_api_keys(stand: Stand) -> None:
    for arguments, words in (
        (["create"], "--name"),
        (["create", "--name", "x", "--config", "f"], "--bootstrap"),
        (["create", "--name", "x", "--rpm", "0"], "neither a number above 0 nor none"),
        (["create", "--name", "x", "--expires-in", "soon"], "no duration"),
        (["show", stand.key], "no id of a key"),
        (["update", "000000000000"], "say what to change"),
        (["update", "000000000000", "--any-model", "--model", "x"], "both given and removed"),
        (["create", "--bootstrap", "--config", str(stand.folder / "none.yaml")], "none.yaml"),
        (["create", "--bootstrap", "--config", str(stand.folder / "inferflux.yaml"), "--tenant", "a b"], "tenant"),
    ):
        result = stand.run("api-keys", *arguments)
        assert (result.exit_code, words in result.stderr) == (2, True), result.output
    missing = stand.run("api-keys", "show", "000000000000")
    assert missing.exit_code == 1
    assert missing.stderr == "Error: There is no key '000000000000'; list the keys to see which there are (HTTP 404)\n"
    assert stand.run("api-keys", "create", "--name", "x", "--scope", "root").exit_code == 1
    denied = stand.run(
        "api-keys",
        "list",
        key="ifx_live_nothing",
    )
    assert (denied.exit_code, "HTTP 401" in denied.stderr) == (1, True)


# --- policy -----------------------------------------------------------------------------------------------------------


def test_a_policy_is_checked_tested_and_put_in_force(stand: Stand, tmp_path: Path) -> None:
    candidate = tmp_path / "new.csv"
    candidate.write_text(POLICY + "p, role:user, *, model/secret, generate, deny\n")
    here = stand.json("policy", "check", str(candidate))
    there = stand.json("policy", "check", str(candidate), "--on-server")
    assert here["ok"] and there["ok"]  # noqa: PT018
    assert here["version"] == there["version"]
    assert there["added"] == ["p, role:user, *, model/secret, generate, deny"]
    assert "+ p, role:user" in stand.ok("policy", "check", str(candidate), "--on-server")
    cases = tmp_path / "tests.csv"
    cases.write_text("role:user,default,model/secret,generate,deny\n")
    assert stand.json("policy", "test", str(candidate)) == {"ok": True, "version": here["version"], "cases": 1, "failures": []}
    failing = stand.run("policy", "test", "--cases", str(cases))  # what is in force still allows it
    assert (failing.exit_code, "1 failed: 1 cases" in failing.stdout) == (1, True)
    before = stand.json("policy", "show")
    assert stand.run("policy", "set", str(candidate), "--expect", "0" * 16).exit_code == 1
    assert "is in force" in stand.ok("policy", "set", str(candidate))
    assert stand.ok("policy", "show") == candidate.read_text()
    assert (stand.folder / "policy.csv").read_text() == candidate.read_text()
    assert "ok" in stand.ok("policy", "test", "--cases", str(cases))
    assert stand.json("policy", "test")["ok"]
    (stand.folder / "policy.csv").write_text(POLICY)
    assert stand.json("policy", "reload")["version"] == before["version"]


def test_a_bad_policy_is_refused(stand: Stand, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text(POLICY + "P, role:user, *, model/x, generate, deny\n")
    for place in ([], ["--on-server"]):
        result = stand.run("policy", "check", str(bad), *place)
        assert (result.exit_code, "line 6" in result.stdout, "refused" in result.stdout) == (1, True, True)
    assert "line 6" in stand.run("policy", "set", str(bad)).stderr
    assert "line 6" in stand.run("policy", "test", str(bad), "--cases", str(bad)).stderr
    alone = tmp_path / "alone" / "p.csv"
    alone.parent.mkdir()
    alone.write_text(POLICY)
    assert "--cases" in stand.run("policy", "test", str(alone)).stderr


def test_a_decision_is_explained(stand: Stand) -> None:
    asked = ("policy", "explain", "model/fake", "generate", "--subject", "user:x|y")
    allowed = stand.ok(*asked, "--role", "user")
    assert "allowed by casbin: line 4" in allowed
    denied = stand.run(*asked)
    assert (denied.exit_code, "denied by casbin" in denied.stdout) == (1, True)
    mine = stand.key.split("_")[2]
    assert stand.json("policy", "explain", "api/keys", "admin", "--key", mine)["allowed"]
    assert stand.run("policy", "explain", "api/keys", "admin").exit_code == 2
    assert stand.run("policy", "explain", "api/keys", "admin", "--key", mine, "--role", "x").exit_code == 2


# --- the rest ---------------------------------------------------------------------------------------------------------


def test_limits(stand: Stand) -> None:
    assert stand.json("limits", "set", "--rpm", "100000", "--tpm", "none")["default"]["rpm"] == 100000
    table = stand.json("limits", "set", "--tenant", "acme", "--daily-tokens", "5000")
    assert (table["tenants"]["acme"]["daily_tokens"], table["default"]["rpm"]) == (5000, 100000)
    assert stand.json("limits", "set", "--model", "*", "--concurrency", "8")["models"]["*"]["concurrency"] == 8
    assert "tenant acme" in stand.ok("limits", "get")
    assert stand.json("limits", "set", "--tenant", "acme", "--remove")["tenants"] == {}
    assert "no quota for 'acme'" in stand.run("limits", "set", "--tenant", "acme", "--remove").stderr
    assert stand.json("rate-limit", "set", "--tpm", "900000") == {"tokens_per_minute": 900000, "requests_per_minute": 100000}
    assert "900000" in stand.ok("rate-limit", "get")
    assert stand.json("rate-limit", "set", "--tpm", "none", "--rpm", "none")["tokens_per_minute"] is None
    assert stand.json("limits", "get")["default"]["rpm"] is None
    for wrong in (["set"], ["set", "--tenant", "a", "--model", "b", "--rpm", "1"], ["set", "--remove"]):
        assert stand.run("limits", *wrong).exit_code == 2
    assert stand.run("rate-limit", "set").exit_code == 2


def test_models_come_and_go(stand: Stand) -> None:
    assert stand.ok("models", "load", "fake:2", "--id", "acme/two", "--alias", "two") == "acme/two is ready\n"
    assert [m["id"] for m in stand.json("models", "list")["data"]] == ["fake", "acme/two"]
    assert stand.ok("models", "set-default", "two") == "acme/two is the default model\n"
    [row] = [line for line in stand.ok("models", "list").splitlines() if "acme/two" in line]
    assert row.rstrip().endswith("default")
    refused = stand.run("models", "unload", "acme/two")
    assert (refused.exit_code, "default model" in refused.stderr) == (1, True)
    assert stand.json("models", "set-default", "fake") == {"status": "ok", "default_model": "fake"}
    assert stand.json("models", "unload", "acme/two") == {"status": "unloaded", "id": "acme/two"}
    assert stand.json("models", "load", "fake:3", "--no-wait")["status"] == "loading"
    assert stand.ok("models", "unload", "fake:3") == "fake:3 is unloaded\n"
    failed = stand.run("models", "load", "./secret.gguf")
    assert (failed.exit_code, "model_roots" in failed.stderr) == (1, True)
    assert stand.run("models", "unload", "none").stderr.endswith("(HTTP 404)\n")


def test_the_cache_is_warmed_by_text(stand: Stand) -> None:
    prefix = "Once upon a time there was a cache. " * 3
    warm = ("--tenant", "acme", "--model", "fake")
    assert "109 tokens computed for tenant acme" in stand.ok("cache", "warm", prefix, *warm)
    again = stand.json("cache", "warm", "-", *warm, stdin=prefix)
    assert (again["tokens"], again["cached_tokens"]) == (109, None)  # acme's own affair
    assert "109 tokens computed" in stand.ok("cache", "warm", prefix, "--model", "fake")
    assert "of them known before" in stand.ok("cache", "warm", prefix, "--model", "fake")
    assert stand.json("cache", "warm", "--system", "Be kind.")["status"] == "ok"
    assert stand.json("cache", "status")["data"][0]["hits"] >= 2
    assert "%" in stand.ok("cache", "status")
    assert stand.run("cache", "warm").exit_code == 2


def test_routing_pools_and_config(stand: Stand) -> None:
    assert stand.json("routing", "get") == {"allow_default_fallback": True, "require_ready_backend": True}
    changed = stand.json("routing", "set", "--allow-default-fallback", "false")
    assert changed == {"allow_default_fallback": False, "require_ready_backend": True}
    assert "false" in stand.ok("routing", "get")
    stand.ok("routing", "set", "--allow-default-fallback", "true", "--require-ready-backend", "yes")
    assert stand.run("routing", "set").exit_code == 2
    assert stand.json("pools")["pool_health"]["ready"]
    assert "ok" in stand.ok("pools")
    settings = stand.json("config")["settings"]
    assert settings["policy.reload_interval_s"]["origin"].startswith("file ")
    assert "policy.reload_interval_s" in stand.ok("config")


def test_what_administrators_did_is_in_the_audit_log(stand: Stand) -> None:
    made = stand.json("api-keys", "create", "--name", "audited")
    log = stand.folder / "state" / "audit.jsonl"

    def records() -> list[Any]:
        found = [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [record for record in found if record["event"] == "key.created" and record["key_id"] == made["id"]]

    until(lambda: len(records()) == 1)  # the log is written some milliseconds after the answer, unless fsync is `each`
    assert records()[0]["actor"]["id"] == stand.key.split("_")[2]
    assert made["key"] not in log.read_text()
    assert stand.key not in log.read_text()


def test_every_verb_is_driven_here() -> None:
    source = Path(__file__).read_text()
    verbs = [
        (name, verb) for name, group in admin.commands.items() if isinstance(group, click.Group) for verb in group.commands
    ]
    assert len(verbs) == 25
    for group, verb in verbs:
        assert f'"{group}", "{verb}"' in source or f'"{group}", *' in source, f"{group} {verb}"
