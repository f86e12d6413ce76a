"""A process that does one kind of work for strangers' input: it can be killed, and holds none of the server's secrets.

Frames both ways: a 64-bit little-endian length, then as many bytes. The first byte of an answer says what it is.
"""

from __future__ import annotations

import os
import select
import signal
import struct
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Final

_LENGTH: Final = struct.Struct("<Q")

# what a worker sees of the environment: enough to find its libraries and the time zone, and none of the server's secrets
_ENVIRONMENT: Final = ("PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")


class WorkerDiedError(Exception):
    """The process ended instead of answering.

    Attributes:
        out_of_time: it used up its CPU seconds, or did not answer for a multiple of them.
    """

    def __init__(self, *, out_of_time: bool) -> None:
        super().__init__("out of time" if out_of_time else "died")
        self.out_of_time = out_of_time


class WorkerProcess:
    """One running process and the two pipes to it.

    Args:
        script: its file. It ends itself when its standard input ends, and by SIGPROF when its CPU time is over.

    Raises:
        OSError: it cannot be started.
    """

    def __init__(self, script: Path) -> None:
        self._process = subprocess.Popen(  # noqa: S603  # our own interpreter and our own file
            [sys.executable, "-P", str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
            start_new_session=True,  # Ctrl-C in the server's terminal must not end work for draining requests
        )
        self.kill = weakref.finalize(self, _kill, self._process)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in = self._process.stdin.fileno()
        self._out = self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)

    def interrupt(self) -> None:
        """End the process from another thread, while one may wait for its answer. `kill` has to follow."""
        self._process.kill()

    def exchange(self, frame: bytes, seconds: float, most: int) -> tuple[bytes, str]:
        """Send one frame and wait for the answer.

        Args:
            seconds: most time to wait, by the clock.
            most: bytes of the longest answer to accept.

        Raises:
            WorkerDiedError: no answer; the process is gone.
        """
        deadline = time.monotonic() + seconds
        try:
            view = memoryview(frame)
            while view:
                try:
                    view = view[os.write(self._in, view) :]
                except BlockingIOError:
                    self._wait(self._in, select.POLLOUT, deadline)
            (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
            if not 1 <= length <= most:
                raise EOFError
            body = self._read(length, deadline)
        except TimeoutError:
            self.kill()
            raise WorkerDiedError(out_of_time=True) from None
        except (EOFError, BrokenPipeError):
            self.kill()
            raise WorkerDiedError(out_of_time=self._process.returncode == -signal.SIGPROF) from None
        return body[:1], body[1:].decode("utf-8", "surrogatepass")

    def _read(self, length: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < length:
            try:
                piece = os.read(self._out, length - len(data))
            except BlockingIOError:
                self._wait(self._out, select.POLLIN, deadline)
                continue
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    @staticmethod
    def _wait(fd: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise TimeoutError


def _kill(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    process.stdout.close()
    if process.poll() is None:
        process.kill()
    process.wait()


def frame(text: str) -> bytes:
    """What `exchange` sends."""
    body = text.encode("utf-8", "surrogatepass")
    return _LENGTH.pack(len(body)) + body
