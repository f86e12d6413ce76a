"""`inferctl status` of servers that speculate."""

from __future__ import annotations

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from core.cli.stub_server import Exchange, StubServer
from inferflux_core.cli.inferctl import inferctl
from inferflux_core.cli.server_status import SpeculationStatus

NGRAM: dict[str, Any] = {
    "method": "ngram",
    "drafts": 1200,
    "draft_tokens": 9600,
    "accepted_tokens": 6000,
    "acceptance_ratio": 0.625,
    "mean_accepted_tokens": 5.0,
    "draft_tokens_per_position": [1200] * 8,
    "accepted_tokens_per_position": [1100, 1000, 900, 800, 700, 600, 500, 400],
}
NOTHING: dict[str, Any] = {
    "method": "draft_model",
    "drafts": 0,
    "draft_tokens": 0,
    "accepted_tokens": 0,
    "acceptance_ratio": None,
    "mean_accepted_tokens": None,
    "draft_tokens_per_position": [],
    "accepted_tokens_per_position": [],
}


def status(speculations: dict[str, dict[str, Any] | None], *arguments: str) -> Result:
    """What the command prints of a ready server whose models have this to say."""
    models = [{"name": name, "state": "ready", "speculation": said} for name, said in speculations.items()]

    async def ready(exchange: Exchange) -> None:
        await exchange.reply(200, {"status": "ready"})

    async def health(exchange: Exchange) -> None:
        await exchange.reply(200, {"status": "ok", "models": models})

    with StubServer({"/readyz": ready, "/healthz": health}) as server:
        result = CliRunner().invoke(inferctl, ["--url", server.url, "status", *arguments])
    assert (result.exit_code, result.stderr) == (0, "")
    return result


def rows(result: Result) -> list[list[str]]:
    return [line.split() for line in result.stdout.splitlines() if line.strip()]


def test_the_table() -> None:
    found = rows(status({"demo": NGRAM, "plain": None, "twin": NOTHING}))
    assert found[6:] == [
        ["model", "drafts", "by", "drafted", "accepted", "share", "a", "draft"],
        found[7],
        ["demo", "ngram", "9600", "6000", "62%", "5.0"],
        ["twin", "draft_model", "0", "0", "–", "–"],
    ]


def test_a_server_without_speculation_shows_no_table() -> None:
    assert "drafts" not in status({"plain": None}).stdout
    assert status({"plain": None}, "--speculation").stdout.endswith("\n  no model speculates\n")


def test_the_view_by_position() -> None:
    result = status({"demo": NGRAM, "twin": NOTHING}, "--speculation")
    found = rows(result)
    assert found[9:] == [
        ["drafts", "of", "demo"],
        ["position", "drafted", "accepted", "share"],
        found[11],
        ["1", "1200", "1100", "92%"],
        ["2", "1200", "1000", "83%"],
        ["3", "1200", "900", "75%"],
        ["4", "1200", "800", "67%"],
        ["5-8", "4800", "2200", "46%"],
        ["twin", "has", "drafted", "nothing", "yet"],
    ]
    assert max(len(line.rstrip()) for line in result.stdout.splitlines()) <= 80


def test_json_has_it_as_the_server_says_it() -> None:
    document = json.loads(status({"demo": NGRAM, "plain": None}, "--json").stdout)
    assert [model["speculation"] for model in document["models"]] == [NGRAM, None]


@pytest.mark.parametrize(
    ("positions", "labels"),
    [
        (0, []),
        (3, ["1", "2", "3"]),
        (5, ["1", "2", "3", "4", "5"]),
        (8, ["1", "2", "3", "4", "5-8"]),
        (32, ["1", "2", "3", "4", "5-8", "9-16", "17-32"]),
        (40, ["1", "2", "3", "4", "5-8", "9-16", "17-32", "33-40"]),
    ],
)
def test_positions_are_shown_in_ranges_that_lose_none(positions: int, labels: list[str]) -> None:
    said = SpeculationStatus(
        draft_tokens_per_position=list(range(positions)), accepted_tokens_per_position=[1] * positions
    ).by_position()
    assert [label for label, _, _, _ in said] == labels
    assert sum(drafted for _, drafted, _, _ in said) == sum(range(positions))
    assert sum(accepted for _, _, accepted, _ in said) == positions


def test_a_position_that_nothing_reached_has_no_share() -> None:
    said = SpeculationStatus(draft_tokens_per_position=[2, 0], accepted_tokens_per_position=[1, 0])
    assert said.by_position() == [("1", 2, 1, "50%"), ("2", 0, 0, None)]
