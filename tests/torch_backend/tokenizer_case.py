"""Tiny tokenizers with one thing changed in their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from torch_backend.tiny_tokenizers import KINDS, write_folder

pytest.importorskip("tokenizers", reason="the backend's tokenizers are run by it")

from inferflux_backend_torch.tokenizer import HFTokenizer

Document = dict[str, Any]


class Loaded:
    """A tokenizer and its files. No dataclass: hypothesis would print the fields, and a vocabulary is long."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.document: Document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        self.tokenizer = HFTokenizer(folder)

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        return self.tokenizer.encode(text, add_special=False, parse_special=parse_special)


@cache
def document(kind: str) -> str:
    return json.dumps(KINDS[kind]())


def made(tmp_path: Path, change: Callable[[Document], object] = bool, kind: str = "byte_level", **files: Any) -> HFTokenizer:
    """A tiny tokenizer after a change to its tokenizer.json, beside other files."""
    content = json.loads(document(kind))
    change(content)
    return HFTokenizer(write_folder(tmp_path / "model", content, **files))


def put(*path: str | int, value: object) -> Callable[[Document], None]:
    def change(content: Any) -> None:
        for step in path[:-1]:
            content = content[step]
        content[path[-1]] = value

    return change


def rename(pairs: Mapping[str, str]) -> Callable[[Document], None]:
    def change(content: Document) -> None:
        for token in content["added_tokens"]:
            token["content"] = pairs.get(token["content"], token["content"])
        content["post_processor"] = None

    return change
