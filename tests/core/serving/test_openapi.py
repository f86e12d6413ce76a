"""The description of the API describes what there is."""

from __future__ import annotations

from typing import Any

from core.serving.scripted import stand


def references(node: Any) -> set[str]:
    if isinstance(node, list):
        return set().union(*(references(item) for item in node))
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*(references(value) for value in node.values()))
    return set()


async def test_document() -> None:
    async with stand().client() as client:
        document = (await client.get("/openapi.json")).json()
        again = (await client.get("/openapi.json")).json()
    assert document == again
    assert {
        path: sorted(operations)
        for path, operations in document["paths"].items()
        if not path.startswith(("/v1/admin/", "/.well-known/"))
    } == {
        "/v1/chat/completions": ["post"],
        "/v1/completions": ["post"],
        "/v1/models": ["get"],
        "/v1/models/{model_id}": ["get"],
        "/tokenize": ["post"],
        "/detokenize": ["post"],
        "/apply-template": ["post"],
        "/livez": ["get"],
        "/readyz": ["get"],
        "/healthz": ["get"],
        "/metrics": ["get"],
    }
    schemas = document["components"]["schemas"]
    assert references(document) <= {f"#/components/schemas/{name}" for name in schemas}
    chat = document["paths"]["/v1/chat/completions"]["post"]
    assert chat["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/ChatBody"}
    assert chat["responses"]["200"]["content"].keys() == {"application/json", "text/event-stream"}
    assert {"400", "404", "413", "415", "500", "503", "504"} <= chat["responses"].keys()
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert not [operation for operation in operations if "422" in operation["responses"]]
    assert schemas["ChatBody"]["required"] == ["messages"]
