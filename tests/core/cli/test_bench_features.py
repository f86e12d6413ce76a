"""`inferflux bench` for what a server can do besides decoding: drafts, schemas, and settings that one request may change."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from click.testing import CliRunner

from core.cli.stub_server import Exchange, Handler, StubServer, answering
from inferflux_core.cli.bench.client import merged
from inferflux_core.cli.bench.command import bench
from inferflux_core.cli.bench.inquiry import Speculated
from inferflux_core.cli.bench.prompts import ITEM_KINDS, JSON_ITEMS, array_schema, copying
from inferflux_core.cli.bench.workloads import Name, Workload

COMPLETIONS = "/v1/completions"
QUICK = ("-c", "1", "--requests", "2", "--alternations", "1", "--warmup", "0", "--max-tokens", "3")

THREE = answering("a", "b", "c", chat=False)


def report(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(bench, [*arguments, *QUICK, "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def fields(server: StubServer, *names: str) -> list[Any]:
    return [tuple(request.json.get(name, "absent") for name in names) for request in server.posts()]


# what a request says


def test_each_url_has_a_body_of_its_own(tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_text('{"num_speculative_tokens": 0, "ignore_eos": null}')
    with StubServer({COMPLETIONS: THREE}) as server:
        document = report(
            *("--url", server.url, "--name", "on", "--body", '{"temperature": 0.5}'),
            *("--url", server.url, "--name", "off", "--body", f"@{body}"),
        )
    names = ("temperature", "num_speculative_tokens", "ignore_eos", "max_tokens")
    assert fields(server, *names) == [(0.5, "absent", True, 3)] * 2 + [(0, 0, "absent", 3)] * 2
    assert [found["body"] for found in document["servers"]] == [
        {"temperature": 0.5},
        {"num_speculative_tokens": 0, "ignore_eos": None},
    ]


def test_one_body_for_all_is_shown_in_short() -> None:
    body = json.dumps({"logit_bias": {str(token): 1 for token in range(50)}}, separators=(",", ":"))
    with StubServer({COMPLETIONS: THREE}) as server:
        urls = ("--url", server.url, "--name", "a", "--url", server.url, "--name", "b")
        table = CliRunner().invoke(bench, [*urls, "--body", body, *QUICK])
    assert (table.exit_code, table.stderr) == (0, "")
    shown = [line for line in table.stdout.splitlines() if "  body " in line]
    assert [line.partition("  body ")[2] for line in shown] == [f"{body[:100]}..."] * 2
    assert all(sent["logit_bias"]["49"] == 1 for sent in (request.json for request in server.posts()))


def test_a_later_layer_wins_and_null_takes_away() -> None:
    assert merged({"a": 1, "b": {"x": 1}}, {"b": {"y": 2}, "c": 3}, {"a": None, "d": None}) == {"b": {"y": 2}, "c": 3}


def test_one_server_twice_does_not_share_its_cache_with_itself() -> None:
    with StubServer({COMPLETIONS: THREE}) as server, StubServer({COMPLETIONS: THREE}) as other:
        twice = ("--url", server.url, "--name", "a", "--url", f"{server.url}/v1", "--name", "b")
        report(*twice, "--url", other.url, "--name", "c")
    assert fields(server, "cache_salt") == [("a",)] * 2 + [("b",)] * 2
    assert fields(other, "cache_salt") == [("absent",)] * 2


# what a workload asks


@pytest.mark.parametrize(("name", "schemas"), [("json", 1), ("json-new", 6)])
def test_a_schema_goes_with_every_request(name: Name, schemas: int) -> None:
    load = Workload.make(name)
    scripts = [script for alternation in (-1, 0, 1) for script in load.scripts(2, seed=0, alternation=alternation)]
    formats = [script.fields["response_format"] for script in scripts]
    assert len({json.dumps(found) for found in formats}) == schemas
    assert {found["type"] for found in formats} == {"json_schema"}
    with StubServer({COMPLETIONS: THREE}) as server:
        urls = ("--url", server.url, "--name", "free", "--url", server.url, "--name", "json")
        report("--workload", name, *urls, "--body", '{"response_format": null}', "--body", "{}")
    expected = [script.fields["response_format"] for script in load.scripts(2, seed=0, alternation=0)]
    assert fields(server, "response_format") == [("absent",)] * 2 + [(found,) for found in expected]
    prompts = [prompt for (prompt,) in fields(server, "prompt")]
    assert prompts[:2] == prompts[2:]


def test_the_schema_means_what_it_says() -> None:
    schema = array_schema(None)
    jsonschema.Draft202012Validator.check_schema(schema)
    thing = {"name": "oak", "kind": ITEM_KINDS[1], "amount": 3}
    valid = jsonschema.Draft202012Validator(schema).is_valid
    assert valid({"title": "Trees", "items": [thing] * JSON_ITEMS})
    assert not valid({"title": "Trees", "items": [thing] * (JSON_ITEMS - 1)})
    assert not valid({"title": "Trees", "items": [thing | {"kind": "stone"}] * JSON_ITEMS})
    other = array_schema(random.Random(0))
    assert set(schema["properties"]).isdisjoint(other["properties"])


def test_a_file_to_copy_has_one_edit() -> None:
    for seed in range(20):
        _, original, said, begun = copying(random.Random(seed), 320).split("```\n")
        whole, head = original.splitlines(), begun.splitlines()
        assert len(whole) == 31
        assert [index for index, line in enumerate(head) if line != whole[index]] == [1]
        name, _, value = head[1].partition(" = ")
        assert whole[1].startswith(f"{name} = ")
        assert f"with `{name}` set to {value} and no other change" in said
        words = [word for line in whole[1:] for word in line.partition(" = ")[0].split("_")]
        assert len(words) == len(set(words)) == 60
        assert (len(head), begun[-1]) == (5, "\n")


def test_novel_is_sampled_with_seeds() -> None:
    scripts = Workload.make("novel").scripts(3, seed=0, alternation=0)
    assert {script.fields["temperature"] for script in scripts} == {1}
    assert len({script.fields["seed"] for script in scripts}) == 3
    with StubServer({COMPLETIONS: THREE}) as server:
        report("--workload", "novel", "--url", server.url)
    assert fields(server, "temperature", "seed") == [(1, script.fields["seed"]) for script in scripts[:2]]


# what was drafted


def page(drafted: object, accepted: object, *, vllm: bool = False) -> bytes:
    prefix = "vllm:spec_decode_num" if vllm else "inferflux_spec"
    return (
        f"# HELP {prefix}_draft_tokens_total x\n# TYPE {prefix}_draft_tokens_total counter\n"
        f'{prefix}_draft_tokens_total{{model="a b}}"}} {drafted}\n'
        f'{prefix}_draft_tokens_total{{model="other"}} 5.0\n'
        f'{prefix}_draft_tokens_per_pos_total{{model="a b}}",position="0"}} 77.0\n'
        f'{prefix}_accepted_tokens_total{{model="a b}}"}} {accepted}\n'
    ).encode()


def metrics(*pages: bytes | int) -> Handler:
    """A handler of `/metrics` that answers with these pages or statuses, one after the other."""
    waiting = list(pages)

    async def handler(exchange: Exchange) -> None:
        found = waiting.pop(0)
        await exchange.reply(*((200, found) if isinstance(found, bytes) else (found, {"error": {"message": "no"}})))

    return handler


@pytest.mark.parametrize("vllm", [False, True])
def test_acceptance_is_what_was_counted_during_the_run(vllm: bool) -> None:
    pages = metrics(page(100.0, 50.0, vllm=vllm), page(140.0, 80.0, vllm=vllm))
    with StubServer({COMPLETIONS: THREE, "/metrics": pages}) as server, StubServer({COMPLETIONS: THREE}) as plain:
        document = report("--url", server.url, "--url", plain.url)
    figures, others = (found["alternations"][0] for found in document["servers"])
    names = ("drafted_tokens", "accepted_tokens", "acceptance_ratio")
    assert [figures[name] for name in names] == [40, 30, 0.75]
    assert [others[name] for name in names] == [None, None, None]
    order = [request.path for request in server.requests if request.path in ("/metrics", COMPLETIONS)]
    assert order == ["/metrics", COMPLETIONS, COMPLETIONS, "/metrics"]


def test_the_table_shows_acceptance() -> None:
    pages = metrics(page(0.0, 0.0), page(1.2e3, 900.0))
    with StubServer({COMPLETIONS: THREE, "/metrics": pages}) as server:
        table = CliRunner().invoke(bench, ["--url", server.url, *QUICK])
    rows = [line.split() for line in table.stdout.splitlines()]
    for row in (["drafted", "tokens", "1,200"], ["of", "them", "accepted", "900"], ["acceptance", "0.75"]):
        assert row in rows


@pytest.mark.parametrize(
    "pages",
    [
        (403,),
        (page(3.0, 1.0), 503),
        (page(3.0, 1.0), page(3.0, 1.0)),  # it drafted nothing
        (page(9.0, 8.0), page(2.0, 1.0)),  # it began anew
        (page("nan", 1.0),),
        (page("many", 1.0),),
        (b"\xff not a metric\n",),
    ],
)
def test_a_page_without_sense_means_nothing_was_measured(pages: Sequence[bytes | int]) -> None:
    with StubServer({COMPLETIONS: THREE, "/metrics": metrics(*pages)}) as server:
        [figures] = report("--url", server.url)["servers"][0]["alternations"]
    assert (figures["drafted_tokens"], figures["accepted_tokens"], figures["acceptance_ratio"]) == (None, None, None)


def test_counters_that_fell_are_no_difference() -> None:
    assert Speculated(10, 5).since(Speculated(4, 2)) == Speculated(6, 3)
    assert Speculated(10, 5).since(Speculated(4, 6)) is None
    assert Speculated(4, 5).since(Speculated(4, 5)) is None
