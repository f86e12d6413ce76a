"""What the audit log keeps of prompts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from core.access.audit.audit_logs import check, open_log, records
from inferflux_core.access.audit.content import kept_content, redacted
from inferflux_core.access.audit.events import MAX_CONTENT, AuditEvent

KEY = b"k" * 32


def test_none_hash_full() -> None:
    assert kept_content("none", "hello", KEY) == {}
    digest = kept_content("hash", "hello", KEY)["prompt_hmac"]
    assert digest == kept_content("hash", "hello", KEY)["prompt_hmac"]
    assert digest != kept_content("hash", "hello", b"o" * 32)["prompt_hmac"]
    assert digest != kept_content("hash", "hello!", KEY)["prompt_hmac"]
    assert kept_content("hash", "\ud800", KEY).keys() == {"prompt_hmac"}
    assert kept_content("full", "a@b.example", KEY) == {"prompt": "a@b.example"}
    assert kept_content("full", "x" * MAX_CONTENT, KEY) == {"prompt": "x" * MAX_CONTENT}
    assert kept_content("full", "x" * (MAX_CONTENT + 1), KEY) == {"prompt": "x" * MAX_CONTENT, "prompt_cut": True}


@pytest.mark.parametrize(
    "secret",
    [
        "ifx_live_0123456789ab_0123456789012345678901234567890123456789012abcdef",
        "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
        "Bearer abc.def-123456",
        "basic dXNlcjpwYXNz",
        "password=hunter2",
        'api_key: "abc"',
        "sk-proj-abcdefghijklmnop1234",
        "ghp_abcdefghijklmnop1234",
        "AKIAIOSFODNN7EXAMPLE",
        "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nMIIE",
        "ann.lee+x@mail.example.com",
        "jürgen@münchen.example",
        "root@localhost",
        "4111 1111 1111 1111",
        "4111-1111-1111-1111",
        "+49 (0)30 1234-567",
        "030/1234567",
        "٠١٢٣٤٥٦٧٨",
        "DE89 3704 0044 0532 0130 00",
        "192.168.10.1",
        "2001:db8::ff00:42:8329",
        "::1",
        "::ffff:10.0.0.1",
    ],
)
def test_redacted(secret: str) -> None:
    assert redacted(f"a {secret}") == "a [redacted]"
    text = redacted(f"before {secret} after")
    assert text.startswith("before [redacted]")
    assert secret not in text


@pytest.mark.parametrize("text", ["", "What is the capital of France?", "def f(x): return x[1:2] + 3.14", "12345", "std::vec"])
def test_not_redacted(text: str) -> None:
    assert redacted(text) == text


def test_a_secret_at_the_place_of_the_cut() -> None:
    text = "x " * (MAX_CONTENT // 2 - 5) + "ifx_live_0123456789ab_" + "s" * 43
    kept = kept_content("redacted", text, KEY)
    assert "ifx_" not in str(kept["prompt"])


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "1",
        "1 ",
        "a.",
        "a@",
        "@",
        ":",
        "1:",
        "1.",
        "eyJ",
        "-----BEGIN PRIVATE KEY-----",
        "bearer ",
        "a-",
        "A1",
        "ifx_",
        " (",
    ],
)
def test_time_is_in_proportion_to_the_text(unit: str) -> None:
    text = (unit * 70_000)[:66_000]
    begun = time.process_time()
    redacted(text)
    assert time.process_time() - begun < 1.0  # quadratic patterns need minutes


async def test_content_in_a_record(tmp_path: Path) -> None:
    prompt = "\U0001f600" * (2 * MAX_CONTENT)
    async with open_log(tmp_path, content="full") as log:
        assert log.keeps_content
        await log.record(AuditEvent(event="e", fields={"model": "demo", **log.content(prompt)}))
    (record,) = records(tmp_path)
    assert (record["prompt"], record["prompt_cut"]) == ("\U0001f600" * MAX_CONTENT, True)
    assert check(tmp_path).ok
