"""The fake backend holds to the contract with every cache layout, and the contract notices when one does not."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from inferflux_core.engine.kv.sequence import SequenceKVCacheManager
from inferflux_core.interfaces import EngineConfig, ModelRunner
from inferflux_core.testing.conformance import BackendConformance
from inferflux_core.testing.fake_backend import FakeRunner
from inferflux_core.testing.fake_settings import FakeSettings


class FakeConformance(BackendConformance):
    settings = FakeSettings()

    def make_runner(self, config: EngineConfig) -> ModelRunner:
        return FakeRunner(self.settings, config)

    def prompt(self, length: int, variant: int = 0) -> Sequence[int]:
        return [97 + (i * 7 + variant * (i + 1)) % 26 for i in range(length)]


class TestPaged(FakeConformance):
    pass


class TestPagedWithOddBlocks(FakeConformance):
    settings = FakeSettings(block_size=7, num_blocks=80)


class TestStreams(FakeConformance):
    settings = FakeSettings(layout="sequence")


class TestRetainingStreams(FakeConformance):
    settings = FakeSettings(layout="sequence", num_streams=9)


class TestSharedPool(FakeConformance):
    settings = FakeSettings(layout="sequence", pool_tokens=600)


class TestStreamsThatCannotBeCut(FakeConformance):
    settings = FakeSettings(layout="sequence", can_trim=False)


class TestPagedOneAhead(FakeConformance):
    settings = FakeSettings(depth=2)


class TestPagedWithOddBlocksOneAhead(FakeConformance):
    settings = FakeSettings(depth=2, block_size=7, num_blocks=80)


class TestStreamsOneAhead(FakeConformance):
    settings = FakeSettings(depth=2, layout="sequence")


class TestRetainingStreamsOneAhead(FakeConformance):
    settings = FakeSettings(depth=2, layout="sequence", num_streams=9)


class TestSharedPoolOneAhead(FakeConformance):
    settings = FakeSettings(depth=2, layout="sequence", pool_tokens=600)


class TestStreamsThatCannotBeCutOneAhead(FakeConformance):
    settings = FakeSettings(depth=2, layout="sequence", can_trim=False)


def test_the_contract_notices_a_wrong_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take one token too many from a donor: the conformance test must fail."""
    common = SequenceKVCacheManager._common
    monkeypatch.setattr(SequenceKVCacheManager, "_common", lambda self, r, s: min(common(self, r, s) + 1, s.length))
    with pytest.raises(AssertionError):
        TestStreams().test_prefix_hit_equals_miss()
