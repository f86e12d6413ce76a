"""A hostile chat template is stopped: its time, its memory, its output, and what its process knows."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from inferflux_core.errors import InvalidRequestError, ModelFileError, OverloadedError
from inferflux_core.models.chat_template import ChatTemplate


def make(source: str, *, seconds: float = 1.0) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>", special_tokens=frozenset({"<s>", "</s>"}), seconds=seconds)


def user(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


ATTACKS = {
    "nested loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "took too long"),
    "a recursive loop": ("{% for a in [[1]] recursive %}{{ loop([a]) }}{% endfor %}", "nested too deeply"),
    "a loop through a filter": ("{{ range(99999) | map('string') | map('length') | sum * 0 }}" * 200, "took too long"),
    "exponential macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "took too long",
    ),
    "endless macros": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
    "a huge range": ("{% for a in range(10 ** 12) %}{% endfor %}", None),
    "a huge power": ("{{ 7 ** (10 ** 8) }}", "computed too large a number"),
    "a power of powers": (
        "{% set ns = namespace(x=7) %}{% for i in range(40) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "took too long",
    ),
    "repeated text": ("{{ 'x' * 300000000 }}", "repeated a text too often"),
    "repeated text, swapped": ("{% set n = 300000000 %}{{ n * 'x' }}", "repeated a text too often"),
    "a repeated list": ("{{ ([0] * 300000000) | length }}", "repeated a text too often"),
    "center": ("{{ 'x'.center(300000000) }}", "needed too much memory"),
    "center, folded while compiling": ("{{ 'x' | center(300000000) }}", "needed too much memory"),
    "ljust": ("{{ ('x'.ljust(3000000000)) | length }}", "needed too much memory"),
    "a wide format": ("{{ ('%3000000000d' % 1) | length }}", "needed too much memory"),
    "a wide str.format": ("{{ '{:>3000000000}'.format(1) | length }}", "needed too much memory"),
    "indented JSON": ("{{ [1] | tojson(indent=300000000) }}", "needed too much memory"),
    "doubled text": (
        "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x | length }}",
        "needed too much memory",
    ),
    "doubled lists": (
        "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x | length }}",
        "needed too much memory",
    ),
    "growing replacement": (
        "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('x', ns.x) %}{% endfor %}",
        "needed too much memory",
    ),
    "endless output": ("{% for a in range(99999) %}0123456789{% endfor %}", "produced too much text"),
    "one huge output": ("{{ 'x'.center(70000) }}", "produced too much text"),
}


@pytest.mark.parametrize(("source", "what"), ATTACKS.values(), ids=ATTACKS.keys())
def test_attacks_are_stopped(source: str, what: str | None) -> None:
    started = time.monotonic()
    template = make(source, seconds=0.2 if what == "took too long" else 3)  # filling memory takes time on a busy machine
    with pytest.raises(InvalidRequestError) as caught:
        template.render(user("x"))
    template.close()
    if what is None:
        assert "failed on these messages (OverflowError)" in caught.value.message
    else:
        assert caught.value.message == (
            f"the chat template of this model {what} on these messages and was stopped; send less, or report it to the "
            f"administrator of this server"
        )
    assert time.monotonic() - started < 5


def test_a_bomb_for_the_compiler() -> None:
    with pytest.raises(ModelFileError, match=r"the chat template cannot be used: "):
        make("{{ (" + " ~ ".join(["'x'|center(99999999)"] * 40) + ")|length }}")


def test_a_template_that_was_stopped_serves_the_next_request() -> None:
    template = make(
        "{% if messages[0].content == 'loop' %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}"
        "{% endfor %}{% endif %}{{ messages[0].content }}",
        seconds=0.2,
    )
    assert template.render(user("before")) == [("before", True)]
    with pytest.raises(InvalidRequestError, match="took too long"):
        template.render(user("loop"))
    assert template.render(user("after")) == [("after", True)]
    template.close()


def test_a_stopped_template_does_not_hold_the_interpreter() -> None:
    template = make("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", seconds=0.3)
    failures: list[str] = []

    def attack() -> None:
        try:
            template.render(user("x"))
        except InvalidRequestError as error:
            failures.append(error.message)

    thread = threading.Thread(target=attack)
    thread.start()
    turns = 0
    while thread.is_alive():
        thread.join(0.001)
        turns += 1
    template.close()
    assert len(failures) == 1
    assert turns > 10  # this thread went on meanwhile, about once a millisecond


def test_requests_do_not_pile_up_behind_a_slow_template() -> None:
    template = make("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", seconds=0.1)

    def attempt(_: int) -> type[Exception]:
        try:
            template.render(user("x"))
        except (InvalidRequestError, OverloadedError) as error:
            return type(error)
        raise AssertionError("it came to an end")

    with ThreadPoolExecutor(12) as pool:
        outcomes = list(pool.map(attempt, range(12)))
    template.close()
    assert set(outcomes) == {InvalidRequestError, OverloadedError}


def children() -> list[int]:
    """Ids of the template processes of this process."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid() and b"template_worker.py" in command:
            found.append(int(folder.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_its_process_knows_no_secrets_is_replaced_when_killed_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-token")
    before = set(children())
    template = make("{{ messages[0].content }}")
    (first,) = set(children()) - before
    assert b"secret-token" not in Path(f"/proc/{first}/environ").read_bytes()
    os.kill(first, signal.SIGKILL)
    assert template.render(user("on it goes")) == [("on it goes", True)]
    (second,) = set(children()) - before
    assert second != first
    del template
    gc.collect()
    assert set(children()) == before
