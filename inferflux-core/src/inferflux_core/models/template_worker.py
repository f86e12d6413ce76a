"""The process that renders one chat template. Run as a script by `template_renderer`; imports only Jinja and the standard
library, so that it starts in some 50 ms and holds nothing worth stealing.

A chat template is a program by a stranger. Jinja's sandbox keeps it from Python's objects but not from looping or
allocating without end, and no list of forbidden constructs is ever complete (nested loops over ranges, doubling strings,
recursive macros, `center(300000000)`, constants folded while compiling, ...). So the operating system sets the limits: CPU
seconds by a timer that kills, memory by RLIMIT_AS. The size of the output is counted here, piece by piece.

Frames on standard input and output: a 64-bit little-endian length, then as many bytes. First frame in: `{"source",
"seconds"}`; every later one: `{"variables", "seconds", "characters"}`. Frames out: a status byte, then UTF-8 text:

    o  output                     r  the template refused the messages; its text
    e  it failed; the class       l  a limit was hit; which          s  syntax error; where and what
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

LENGTH = struct.Struct("<Q")
OK, REFUSED, FAILED, LIMIT, SYNTAX = b"o", b"r", b"e", b"l", b"s"

_MEMORY = 256 << 20  # bytes a render may allocate besides its input
_MEMORY_PER_BYTE = 64  # and this many for each byte of input: parsed, four times as output, four bytes a character
_MAX_PRODUCT = 1 << 20  # most items of a repeated string or list
_MAX_POWER_BITS = 4096


class Refused(Exception):
    """The template called `raise_exception`."""


class LimitHit(Exception):
    """The template asks for more than it may have."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant wrote, for training. Rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012  # Jinja declares it as a plain set

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Refuses the cheapest ways to huge values at once instead of letting the process die of them."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int) and len(value) * times > _MAX_PRODUCT:
                    raise LimitHit("repetition")
        elif isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > _MAX_POWER_BITS:
            raise LimitHit("power")
        return super().call_binop(context, operator, left, right)


def _raise_exception(message: object) -> None:
    raise Refused(str(message))


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)  # local time without zone, as transformers does it


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Hugging Face's: Jinja's own escapes HTML, which models have never seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.Environment:
    """What transformers gives chat templates."""
    made = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = _strftime_now
    del made.globals["lipsum"]
    return made


def render(template: jinja2.Template, variables: Mapping[str, Any], characters: int) -> str:
    """Raises LimitHit once the output has more than `characters`."""
    pieces = []
    for piece in template.root_render_func(template.new_context(dict(variables))):
        characters -= len(piece)
        if characters < 0:
            raise LimitHit("output")
        pieces.append(piece)
    return "".join(pieces)


@contextlib.contextmanager
def _limits(seconds: float, input_bytes: int, baseline: int | None) -> Iterator[None]:
    """CPU time and memory. Past the first, SIGPROF ends this process; past the second, allocations fail."""
    if baseline is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (baseline + _MEMORY + _MEMORY_PER_BYTE * input_bytes, hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _baseline() -> int | None:
    """Address space in use, in bytes; None where the system does not tell, and memory is bounded by the time alone."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _receive(stream: BinaryIO) -> bytes | None:
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    return stream.read(LENGTH.unpack(head)[0])


def _send(stream: BinaryIO, status: bytes, text: str) -> None:
    body = status + text.encode("utf-8", "surrogatepass")
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def _decode(frame: bytes) -> Any:
    return json.loads(frame.decode("utf-8", "surrogatepass"))


def _compile(frame: bytes, baseline: int | None) -> tuple[jinja2.Template | None, bytes, str]:
    try:
        request = _decode(frame)
        with _limits(request["seconds"], len(frame), baseline):
            return environment().from_string(request["source"]), OK, ""
    except jinja2.TemplateSyntaxError as error:
        return None, SYNTAX, f"line {error.lineno}: {error.message}"
    except (SyntaxError, RecursionError, MemoryError, ValueError, jinja2.TemplateError, LimitHit) as error:
        return None, SYNTAX, f"it cannot be compiled ({type(error).__name__})"


def _answer(template: jinja2.Template, frame: bytes, baseline: int | None) -> tuple[bytes, str]:
    try:
        request = _decode(frame)
        with _limits(request["seconds"], len(frame), baseline):
            return OK, render(template, request["variables"], request["characters"])
    except Refused as refusal:
        return REFUSED, str(refusal)
    except LimitHit as limit:
        return LIMIT, str(limit)
    except MemoryError:
        return LIMIT, "memory"
    except RecursionError:
        return LIMIT, "recursion"
    except Exception as error:  # whatever a stranger's program may raise
        return FAILED, type(error).__name__


def main() -> None:
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    baseline = _baseline()
    frame = _receive(stdin)
    if frame is None:
        return
    template, status, text = _compile(frame, baseline)
    _send(stdout, status, text)
    if template is None:
        return
    while (frame := _receive(stdin)) is not None:
        _send(stdout, *_answer(template, frame, baseline))


if __name__ == "__main__":
    main()
