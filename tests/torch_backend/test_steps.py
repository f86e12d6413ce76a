"""A plan's rows become the tensors of a step; the KV cache has the size that settings and memory allow."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from inferflux_backend_torch.cache_size import CacheShape, choose_lengths  # noqa: E402  # after the skip
from inferflux_backend_torch.steps import HostSteps  # noqa: E402
from inferflux_core.engine.types import PagedOps, Row  # noqa: E402
from inferflux_core.errors import ModelFileError  # noqa: E402
from inferflux_core.interfaces import EngineConfig  # noqa: E402

CPU = torch.device("cpu")
SHAPE = CacheShape(num_layers=2, num_kv_heads=3, head_dim=20, block_size=16, dtype=torch.bfloat16)


def row(slot: int, start: int, tokens: list[int], blocks: tuple[int, ...] = ()) -> Row:
    return Row(slot=slot, start=start, n=len(tokens), tokens=tokens, n_draft=0, sample=True, kv=PagedOps(blocks))


def test_rows_become_one_flat_batch() -> None:
    steps = HostSteps(max_num_seqs=4, max_model_len=32, block_size=4, device=CPU)
    steps.start(2)
    steps.start(0)
    steps.inputs([row(2, 0, [10, 11, 12, 13, 14], (5, 3))], [0])
    inputs = steps.inputs([row(2, 5, [15]), row(0, 0, [20, 21, 22], (7,))], [1])
    assert inputs.token_ids.tolist() == [15, 20, 21, 22]
    assert inputs.positions.tolist() == [5, 0, 1, 2]
    assert inputs.slot_mapping.tolist() == [3 * 4 + 1, 28, 29, 30]
    assert inputs.query_start.tolist() == inputs.host_query_start == [0, 1, 4]
    assert inputs.seq_lens.tolist() == inputs.host_seq_lens == [6, 3]
    assert inputs.block_table.tolist() == [[5, 3], [7, 0]]
    assert inputs.logits_indices.tolist() == [3]
    assert (inputs.num_decodes, inputs.max_query_len, inputs.max_seq_len) == (1, 3, 6)


def test_logits_are_wanted_of_drafts_and_of_the_token_before_them() -> None:
    steps = HostSteps(max_num_seqs=4, max_model_len=32, block_size=4, device=CPU)
    rows = [row(2, 0, [10], (5,)), row(0, 0, [20, 21, 22, 23], (7,)), row(3, 0, [30, 31, 32], (8,))]
    rows[1].n_draft = 2
    rows[2].n_draft = 2
    assert steps.inputs(rows, [2, 0, 1]).logits_indices.tolist() == [5, 6, 7, 0, 2, 3, 4]
    assert steps.inputs([replace(one, kv=PagedOps()) for one in rows], [1]).logits_indices.tolist() == [2, 3, 4]


def test_a_new_sequence_begins_with_an_empty_table() -> None:
    steps = HostSteps(max_num_seqs=1, max_model_len=32, block_size=4, device=CPU)
    steps.start(0)
    steps.inputs([row(0, 0, [1] * 6, (5, 3))], [0])
    steps.start(0)
    inputs = steps.inputs([row(0, 0, [1] * 5, (2, 6))], [0])
    assert inputs.slot_mapping.tolist() == [8, 9, 10, 11, 24]


def test_a_block_has_keys_and_values_of_all_layers() -> None:
    assert SHAPE.block_bytes == 2 * 2 * 16 * 3 * 20 * 2
    cache = SHAPE.allocate(5, CPU)
    assert cache.data.nbytes == 5 * SHAPE.block_bytes
    assert cache.keys[1].shape == (5, 16, 3, 20)


def test_lengths_follow_from_memory_training_and_settings() -> None:
    room = 11 * SHAPE.block_bytes  # one of them block 0, which holds padding
    assert choose_lengths(SHAPE, room, 4096, EngineConfig(), "m") == (11, 160)
    assert choose_lengths(SHAPE, room, 100, EngineConfig(), "m") == (11, 100)
    assert choose_lengths(SHAPE, room, 4096, EngineConfig(max_model_len=64), "m") == (11, 64)
    with pytest.raises(ModelFileError, match=r"holds 160 tokens, and one sequence of 161 needs"):
        choose_lengths(SHAPE, room, 4096, EngineConfig(max_model_len=161), "m")
    with pytest.raises(ModelFileError, match=r"holds 0 tokens"):
        choose_lengths(SHAPE, -5, 4096, EngineConfig(), "m")
