"""Runs sequences through a runner plan by plan, with drafts of any quality: what an engine does, but for its choices."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from inferflux_core.engine.types import (
    GrammarMask,
    PagedOps,
    Row,
    SamplingParams,
    SchedulerOutput,
    SequenceInit,
    TokenLogprobs,
)
from inferflux_core.interfaces import ModelRunner


@dataclass
class Run:
    """One sequence: prompt, then what was drawn.

    Attributes:
        drafts: how many tokens of a draft held, of each step that had one.
    """

    params: SamplingParams
    prompt: list[int]
    drawn: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)


def generate(
    runner: ModelRunner,
    sequences: Sequence[tuple[Sequence[int], SamplingParams]],
    known: Sequence[Sequence[int]] | None = None,
    most: int = 6,
    seed: int = 1,
    mask: Mapping[int, GrammarMask] | None = None,
) -> list[Run]:
    """Draw `max_tokens` tokens of each sequence, all in each step; the first steps compute the prompts.

    Args:
        known: what will be drawn: drafts are the next tokens of it, often with a wrong one among them. None for no drafts.
        most: draft tokens of a row.
        mask: by number of tokens drawn so far, what slot 0 may draw next; with as many rows as may be needed.
    """
    chance = random.Random(seed)
    runs = [Run(params, list(prompt)) for prompt, params in sequences]
    size = runner.kv_cache_spec.block_size
    longest = max(len(run.prompt) + run.params.max_tokens for run in runs) + most + 1
    width = -(-longest // size)
    started = False
    step = 0
    while any(len(run.drawn) < run.params.max_tokens for run in runs):
        rows = []
        for slot, run in enumerate(runs):
            left = run.params.max_tokens - len(run.drawn)
            if left <= 0:
                continue
            draft: list[int] = []
            if known is not None and not run.params.is_penalised:
                draft = list(known[slot][len(run.drawn) :][: min(chance.randint(0, most), left - 1)])
                if draft and chance.random() < 0.5:
                    wrong = chance.randrange(len(draft))
                    draft[wrong] = (draft[wrong] + 1) % runner.model_info.vocab_size
            tokens = [*(run.drawn[-1:] if started else run.prompt), *draft]
            start = len(run.prompt) + len(run.drawn) - 1 if started else 0
            blocks = () if started else tuple(range(1 + slot * width, 1 + (slot + 1) * width))
            rows.append(Row(slot, start, len(tokens), tokens, len(draft), True, PagedOps(blocks)))
        inits = [] if started else [SequenceInit(i, run.params, run.prompt, len(run.prompt)) for i, run in enumerate(runs)]
        ticket = runner.launch(SchedulerOutput(step, rows, sum(row.n for row in rows), inits))
        here = mask[len(runs[0].drawn)] if mask is not None and rows[0].slot == 0 else None
        runner.sample(ticket, here)
        output = runner.collect(ticket)
        assert output.step == step
        for row, tokens, logprobs in zip(rows, output.tokens, output.logprobs, strict=True):
            run = runs[row.slot]
            assert row.tokens is not None
            drafted = list(row.tokens)[row.n - row.n_draft :]
            assert tokens[:-1] == drafted[: len(tokens) - 1], "what was kept but for the last is the draft"
            assert len(tokens) == row.n_draft + 1 or tokens[-1] != drafted[len(tokens) - 1]
            if drafted:
                run.drafts.append(len(tokens) - 1)
            if run.params.logprobs is not None:
                assert logprobs is not None
                assert len(logprobs) == len(tokens)
                run.logprobs += logprobs
            else:
                assert logprobs is None
            run.drawn += tokens
        started, step = True, step + 1
    return runs
