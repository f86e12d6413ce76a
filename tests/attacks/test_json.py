"""Attacks on the JSON of requests and on the numbers in it, through the front door. Numbers are those of
reference/security.md, 7.3, items 18 to 30; the whole matrices are in core/serving/test_json_body.py and test_request_fields.py.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attacks.api_server import CHAT, ApiServer, api_server, error_of, refusal, server_ms
from attacks.raw_http import RawConnection, ask, head
from inferflux_core.engine.types import EngineStats

logger = logging.getLogger(__name__)

URL = "/v1/chat/completions"
TEN_MIB = 10 * 1024 * 1024
CONTEXT = 256  # tokens; the fake tokenizer makes one of each byte and puts a BOS before a completion's prompt

assert EngineStats  # the engine is asked for its state through /healthz


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("server")) as there:
        yield there
