"""The certified OpenID provider of the tests, to try `inferctl login` with: any name and password is somebody.

    .venv/bin/python tools/try_oidc_provider.py

Needs Node 20. Prints its address and runs until Ctrl-C; it forgets everything when it ends.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from oidc.real_provider import real_provider

if __name__ == "__main__":
    with real_provider() as provider, contextlib.suppress(KeyboardInterrupt):
        sys.stdout.write(f"{provider.url}\n")
        sys.stdout.flush()
        threading.Event().wait()
