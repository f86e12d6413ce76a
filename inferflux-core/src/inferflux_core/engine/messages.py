"""Messages between server and engine process: msgspec structs as msgpack over ZeroMQ, one a step; never pickle."""

from __future__ import annotations

import msgspec

from inferflux_core.engine.types import EngineOutput, EngineRequest, EngineStats
from inferflux_core.interfaces import ModelInfo

# --- server to engine -------------------------------------------------------------------------------------------------


class Submit(msgspec.Struct, frozen=True, tag="submit", array_like=True):
    """Queue these requests."""

    requests: list[EngineRequest]


class Abort(msgspec.Struct, frozen=True, tag="abort", array_like=True):
    """End these requests within one step."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown", array_like=True):
    """Close the model and exit."""


ToEngine = Submit | Abort | Shutdown

# --- engine to server -------------------------------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """The model is loaded and warm."""

    model_info: ModelInfo
    load_seconds: float


class Failed(msgspec.Struct, frozen=True, tag="failed", array_like=True):
    """The model cannot be loaded; the process exits. A restart would fail in the same way."""

    message: str


class StepDone(msgspec.Struct, frozen=True, tag="step", array_like=True):
    """What one step brought.

    Attributes:
        started: requests that left the queue with this step.
    """

    outputs: list[EngineOutput]
    started: list[str]
    stats: EngineStats


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", array_like=True):
    """The process lives, whatever its engine thread does.

    Attributes:
        step_seconds: how long the current step has been running; 0 when idle.
    """

    step_seconds: float


ToServer = Ready | Failed | StepDone | Heartbeat

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_server = msgspec.msgpack.Decoder(ToServer).decode
