"""The CPU kernels in C (native/module.c). Tensors are addresses, 0 for none; nothing is checked."""

MAX_HEAD_DIM: int
MAX_GROUP: int
MAX_GROUP_DIM: int

def rms_norm(
    bf16: int, x: int, x_stride: int, residual: int, out: int, weight: int, rows: int, width: int, eps: float, /
) -> None: ...
def act_mul(bf16: int, gate_up: int, out: int, rows: int, width: int, activation: int, /) -> None: ...
def rope_and_cache(
    bf16: int,
    qkv: int,
    keys: int,
    values: int,
    positions: int,
    slots: int,
    rope: int,
    q_norm: int,
    k_norm: int,
    rows: int,
    heads: int,
    kv_heads: int,
    dim: int,
    rotary: int,
    eps: float,
    /,
) -> None: ...
def paged_attention(
    bf16: int,
    qkv: int,
    out: int,
    keys: int,
    values: int,
    tables: int,
    table_width: int,
    rows: int,
    seqs: int,
    ends: int,
    count: int,
    heads: int,
    kv_heads: int,
    dim: int,
    block_size: int,
    scale: float,
    window: int,
    softcap: float,
    /,
) -> None: ...
def contenders(logits: int, vocab: int, seed: int, position: int, winners: int, most: int, /) -> int:
    """Tokens that may win a draw go to `winners`, int64; returns how many there are, which may be more than `most`.

    Args:
        logits: float32 [vocab], finite or -inf.
        seed: as a signed number of 64 bits.
    """

def set_level(level: int, /) -> int:
    """Use at most this instruction set: 0 the baseline, 1 AVX2, 2 AVX-512. Returns what is in use."""
