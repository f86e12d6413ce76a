"""What all tests run with: threads that don't get in the way of a second pytest process on the same cores."""

from __future__ import annotations

import os

# Read by OpenMP when torch or llama.cpp is loaded, here and in the servers that tests start. `make test` runs two processes on
# what may be two cores, and a thread that spins there, waiting for another one, takes the core that the other one needs.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
