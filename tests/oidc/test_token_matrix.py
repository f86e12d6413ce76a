"""The matrix accepts what it says; what it refuses is run with the attacks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from oidc.checked import checking
from oidc.hostile_provider import HostileProvider, hostile_provider
from oidc.token_matrix import ACCEPTED, Case


@pytest.fixture(scope="module")
def issuer() -> Iterator[HostileProvider]:
    with hostile_provider() as provider:
        yield provider


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.name)
async def test_a_good_token_is_accepted(issuer: HostileProvider, case: Case) -> None:
    async with checking({"issuer": issuer.url, **case.issuer}) as checked:
        assert await checked.verdict(case.make(issuer.url)) == "accepted"
