"""The runner on GPUs: the host only enqueues work, and may be one step ahead of the device.

A step is one transfer to the device, one graph, the sampler's kernels and one transfer back. What a step needs of the one
before it, the tokens that were drawn, stays on the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from inferflux_backend_torch.graphs import DecodeGraphs, Recorder
from inferflux_backend_torch.inputs import StepInputs
from inferflux_backend_torch.loading import Loaded
from inferflux_backend_torch.runner import TorchRunner, TorchTicket
from inferflux_backend_torch.settings import TorchSettings
from inferflux_backend_torch.triton_sampler import TritonDraw
from inferflux_backend_torch.triton_steps import DeviceSteps
from inferflux_core.engine.types import Row
from inferflux_core.interfaces import EngineConfig, GrammarMask, Ticket


class GpuRunner(TorchRunner):
    """Runs a model with Triton's kernels, decodes as CUDA graphs."""

    def __init__(self, loaded: Loaded, settings: TorchSettings, config: EngineConfig, recorder: Recorder | None = None) -> None:
        """
        Args:
            recorder: how decode steps are repeated; by default CUDA graphs.
        """
        info, device = loaded.model_info, loaded.device
        self._device_steps = DeviceSteps(config.max_num_seqs, info.max_model_len, loaded.cache.block_size, device)
        super().__init__(
            loaded,
            config,
            steps=self._device_steps,
            draw=TritonDraw(info.vocab_size, config.max_num_seqs, device),
            depth=2 if settings.async_scheduling else 1,
        )
        self._graphs = None
        if settings.cuda_graphs and loaded.capturable:
            self._graphs = DecodeGraphs(
                self._decode,
                max_num_seqs=config.max_num_seqs,
                max_model_len=info.max_model_len,
                block_size=loaded.cache.block_size,
                device=device,
                recorder=recorder,
            )

    def _decode(self, inputs: StepInputs) -> Tensor:
        return self._model.logits(self._model.forward(inputs, self._cache))

    @torch.inference_mode()
    def warm_up(self) -> None:
        if self._graphs is not None:
            self._graphs.warm_up()  # largest first: the others fit into its memory
        super().warm_up()

    def _compute(self, rows: Sequence[Row], sampled: Sequence[int]) -> tuple[Tensor | None, Tensor | None, Callable[[], float]]:
        elapsed = _stopwatch(self._cache.data.device)
        graphs, into = self._graphs, None
        if graphs is not None and rows[-1].n == 1:  # the longest come last; a row with drafts has two tokens or more
            into = graphs.inputs_for(len(rows), max(row.start + 1 for row in rows))
        inputs = self._device_steps.inputs(rows, sampled, into)
        logits: Tensor | None
        if graphs is not None and into is not None:
            logits, hidden = graphs.run(inputs)[: len(sampled)], None
        else:
            logits, hidden = self._forward(inputs)
        return logits, hidden, elapsed()

    def sample(self, ticket: Ticket, mask: GrammarMask | None) -> None:
        super().sample(ticket, mask)
        assert isinstance(ticket, TorchTicket)
        if ticket.samples:
            parts = [samples.token_ids for samples in ticket.samples]
            self._device_steps.remember(parts[0] if len(parts) == 1 else torch.cat(parts))


def _stopwatch(device: torch.device) -> Callable[[], Callable[[], float]]:
    """Start it; the first call stops it, and what that returns waits for the device and gives the milliseconds between."""
    if device.type != "cuda":
        began = time.perf_counter()

        def stop() -> Callable[[], float]:
            milliseconds = (time.perf_counter() - began) * 1e3
            return lambda: milliseconds

        return stop
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # of torch
    first.record()

    def stop_event() -> Callable[[], float]:
        last.record()

        def elapsed() -> float:
            last.synchronize()
            return float(first.elapsed_time(last))

        return elapsed

    return stop_event
