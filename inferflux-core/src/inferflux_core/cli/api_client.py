"""A client for the OpenAI-compatible HTTP API of any server: models, chat, completions, and plain GETs.

httpx is imported when the first client is made, so that a program which only prints its help does not pay for it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import msgspec

from inferflux_core.cli.api_errors import (
    ApiError,
    connection_cause,
    error_from_event,
    error_from_response,
    printable,
    unreachable,
)
from inferflux_core.cli.endpoint import Endpoint
from inferflux_core.cli.sse import DONE, EventStream, EventStreamError

if TYPE_CHECKING:
    import httpx

CONNECT_TIMEOUT_S = 5.0
"""A server that does not accept a connection within this time is not going to."""


class Usage(msgspec.Struct, kw_only=True):
    """Tokens of one request. `cached_tokens` is None when the server does not say."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None


class StreamPart(msgspec.Struct, kw_only=True):
    """What one event of a stream brought: some text, some reasoning text, the reason for the end, or the usage."""

    text: str = ""
    reasoning: str = ""
    finish_reason: str | None = None
    usage: Usage | None = None


class ModelCard(msgspec.Struct, kw_only=True):
    """One model of `GET /v1/models`, read from the extension keys of InferFlux, vLLM or llama-server."""

    id: str
    aliases: list[str] = msgspec.field(default_factory=list)
    max_model_len: int | None = None  # tokens of prompt and answer together
    backend: str | None = None
    state: str | None = None
    default: bool = False

    def answers_to(self, name: str) -> bool:
        """Whether `name` is this model's id or one of its aliases."""
        return name == self.id or name in self.aliases


class ApiClient:
    """Requests to one server over kept-alive connections. Use it as a context manager, from one thread.

    Every method raises ApiError and nothing else for whatever the server or the network does.
    """

    def __init__(self, endpoint: Endpoint, *, timeout_s: float = 300.0) -> None:
        """`timeout_s` is the longest silence within an answer, in seconds, not the length of the answer."""
        import httpx

        self.url = endpoint.url
        self._http = httpx.Client(
            headers=endpoint.headers(),
            timeout=httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s)),
            trust_env=not endpoint.is_loopback,
        )
        self._timeout_s = timeout_s

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._http.close()

    def models(self) -> list[ModelCard]:
        """The models that this key may see, in the server's order."""
        document = self._document(self.get("/v1/models"), "/v1/models")
        entries = document.get("data")
        if not isinstance(entries, list):
            raise ApiError(f"{self.url}/v1/models has no list of models. Is it an OpenAI-compatible server?")
        return [_model_card(entry) for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]

    def request(
        self, method: str, path: str, content: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> httpx.Response:
        """The answer to any request, whatever its status is. Raises ApiError if there is none."""
        with self._mapped_errors():
            return self._http.request(method, self.url + path, content=content, headers=headers)

    def get(self, path: str) -> tuple[int, bytes]:
        """The status and body of a GET, whatever the status is."""
        with self._mapped_errors():
            answer = self._http.get(self.url + path)
            return answer.status_code, answer.content

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **settings: Any) -> Generator[StreamPart]:
        """Streams the answer to a conversation. Closing the iterator closes the connection, and so aborts the request.

        `settings` are the API's own fields (`max_tokens`, `temperature`, `seed`, `top_p`, `stop`); None leaves one out.
        """
        return self._stream("/v1/chat/completions", {"model": model, "messages": list(messages)}, settings)

    def completion(self, model: str, prompt: str, **settings: Any) -> Generator[StreamPart]:
        """Streams the continuation of a raw prompt; `settings` and closing are as in `chat`."""
        return self._stream("/v1/completions", {"model": model, "prompt": prompt}, settings)

    def answer(self, path: str, body: Mapping[str, Any], **settings: Any) -> StreamPart:
        """The whole answer of one request without streaming, as one part."""
        request = dict(body) | _given(settings) | {"stream": False}
        with self._mapped_errors():
            response = self._http.post(self.url + path, content=_encoded(request), headers=_JSON)
            if response.status_code != 200:
                raise self._error(path, response)
            document = self._document((200, response.content), path)
        part = _part(document)
        if part is None:
            raise ApiError(f"{self.url}{path} answered without choices. Is it an OpenAI-compatible server?")
        return part

    def _stream(self, path: str, body: dict[str, Any], settings: Mapping[str, Any]) -> Generator[StreamPart]:
        request = body | _given(settings) | {"stream": True, "stream_options": {"include_usage": True}}
        with (
            self._mapped_errors(),
            self._http.stream("POST", self.url + path, content=_encoded(request), headers=_JSON) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise self._error(path, response)
            kind = response.headers.get("content-type", "")
            if not kind.startswith("text/event-stream"):
                raise ApiError(f"{self.url}{path} answered with {kind or 'no content type'}, not with an event stream")
            events = EventStream()
            ended = False
            for received in response.iter_bytes():
                for payload in events.feed(received):
                    if payload == DONE:
                        return
                    part = _part(self._document((200, payload), path))
                    if part is not None:
                        ended = ended or part.finish_reason is not None
                        yield part
            if not ended:
                raise ApiError(f"the connection to {self.url} closed in the middle of the answer")

    def _document(self, answer: tuple[int, bytes], path: str) -> dict[str, Any]:
        status, body = answer
        if status != 200:
            raise error_from_response(self.url, path, status, body)
        try:
            document = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            document = None
        if not isinstance(document, dict):
            raise ApiError(f"{self.url}{path} answered with something that is not a JSON object")
        return document

    def _error(self, path: str, response: httpx.Response) -> ApiError:
        retry_after = response.headers.get("retry-after")
        return error_from_response(self.url, path, response.status_code, response.content, retry_after)

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except EventStreamError as error:
            raise ApiError(str(error)) from error
        except httpx.ConnectTimeout as error:
            raise unreachable(self.url, "no answer to the connection") from error
        except httpx.ConnectError as error:
            raise unreachable(self.url, connection_cause(error)) from error
        except httpx.TimeoutException as error:
            raise ApiError(f"{self.url} sent nothing for {self._timeout_s:g} s. Allow more with --timeout") from error
        except httpx.RequestError as error:
            raise ApiError(f"the connection to {self.url} broke: {printable(str(error)).rstrip('.')}") from error


_JSON = {"content-type": "application/json"}


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def _encoded(request: Mapping[str, Any]) -> bytes:
    return msgspec.json.encode(request)


def _part(document: Mapping[str, Any]) -> StreamPart | None:
    """What a stream event or whole answer brings; None when it is nothing that we know. Raises ApiError for `error`."""
    if document.get("error") or document.get("object") == "error":
        raise error_from_event(document.get("error") or document)
    part = StreamPart(usage=_usage(document.get("usage")))
    choices = document.get("choices")
    if not isinstance(choices, list):
        return None
    for choice in choices[:1]:
        if not isinstance(choice, dict):
            return None
        delta = choice.get("delta") or choice.get("message") or {}
        if not isinstance(delta, dict):
            return None
        part.text = _string(delta.get("content")) or _string(choice.get("text"))
        part.reasoning = _string(delta.get("reasoning_content")) or _string(delta.get("reasoning"))
        part.finish_reason = _string(choice.get("finish_reason")) or None
    return part


def _usage(value: Any) -> Usage | None:
    if not isinstance(value, dict):
        return None
    details = value.get("prompt_tokens_details")
    return Usage(
        prompt_tokens=_count(value.get("prompt_tokens")) or 0,
        completion_tokens=_count(value.get("completion_tokens")) or 0,
        cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
    )


def _model_card(entry: Mapping[str, Any]) -> ModelCard:
    ours, meta = (value if isinstance(value, dict) else {} for value in (entry.get("inferflux"), entry.get("meta")))
    aliases = ours.get("aliases") or entry.get("aliases") or []
    lengths = (ours.get("max_model_len"), entry.get("max_model_len"), meta.get("n_ctx"), meta.get("n_ctx_train"))
    name = str(entry["id"])
    return ModelCard(
        id=name,
        # llama-server repeats the id among the aliases
        aliases=[a for a in aliases if isinstance(a, str) and a != name] if isinstance(aliases, list) else [],
        max_model_len=next((length for length in map(_count, lengths) if length is not None), None),
        backend=_string(ours.get("backend")) or _string(entry.get("owned_by")) or None,
        state=_string(ours.get("state")) or None,
        default=ours.get("default") is True,
    )


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
