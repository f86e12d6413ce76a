"""The example programs, run as a user runs them, against a served demo model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamacpp.demo_model import demo_files
from served import ServedInferFlux, serving

FILES = demo_files()
PROGRAM = Path(__file__).resolve().parents[2] / "examples" / "structured-output" / "ask.py"


@pytest.fixture(scope="module")
def served() -> Iterator[ServedInferFlux]:
    with serving("--model", "demo", "--max-model-len", "1024", "--max-num-seqs", "2") as server:
        yield server


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(PROGRAM), *arguments], capture_output=True, text=True, check=False, timeout=60)


def test_structured_output_prints_facts_a_word_and_a_call(served: ServedInferFlux) -> None:
    done = ask("--url", served.url)
    assert done.stderr == ""
    person, mood, arguments, call = done.stdout.splitlines()
    assert person.startswith("Marie Curie, born in Warsaw")
    assert mood == "positive"
    assert arguments == '{"city": "Paris", "unit": "celsius"}'
    assert call == "get_weather: city Paris, unit celsius"
    assert done.returncode == 0


def test_structured_output_says_what_is_wrong(served: ServedInferFlux) -> None:
    done = ask("--url", served.url, "--model", "none-such")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: Error code: 404 - The model 'none-such' does not exist")
