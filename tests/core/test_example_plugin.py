"""The example plugin package, installed the way a user installs it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from served import fake, serving, until

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PACKAGE = EXAMPLES / "inferflux-scheduler-shortest"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the package is installed into, apart from the environment that the tests run in."""
    target = tmp_path_factory.mktemp("site-packages")
    # With the build backend at hand pip needs no network.
    offline = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *offline, "--target", str(target), str(PACKAGE)],
        check=True,
        timeout=120,
    )
    return target


def shortest(site_packages: Path | None, *arguments: str) -> dict[str, Any] | None:
    """The row of the example's scheduler in `inferflux plugins --json`; None if it is not listed."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("INFERFLUX_")}
    if site_packages is not None:
        environ["PYTHONPATH"] = str(site_packages)
    done = subprocess.run(
        [sys.executable, "-m", "inferflux_core.cli.main", "plugins", "--json", *arguments],
        capture_output=True,
        text=True,
        check=True,
        env=environ,
        timeout=30,
    )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return next((row for row in rows if row["name"] == "shortest"), None)


def test_installing_registers_but_activates_nothing(installed: Path) -> None:
    assert shortest(None) is None
    assert shortest(installed) == {
        "kind": "scheduler",
        "name": "shortest",
        "distribution": "inferflux-scheduler-shortest",
        "version": "0.1.0",
        "active": False,
        "chosen_by": None,
        "summary": "shortest prompt first",
    }


def test_the_configuration_activates_it(installed: Path) -> None:
    row = shortest(installed, "--config", str(EXAMPLES / "shortest.yaml"))
    assert row is not None
    assert (row["active"], row["chosen_by"]) == (True, "engine.scheduler")


def test_check_accepts_the_example_only_with_the_package(installed: Path) -> None:
    command = [sys.executable, "-m", "inferflux_core.cli.main", "config", "check", "--config", "shortest.yaml"]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("INFERFLUX_")}
    without = subprocess.run(command, cwd=EXAMPLES, env=environ, capture_output=True, text=True, check=False, timeout=30)
    assert without.returncode == 2
    assert without.stderr.startswith(
        "Error: engine.scheduler: no installed plugin registers a scheduler named 'shortest' (there are: "
    )
    environ["PYTHONPATH"] = str(installed)
    done = subprocess.run(command, cwd=EXAMPLES, env=environ, capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.splitlines() == [
        "ok: shortest.yaml",
        "listen on 127.0.0.1 port 8080",
        "scheduler shortest",
        "model demo from demo, backend auto, default",
    ]


def test_it_decides_who_is_served_next(installed: Path) -> None:
    """One slot; while it is taken a long prompt comes and then a short one: the short one is answered first."""
    finished: list[str] = []
    arguments = ["--config", str(EXAMPLES / "shortest.yaml"), *fake(step_ms=10), "--max-num-seqs", "1"]
    with serving(*arguments, env={"PYTHONPATH": str(installed)}) as served:

        def ask(name: str, prompt: str, max_tokens: int) -> None:
            body = {"model": "fake", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
            assert served.post("/v1/completions", body).status_code == 200
            finished.append(name)

        def waiting(number: int) -> bool:
            return bool(served.health()["requests_waiting"] == number)

        threads = [
            threading.Thread(target=ask, args=arguments)
            for arguments in (("first", "a", 150), ("long", "b" * 500, 5), ("short", "c" * 5, 5))
        ]
        threads[0].start()
        until(lambda: served.health()["requests_running"] == 1)
        for number, thread in enumerate(threads[1:], 1):
            thread.start()
            until(partial(waiting, number))
        for thread in threads:
            thread.join()
    assert finished == ["first", "short", "long"]
