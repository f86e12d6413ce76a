"""Which models there are, and how they read text."""

from __future__ import annotations

from typing import Any

import pytest

from core.serving.conformance import conforms, needs_document
from core.serving.scripted import FakeModel, FakeModels, Stand, stand

VIEWS = [
    FakeModel("tiny", ("small", "t"), details={"architecture": "llama"}),
    FakeModel("org/big", is_default=False, state="loading", max_model_len=None, tokenizer=None),
]
TINY = {
    "id": "tiny",
    "object": "model",
    "created": 1763900000,
    "owned_by": "inferflux",
    "inferflux": {
        "backend": "fake",
        "max_model_len": 4096,
        "aliases": ["small", "t"],
        "default": True,
        "state": "ready",
        "details": {"architecture": "llama"},
    },
}


def two_models() -> Stand:
    return stand(models=FakeModels(list(VIEWS)))


async def test_list() -> None:
    async with two_models().client() as client:
        body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    assert body["data"][0] == TINY
    assert [(model["id"], model["inferflux"]["state"]) for model in body["data"]] == [("tiny", "ready"), ("org/big", "loading")]


@pytest.mark.parametrize(
    ("name", "found"), [("tiny", "tiny"), ("small", "tiny"), ("org/big", "org/big"), ("org%2Fbig", "org/big")]
)
async def test_one(name: str, found: str) -> None:
    async with two_models().client() as client:
        body = (await client.get(f"/v1/models/{name}")).json()
    assert body["id"] == found


@pytest.mark.parametrize("name", ["other", "TINY", "../../etc/passwd", "a%0Ab", "x" * 10_000])
async def test_no_such_model(name: str) -> None:
    async with two_models().client() as client:
        response = await client.get(f"/v1/models/{name}")
    error = response.json()["error"]
    assert response.status_code == 404
    assert error["type"] == "invalid_request_error"
    assert error["code"] in ("model_not_found", None)  # None: the client itself resolved `..` out of the route


@needs_document
async def test_replies_conform_to_openais_document() -> None:
    async with two_models().client() as client:
        conforms((await client.get("/v1/models")).json(), "ListModelsResponse")
        conforms((await client.get("/v1/models/tiny")).json(), "Model")
        conforms((await client.get("/v1/models/none")).json(), "ErrorResponse")


TOKENIZE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"prompt": "hi"}, {"count": 3, "max_model_len": 4096, "tokens": [256, 104, 105]}),
    ({"model": "t", "prompt": "hi", "add_special_tokens": False}, {"count": 2, "max_model_len": 4096, "tokens": [104, 105]}),
    (
        {"prompt": "é", "return_token_strs": True},
        {"count": 3, "max_model_len": 4096, "tokens": [256, 195, 169], "token_strs": ["<s>", "\ufffd", "\ufffd"]},
    ),
    ({"messages": [{"role": "user", "content": "a"}]}, {"count": 7, "max_model_len": 4096, "tokens": list(b"<user>a")}),
    (
        {"prompt": "<s>", "add_special_tokens": False},
        {"count": 3, "max_model_len": 4096, "tokens": [60, 115, 62]},
    ),
    (
        {"prompt": "<s>", "add_special_tokens": False, "parse_special": True},
        {"count": 1, "max_model_len": 4096, "tokens": [256]},
    ),
    ({"content": "hi"}, {"tokens": [104, 105]}),
    ({"content": ""}, {"tokens": []}),
    ({"content": "hi", "add_special": True}, {"tokens": [256, 104, 105]}),
    ({"content": "<s>"}, {"tokens": [256]}),
    ({"content": "<s>", "parse_special": False}, {"tokens": [60, 115, 62]}),
    (
        {"content": "aé", "with_pieces": True},
        {"tokens": [{"id": 97, "piece": "a"}, {"id": 195, "piece": [195]}, {"id": 169, "piece": [169]}]},
    ),
]


@pytest.mark.parametrize(("body", "reply"), TOKENIZE)
async def test_tokenize(body: dict[str, Any], reply: dict[str, Any]) -> None:
    async with two_models().client() as client:
        response = await client.post("/tokenize", json=body)
    assert (response.status_code, response.json()) == (200, reply)


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({}, 400, "prompt", None),
        ({"prompt": "a", "content": "b"}, 400, "content", None),
        ({"messages": []}, 400, "messages", None),
        ({"messages": [{"role": "user"}]}, 400, "messages[0].content", None),
        ({"prompt": 5}, 400, "prompt", None),
        ({"prompt": "x", "model": "none"}, 404, "model", "model_not_found"),
        ({"prompt": "x", "model": "org/big"}, 503, "model", "model_loading"),
    ],
)
async def test_tokenize_refusals(body: dict[str, Any], status: int, param: str, code: str | None) -> None:
    async with two_models().client() as client:
        response = await client.post("/tokenize", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)


async def test_detokenize() -> None:
    async with two_models().client() as client:
        reply = (await client.post("/detokenize", json={"tokens": [256, 104, 195, 169, 255]})).json()
        empty = (await client.post("/detokenize", json={"tokens": []})).json()
    assert reply == {"prompt": "<s>hé\ufffd", "content": "<s>hé\ufffd"}
    assert empty == {"prompt": "", "content": ""}


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "tokens"),
        ({"tokens": "x"}, 400, "tokens"),
        ({"tokens": [1, -1]}, 400, "tokens[1]"),
        ({"tokens": [1, 257]}, 400, "tokens[1]"),
        ({"tokens": [1, True]}, 400, "tokens[1]"),
        ({"tokens": [1], "model": "org/big"}, 503, "model"),
    ],
)
async def test_detokenize_refusals(body: dict[str, Any], status: int, param: str) -> None:
    async with two_models().client() as client:
        response = await client.post("/detokenize", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)


async def test_apply_template() -> None:
    async with two_models().client() as client:
        reply = await client.post("/apply-template", json={"messages": [{"role": "developer", "content": "a"}]})
    assert (reply.status_code, reply.json()) == (200, {"prompt": "<system>a"})
