"""The reference pages say what the code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from inferflux_core.plugins import KINDS
from inferflux_core.setting_keys import setting_keys

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = ROOT / "tools" / "generate_docs.py"


@pytest.mark.parametrize("page", ["settings", "plugins", "metrics"])
def test_page_is_current(page: str) -> None:
    done = subprocess.run(
        [sys.executable, str(GENERATOR), "--check", page], capture_output=True, text=True, check=False, timeout=30
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_setting_has_a_description() -> None:
    assert [key.name for key in setting_keys() if not key.field.description] == []


def test_every_setting_and_hook_is_on_its_page() -> None:
    settings = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert [key.name for key in setting_keys() if f"| `{key.name}` |" not in settings] == []
    plugins = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    assert [hook for hook in KINDS.values() if f"### `{hook}`" not in plugins] == []


def test_an_outdated_page_is_found(tmp_path: Path) -> None:
    copy = tmp_path / "tools" / "generate_docs.py"
    copy.parent.mkdir()
    copy.write_text(GENERATOR.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "metrics.md"
    page.write_text((ROOT / "docs" / "metrics.md").read_text(encoding="utf-8") + "| `gone` |\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(copy), "--check", "metrics"], capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 1
    assert "-| `gone` |" in done.stdout.splitlines()
    assert done.stderr == "Error: out of date: metrics; run python tools/generate_docs.py\n"
