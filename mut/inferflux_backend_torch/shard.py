"""How several ranks share one model (Megatron-LM, arXiv 1909.08053). Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from inferflux_backend_torch.config import DecoderConfig
from inferflux_core.errors import ModelFileError


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a model that one of several ranks holds."""

    rank: int = 0
    size: int = 1

    def cut(self, total: int) -> slice:
        """This rank's share of so many rows; shares differ by one row at most."""
        return slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)

    def vocabulary(self, vocab_size: int) -> slice:
        """This rank's rows of the vocabulary, equally many on all ranks: those past its end are padding."""
        rows = -(-vocab_size // self.size)
        return slice(self.rank * rows, (self.rank + 1) * rows)

    def heads(self, config: DecoderConfig) -> tuple[slice, slice]:
        """This rank's query heads and KV heads. Where there are fewer KV heads than ranks, several ranks hold the same one."""
        group = config.num_heads // config.num_kv_heads
        if config.num_kv_heads >= self.size:
            kv = self.cut(config.num_kv_heads)
            return slice(kv.start * group, kv.stop * group), kv
        first = self.rank * config.num_kv_heads // self.size
        return self.cut(config.num_heads), slice(first, first + 1)

    def check(self, config: DecoderConfig) -> None:
        """Refuse a number of ranks that the model can't be shared by.

        Raises:
            ModelFileError: names the numbers that it can be.
        """
        fitting = [size for size in range(1, config.num_heads + 1) if _fits(config, size)]
        if self.size not in fitting:
            raise ModelFileError(
                f"a model with {config.num_heads} attention heads and {config.num_kv_heads} KV heads can't be shared by "
                f"{self.size} processes; set `tensor_parallel_size` to one of {', '.join(map(str, fitting))}"
            )


WHOLE = Shard()
"""Of a model that is not shared."""


def _fits(config: DecoderConfig, size: int) -> bool:
    """Whether every rank gets whole heads, and the query heads of a rank have their KV heads with them."""
    sizes = [config.vocab_size, config.intermediate_size]
    if config.moe is not None:
        sizes += [config.moe.intermediate_size, config.moe.shared_intermediate_size or size]
    heads = config.num_kv_heads >= size or (config.num_heads % size == 0 and size % config.num_kv_heads == 0)
    return heads and min(sizes) >= size
