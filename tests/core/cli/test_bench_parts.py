"""The parts of `inferflux bench`: the figures of a run, the prompts of a workload, and the parsers of what servers send."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.cli.stub_server import sse, text_chunk, usage_chunk
from inferflux_core.cli.api_errors import ApiError
from inferflux_core.cli.bench.client import Run, Sample
from inferflux_core.cli.bench.connection import Answer, Connection
from inferflux_core.cli.bench.figures import agreement, figures_of, medians, percentile, ratios
from inferflux_core.cli.bench.workloads import NAMES, Name, Script, Workload
from inferflux_core.cli.endpoint import Endpoint
from inferflux_core.cli.sse import EventStream

COMPLETIONS = "/v1/completions"

# figures


def answered(due: float, sent: float, arrivals: Sequence[float], tokens: int | None, text: str = "x") -> Sample:
    answer = Answer()
    answer.sent, answer.arrivals, answer.completion_tokens = sent, list(arrivals), tokens
    answer.chunks, answer.texts, answer.prompt_tokens = len(arrivals), [text], 10
    return Sample(script=0, turn=0, prompt="p", due=due, answer=answer)


def run_of(*samples: Sample) -> Run:
    for index, sample in enumerate(samples):
        sample.script = index
    return Run(samples=list(samples), client_cpu_s=0.5, elapsed_s=2.0)


def test_figures_of_a_run_to_the_millisecond() -> None:
    run = run_of(
        answered(due=1.0, sent=1.0, arrivals=[1.25, 1.5, 2.0], tokens=4),
        answered(due=1.0, sent=1.5, arrivals=[2.0, 3.0], tokens=2),
        Sample(script=0, turn=0, prompt="p", due=0.0, error="boom"),
    )
    found = figures_of(run, max_tokens=4, scheduled=True)
    assert (found.requests, found.failed, found.errors) == (3, 1, {"boom": 1})
    assert (found.wall_s, found.output_tokens, found.output_tokens_per_s, found.requests_per_s) == (2.0, 6, 3.0, 1.0)
    times = [found.ttft_p50_ms, found.ttft_p99_ms, found.time_per_token_p50_ms, found.late_send_p99_ms]
    assert times == pytest.approx([625, 992.5, 625, 495])
    assert (found.gap_p50_ms, found.gap_max_ms, found.latency_p50_ms) == (500, 1000, 1500)
    assert (found.short_answers, found.prompt_tokens, found.cached_tokens) == (1, 20, None)
    assert found.client_cpu_ratio == 0.25


def test_medians_and_ratios_go_alternation_by_alternation() -> None:
    def alternation(ttft: float) -> Run:
        return run_of(answered(due=0.0, sent=0.0, arrivals=[ttft, ttft + 1], tokens=2))

    ours = [figures_of(alternation(ttft), max_tokens=2, scheduled=False) for ttft in (1.0, 4.0, 3.0)]
    theirs = [figures_of(alternation(ttft), max_tokens=2, scheduled=False) for ttft in (2.0, 1.0, 6.0)]
    assert medians(ours)["ttft_p50_ms"] == 3000
    assert ratios(ours, theirs)["ttft_p50_ms"] == 0.5  # the median of 0.5, 4 and 0.5, not 3 / 2
    assert ratios(ours, theirs)["failed"] is None  # nothing can be divided by zero failures


@pytest.mark.parametrize(
    ("values", "percent", "expected"),
    [([], 50, None), ([3.0], 99, 3.0), ([1.0, 2.0], 50, 1.5), ([4.0, 1.0, 2.0, 3.0], 100, 4.0), ([0.0, 10.0], 99, 9.9)],
)
def test_percentile(values: list[float], percent: float, expected: float | None) -> None:
    assert percentile(values, percent) == expected


def test_agreement_leaves_failed_requests_out() -> None:
    failed = Sample(script=0, turn=0, prompt="p", due=0.0, error="boom")
    ours = run_of(answered(0, 0, [1], 1, "same"), answered(0, 0, [1], 1, "abc"), failed)
    theirs = run_of(answered(0, 0, [1], 1, "same"), answered(0, 0, [1], 1, "ab"), answered(0, 0, [1], 1, "x"))
    found = agreement("ours", [ours], "theirs", [theirs])
    assert (found.compared, found.identical, found.identical_ratio) == (2, 1, 0.5)
    assert found.first_difference is not None
    assert (found.first_difference.request, found.first_difference.common_prefix) == (1, 2)


# workloads


@pytest.mark.parametrize("name", NAMES)
def test_workloads_follow_from_the_seed(name: Name) -> None:
    workload = Workload.make(name)
    scripts = workload.scripts(8, seed=1, alternation=0)
    assert scripts == workload.scripts(8, seed=1, alternation=0)
    assert len(scripts) * workload.requests_per_script == 8
    everything = [
        message
        for seed, alternation in ((1, 0), (1, 1), (2, 0))
        for script in workload.scripts(8, seed=seed, alternation=alternation)
        for message in script.messages
    ]
    assert len(set(everything)) == len(everything) == 24


def test_workloads_have_their_shapes() -> None:
    def words(script: Script) -> int:
        return len(script.messages[0].split())

    assert {words(script) for script in Workload.make("plain").scripts(4, seed=0, alternation=0)} == {93}
    assert {words(script) for script in Workload.make("plain", 55).scripts(4, seed=0, alternation=0)} == {47}
    assert [words(script) for script in Workload.make("mixed").scripts(5, seed=0, alternation=0)] == [*(93, 93, 93, 1059, 93)]
    first, second = (script.messages[0] for script in Workload.make("shared-prefix").scripts(2, seed=0, alternation=0))
    assert first.split()[:712] == second.split()[:712]
    assert first.split()[712:] != second.split()[712:]
    other = Workload.make("shared-prefix").scripts(1, seed=0, alternation=1)[0].messages[0]
    assert other.split()[:20] != first.split()[:20]


# the parsers, whatever the network makes of the bytes


def split_at(data: bytes, cuts: Sequence[int]) -> list[bytes]:
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[start:end] for start, end in itertools.pairwise(edges)]


@given(
    payloads=st.lists(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\r\n"), min_size=1), min_size=1, max_size=3)
    ),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    comment=st.booleans(),
    cuts=st.lists(st.integers(0, 10_000), max_size=20),
)
def test_events_survive_any_split(payloads: list[list[str]], newline: bytes, comment: bool, cuts: list[int]) -> None:
    blocks = []
    for payload in payloads:
        ping = [b": ping", b"", b"event: x"] if comment else []
        blocks += [*ping, *(b"data: " + line.encode() for line in payload), b""]
    data = b"".join(block + newline for block in blocks)
    stream = EventStream()
    found = [event for piece in split_at(data, cuts) for event in stream.feed(piece)]
    assert found == ["\n".join(payload).encode() for payload in payloads]
    assert stream.feed(b"data: without its empty line\n") == []


class FakeTransport(asyncio.Transport):
    """Takes what is written and does nothing."""

    closed = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True


async def _receive(pieces: Sequence[bytes]) -> Answer:
    connection = Connection(Endpoint.parse("http://127.0.0.1:1"))
    connection.connection_made(FakeTransport())
    posting = asyncio.create_task(connection.post(COMPLETIONS, b"{}"))
    await asyncio.sleep(0)  # let it send
    for piece in pieces:
        connection.data_received(piece)
    connection.connection_lost(None)
    return await posting


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(min_size=1), min_size=1, max_size=8),
    chunk_cuts=st.lists(st.integers(0, 10_000), max_size=10),
    packet_cuts=st.lists(st.integers(0, 10_000), max_size=30),
    chunked=st.booleans(),
)
def test_answers_survive_any_split(texts: list[str], chunk_cuts: list[int], packet_cuts: list[int], chunked: bool) -> None:
    body = b"".join(sse(text_chunk(text)) for text in texts)
    body += sse(text_chunk("", "length")) + sse(usage_chunk(7, len(texts), 3)) + b"data: [DONE]\n\n"
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
    if chunked:
        framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in split_at(body, chunk_cuts))
        data = head + b"Transfer-Encoding: chunked\r\n\r\n" + framed + b"0\r\n\r\n"
    else:
        data = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    answer = asyncio.run(_receive(split_at(data, packet_cuts)))
    assert answer.texts == texts
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (7, len(texts), 3)
    assert 1 <= len(answer.arrivals) <= answer.chunks == len(texts)
    assert answer.arrivals == sorted(set(answer.arrivals))


def test_chunks_that_come_together_are_one_arrival() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    both = sse(text_chunk("a")) + sse(text_chunk("b"))
    answer = asyncio.run(_receive([head, both, sse(text_chunk("c", "stop"))]))
    assert (answer.chunks, len(answer.arrivals)) == (3, 2)


@given(cut=st.integers(0, 10_000))
@settings(deadline=None, max_examples=30)
def test_an_answer_that_is_cut_off_is_never_taken_for_a_whole_one(cut: int) -> None:
    body = sse(text_chunk("a")) + sse(text_chunk("b"))
    data = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 999\r\n\r\n" + body
    with pytest.raises(ApiError) as caught:
        asyncio.run(_receive([data[: cut % len(data)]]))
    assert "the connection closed in the middle of the answer" in str(caught.value)
