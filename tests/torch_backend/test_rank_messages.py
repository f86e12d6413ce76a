"""What ranks say to each other arrives as it was sent, and followers do with it what an engine does."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux_backend_torch.follower_process import follow
from inferflux_backend_torch.rank_messages import TO_FOLLOWER, Channel, Plan, Sample, WarmUp, encode
from inferflux_core.engine.types import (
    GrammarMask,
    ModelRunnerOutput,
    PagedOps,
    Row,
    SamplingParams,
    SchedulerOutput,
    SequenceInit,
)
from inferflux_core.interfaces import Capabilities, ModelRunner, Ticket

ids = st.integers(0, 2**20)
rows = st.builds(
    Row,
    slot=ids,
    start=ids,
    n=ids,
    tokens=st.none() | st.lists(ids),
    n_draft=ids,
    sample=st.booleans(),
    kv=st.builds(PagedOps, st.lists(ids)),
)
params = st.builds(
    SamplingParams,
    max_tokens=ids,
    temperature=st.floats(0, 2),
    logit_bias=st.dictionaries(ids, st.floats(-100, 100)),
    seed=st.integers(0, 2**64 - 1),
    stop_token_ids=st.frozensets(ids),
    logprobs=st.none() | st.integers(0, 20),
)
inits = st.builds(SequenceInit, slot=ids, params=params, tokens=st.lists(ids), num_prompt_tokens=ids)
plans = st.builds(SchedulerOutput, step=ids, rows=st.lists(rows), num_tokens=ids, start=st.lists(inits), free=st.lists(ids))


@given(st.lists(plans, max_size=3))
def test_plans_survive_the_way(sent: list[SchedulerOutput]) -> None:
    ours, theirs = (Channel(end) for end in socket.socketpair())
    for plan in sent:
        ours.send(Plan.of(plan))
    ours.end()
    for plan in sent:
        message = theirs.receive(TO_FOLLOWER)
        assert isinstance(message, Plan)
        assert message.plan() == plan
    with pytest.raises(EOFError):
        theirs.receive(TO_FOLLOWER)
    ours.close()
    theirs.close()


@given(plans, st.data())
def test_half_a_message_is_the_end(plan: SchedulerOutput, data: st.DataObject) -> None:
    message = encode(Plan.of(plan))
    part = message[: data.draw(st.integers(0, len(message) - 1))]  # before the sockets: hypothesis may end an example here
    ours, theirs = (Channel(end) for end in socket.socketpair())
    ours.send_encoded(part)
    ours.close()
    with pytest.raises(EOFError):
        theirs.receive(TO_FOLLOWER)
    theirs.close()


@given(st.none() | st.tuples(st.integers(1, 5), st.integers(1, 70), st.dictionaries(ids, ids), st.integers(0, 2**31)))
def test_masks_survive_the_way(sent: tuple[int, int, dict[int, int], int] | None) -> None:
    mask = None
    if sent is not None:
        count, words, first, seed = sent
        bits = np.random.default_rng(seed).integers(-(2**31), 2**31, (count, words), dtype=np.int64).astype(np.int32)
        mask = GrammarMask(bits, first)
    ours, theirs = (Channel(end) for end in socket.socketpair())
    ours.send(Sample.of(mask))
    message = theirs.receive(TO_FOLLOWER)
    ours.close()
    theirs.close()
    assert isinstance(message, Sample)
    arrived = message.mask()
    if mask is None:
        assert arrived is None
    else:
        assert arrived is not None
        assert arrived.bits.dtype == np.int32
        assert np.array_equal(arrived.bits, mask.bits)
        assert arrived.first == mask.first


class Scripted(ModelRunner):
    """Writes down what is asked of it."""

    def __init__(self, depth: int) -> None:
        self.caps = Capabilities(max_num_seqs=1, max_num_batched_tokens=1, depth=depth)
        self.calls: list[str] = []

    def warm_up(self) -> None:
        self.calls.append("warm up")

    def launch(self, plan: SchedulerOutput) -> Ticket:
        self.calls.append(f"launch {plan.step}")
        return Ticket(plan)

    def sample(self, ticket: Ticket, mask: GrammarMask | None) -> None:
        of = "" if mask is None else f" of {mask.bits.tolist()}"
        self.calls.append(f"sample {ticket.plan.step}{of}")

    def collect(self, ticket: Ticket) -> ModelRunnerOutput:
        self.calls.append(f"collect {ticket.plan.step}")
        return ModelRunnerOutput(ticket.plan.step, [], [], 0.0)

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("depth", "calls"),
    [
        (1, "warm up, launch 1, sample 1, collect 1, launch 2, sample 2 of [[5, -1]], collect 2"),
        (2, "warm up, launch 1, sample 1, launch 2, collect 1, sample 2 of [[5, -1]], collect 2"),
    ],
)
def test_followers_make_an_engines_calls(depth: int, calls: str) -> None:
    ours, theirs = (Channel(end) for end in socket.socketpair())
    ours.send(WarmUp())
    for step in (1, 2):
        ours.send(Plan.of(SchedulerOutput(step=step, rows=[], num_tokens=0)))
        mask = None if step == 1 else GrammarMask(np.array([[5, -1]], dtype=np.int32), {0: 0})
        ours.send(Sample.of(mask))
    ours.end()
    runner = Scripted(depth)
    follow(runner, theirs)
    ours.close()
    theirs.close()
    assert ", ".join(runner.calls) == calls
