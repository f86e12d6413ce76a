"""How long OpenMP's threads wait awake for the next piece of work."""

from __future__ import annotations

import os

# GNU OpenMP spins 300,000 rounds, some 15 ms, before a thread sleeps. A step has hundreds of parallel pieces, and whenever the
# system gives a core to somebody else, the others spin away the time that this one needs to go on. Measured on two cores,
# SmolLM2-135M, one sequence, ms a step: alone 17.5 by default, 17.9 with 10,000 rounds, 30 with 1,000; beside another
# process that spins too (a second model, say) 1,055, 76 and 35.
_SPIN_ROUNDS = "10000"


def limit_spinning() -> None:
    """Make threads sleep earlier. Works before torch is imported first, and leaves alone what the environment says."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_ROUNDS)
