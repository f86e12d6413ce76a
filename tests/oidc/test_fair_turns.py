"""Turns: who gets the next one."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferflux_auth_oidc.fair_turns import FairTurns
from inferflux_auth_oidc.refusal import Unavailable


class Wish:
    """A task that has a turn until it is told to end it."""

    def __init__(self, turns: FairTurns, client: str, order: list[str], patience: float = 30.0) -> None:
        self.client = client
        self.has_turn = False
        self.end = asyncio.Event()
        self.task = asyncio.create_task(self._run(turns, order, patience))

    async def _run(self, turns: FairTurns, order: list[str], patience: float) -> None:
        async with turns.turn(self.client, patience):
            self.has_turn = True
            order.append(self.client)
            try:
                await self.end.wait()
            finally:
                self.has_turn = False


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def new_turns() -> FairTurns:
    return FairTurns(3, 2, waiting_of_client=5, waiting=8)


async def test_clients_that_wait_are_served_in_rotation() -> None:
    turns, order = FairTurns(1, 1, waiting_of_client=5, waiting=8), list[str]()
    wishes = [Wish(turns, client, order) for client in "xaaaabbc"]
    await settle()
    assert (order, turns.waiting) == (["x"], 7)
    for wish in wishes:
        wish.end.set()
    await asyncio.gather(*(wish.task for wish in wishes))
    assert "".join(order) == "xabcabaa"
    assert turns.waiting == 0


async def test_too_many_that_wait_are_sent_away_at_once() -> None:
    turns, order = new_turns(), list[str]()
    wishes = [Wish(turns, "a", order) for _ in range(7)] + [Wish(turns, "b", order) for _ in range(4)]
    await settle()
    assert (order, turns.waiting) == (["a", "a", "b"], 8)
    for client in "ac":  # of this client, and of all
        with pytest.raises(Unavailable):
            await Wish(turns, client, order).task
    for wish in wishes:
        wish.task.cancel()
    await asyncio.gather(*(wish.task for wish in wishes), return_exceptions=True)
    assert turns.waiting == 0


async def test_patience_ends_and_the_place_in_the_queue_with_it() -> None:
    turns, order = new_turns(), list[str]()
    having = [Wish(turns, "a", order) for _ in range(2)]
    await settle()
    with pytest.raises(Unavailable):
        await Wish(turns, "a", order, patience=0.01).task
    assert turns.waiting == 0
    for wish in having:
        wish.end.set()
    await asyncio.gather(*(wish.task for wish in having))
    assert order == ["a", "a"]


@given(st.lists(st.tuples(st.sampled_from(["wish", "end", "cancel", "end and cancel"]), st.integers(0, 50)), max_size=60))
def test_turns_are_neither_lost_nor_made(steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        turns, order = FairTurns(3, 2, waiting_of_client=50, waiting=100), list[str]()
        alive: list[Wish] = []
        for what, number in steps:
            if what == "wish":
                alive.append(Wish(turns, "abc"[number % 3], order))
            elif alive:
                wish = alive[number % len(alive)]
                if "end" in what:
                    wish.end.set()
                    await asyncio.sleep(0)  # a cancellation right behind it meets a turn that was just handed on
                if "cancel" in what:
                    alive[(number + 1) % len(alive)].task.cancel()
            await settle()
            alive = [wish for wish in alive if not wish.task.done()]
            having = Counter(wish.client for wish in alive if wish.has_turn)
            waiting = Counter(wish.client for wish in alive if not wish.has_turn)
            assert having.total() <= 3
            assert all(count <= 2 for count in having.values())
            assert turns.waiting == waiting.total()
            # Nobody waits who could go on.
            assert having.total() == 3 or all(having[client] == 2 for client in waiting)
        for wish in alive:
            wish.task.cancel()
        await asyncio.gather(*(wish.task for wish in alive), return_exceptions=True)
        last = [Wish(turns, client, order) for client in "abc"]
        await settle()
        assert all(wish.has_turn for wish in last)
        for wish in last:
            wish.end.set()
        await asyncio.gather(*(wish.task for wish in last))

    asyncio.run(play())
