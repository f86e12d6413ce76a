"""How long OpenMP's threads wait awake for the next piece of work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

# GNU OpenMP spins 300,000 rounds, some 15 ms, before a thread sleeps. A step has hundreds of parallel pieces, and whenever the
# system gives a core to somebody else, the others spin away the time that this one needs to go on. Measured once on two cores
# that others used as well, SmolLM2-135M Q4_1, one sequence, ms a step. Least of 12: 17 by default, with 10,000 and with 1,000
# rounds, 32 with 100. Median of 5 s beside a process that keeps a core busy: 2,656 (two steps), 113 and 31; once more with
# 1,000 rounds: 123. So the default is far off, while between 1,000 and 10,000 the figures do not tell for sure.
_SPIN_ROUNDS = "1000"


@contextmanager
def limited_spinning() -> Iterator[None]:
    """While llama.cpp is imported first: its threads will sleep earlier. Leaves alone what the environment says.

    The variable is removed again: torch in the same process, and processes started by this one, wait as they please.
    """
    if "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ:
        yield
        return
    os.environ["GOMP_SPINCOUNT"] = _SPIN_ROUNDS
    try:
        yield
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)
