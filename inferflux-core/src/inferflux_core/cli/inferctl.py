"""inferctl: talk to an InferFlux server, or any other with an OpenAI-compatible API, from the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import closing
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any

import click

from inferflux_core.cli.api_client import ApiClient, StreamPart, Usage
from inferflux_core.cli.api_errors import ApiError, printable
from inferflux_core.cli.lazy_group import LazyCommand, LazyGroup
from inferflux_core.cli.server_options import GlobalOptions, Server, global_options, print_json, server_command
from inferflux_core.cli.table import print_table

if TYPE_CHECKING:
    from inferflux_core.cli.server_status import ServerStatus

_LATER = {
    "login": LazyCommand("inferflux_core.cli.login", "login", "Log in to a server through its authorization server."),
    "logout": LazyCommand("inferflux_core.cli.login", "logout", "Forget a login, and have its tokens revoked."),
    "admin": LazyCommand("inferflux_core.cli.admin.group", "admin", "Administer a server: keys, policy, limits, models."),
    "audit": LazyCommand("inferflux_core.cli.audit", "audit", "Verify or read the audit log on this machine."),
}


@click.group(
    cls=LazyGroup,
    lazy=_LATER,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Shell completion: eval "$(_INFERCTL_COMPLETE=bash_source inferctl)" (or zsh_source, fish_source).',
)
@click.version_option(package_name="inferflux-core", prog_name="inferctl")
@global_options
@click.pass_context
def inferctl(context: click.Context, /, options: GlobalOptions) -> None:
    """Talk to an InferFlux server, or any server with an OpenAI-compatible API.

    Exit codes: 0 done, 1 the server or the request failed, 2 wrong usage, 130 stopped with Ctrl-C.
    """
    context.obj = options


def main() -> None:
    """The console entry point."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model's text must not end the program on an ASCII terminal
    inferctl()


def generation_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of a request that chat and completion share."""
    for option in (
        click.option("--no-stream", is_flag=True, help="Ask for the whole answer at once; with --json one document."),
        click.option("--seed", type=click.INT, help="The same seed gives the same answer again."),
        click.option("--temperature", type=click.FloatRange(min=0), help="0 always takes the likeliest token."),
        click.option("--max-tokens", type=click.IntRange(min=1), help="Most tokens of the answer."),
        click.option("--model", "-m", help="Model id or alias. Default: the server's default model, else its first."),
    ):
        function = option(function)
    return function


@inferctl.command()
@click.argument("message", required=False)
@click.option("--system", help="System text: who the model is and how it answers.")
@generation_options
@server_command
def chat(
    server: Server,
    /,
    message: str | None,
    system: str | None,
    model: str | None,
    no_stream: bool,
    **settings: Any,
) -> None:
    """Chat with a model.

    With MESSAGE (- for stdin), or with text piped in, the answer is printed and the program ends. Otherwise an
    interactive chat begins; /help lists its commands. What a reasoning model thinks first is shown in the interactive chat
    and by --json without --no-stream, and is no part of the answer; --max-tokens counts it.

    --json prints one object a line: {"type":"text","text"} and {"type":"reasoning","text"} as they come, then
    {"type":"done","model","finish_reason","usage"}; {"type":"error","error"} when it fails.
    """
    if message is None and sys.stdin.isatty():
        if server.as_json or no_stream:
            raise click.UsageError("--json and --no-stream need a MESSAGE, or text piped in")
        _interactive_chat(server, model, _utf8(system), settings)
        return
    text = _input_text(message, "MESSAGE")
    system = _utf8(system)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": text})
    with server.connect() as client:
        chosen = model or default_model(client)
        if no_stream:
            part = client.answer("/v1/chat/completions", {"model": chosen, "messages": messages}, **settings)
            _print_answer(server, chosen, part)
        else:
            _print_stream(server, chosen, client.chat(chosen, messages, **settings))


@inferctl.command()
@click.argument("prompt", required=False)
@click.option("--stop", multiple=True, help="Text that ends the answer. May be given several times.")
@click.option("--echo", is_flag=True, help="Print the prompt in front of the answer.")
@generation_options
@server_command
def completion(
    server: Server,
    /,
    prompt: str | None,
    stop: tuple[str, ...],
    echo: bool,
    model: str | None,
    no_stream: bool,
    **settings: Any,
) -> None:
    """Continue a raw PROMPT (- or nothing for stdin), without a chat template.

    --json prints what `chat --json` does; with --echo a {"type":"prompt","text"} stands in front.
    """
    text = _input_text(prompt, "PROMPT", strip=False)
    settings["stop"] = [_utf8(word) for word in stop] or None
    with server.connect() as client:
        chosen = model or default_model(client)
        if no_stream:
            part = client.answer("/v1/completions", {"model": chosen, "prompt": text}, **settings)
            _print_answer(server, chosen, part, prompt=text if echo else None)
        else:
            _print_stream(server, chosen, client.completion(chosen, text, **settings), prompt=text if echo else None)


@inferctl.command()
@click.argument("model_id", metavar="[ID]", required=False)
@server_command
def models(server: Server, /, model_id: str | None) -> None:
    """List the models of the server, or show the one with this id or alias.

    --json prints an array of {"id","aliases","max_model_len","backend","state","default"}, or that object for ID.
    """
    with server.connect() as client:
        cards = client.models()
    if model_id is not None:
        known = ", ".join(card.id for card in cards) or "none"
        cards = [card for card in cards if card.answers_to(model_id)][:1]
        if not cards:
            raise ApiError(f"the server has no model {model_id!r}. It has: {known}", status=404, code="model_not_found")
    if server.as_json:
        print_json(cards[0] if model_id is not None else cards)
        return
    print_table(
        ("model", "aliases", "context", "backend", "state", ""),
        [(c.id, ", ".join(c.aliases), c.max_model_len, c.backend, c.state, "default" * c.default) for c in cards],
    )


@inferctl.command()
@click.option("--speculation", "by_position", is_flag=True, help="Show too how drafts fare by the position in the draft.")
@server_command
def status(server: Server, /, by_position: bool) -> None:
    """Show whether the server is ready, and what its models are doing. Exit code 0 when ready, else 1.

    For models that speculate: how many tokens were drafted and accepted since the engine started, which share of them that is
    (`share`), and how many were accepted of one draft on average (`a draft`).

    --json prints {"url","reachable","ready","status","version","models":[{"name","state","requests_running",
    "requests_waiting","kv_cache_usage_ratio","restarts","speculation"}],"notes":[...]}; speculation is null or {"method",
    "drafts","draft_tokens","accepted_tokens","acceptance_ratio","mean_accepted_tokens","draft_tokens_per_position":[...],
    "accepted_tokens_per_position":[...]}.
    """
    from inferflux_core.cli.server_status import ask_status

    with server.connect() as client:
        found = ask_status(client)
    if server.as_json:
        print_json(found)
    else:
        state = "ready" if found.ready else "not ready" if found.reachable else "unreachable"
        version = f"  version {found.version}" if found.version else ""
        click.echo(f"{found.url}  {state}{printable(version)}")
        for note in found.notes:
            click.echo(f"  {note}")
        if found.models:
            print_table(
                ("model", "state", "running", "waiting", "KV cache", "restarts"),
                [
                    (m.name, m.state, m.requests_running, m.requests_waiting, m.kv_cache_percent(), m.restarts)
                    for m in found.models
                ],
            )
        _print_speculation(found, by_position)
    if not found.ready:
        sys.exit(1)


def _print_speculation(found: ServerStatus, by_position: bool) -> None:
    drafting = [(model, model.speculation) for model in found.models if model.speculation is not None]
    if drafting:
        print_table(
            ("model", "drafts by", "drafted", "accepted", "share", "a draft"),
            [
                (m.name, s.method, s.draft_tokens, s.accepted_tokens, s.acceptance_percent(), s.mean_accepted())
                for m, s in drafting
            ],
        )
    elif by_position and found.models:
        click.echo("  no model speculates")
    for model, speculation in drafting if by_position else ():
        rows = speculation.by_position()
        if rows:
            print_table(("position", "drafted", "accepted", "share"), rows, title=f"  drafts of {printable(model.name)}")
        else:
            click.echo(f"  {printable(model.name)} has drafted nothing yet")


def default_model(client: ApiClient) -> str:
    """The model to use when the user names none.

    Raises:
        ApiError: the server has no model, or does not list them.
    """
    cards = client.models()
    if not cards:
        raise ApiError(f"{client.url} serves no model that this key may use")
    return next((card.id for card in cards if card.default), cards[0].id)


def _interactive_chat(server: Server, model: str | None, system: str | None, settings: dict[str, Any]) -> None:
    # The line editor takes a quarter of a second to import; only this command pays for it.
    from inferflux_core.cli.chat import COMMANDS, Chat
    from inferflux_core.cli.chat_prompt import history_path, make_prompt, open_history
    from inferflux_core.cli.conversation import ChatSettings, Conversation

    with server.connect() as client:
        chosen = model or default_model(client)
        conversation = Conversation(model=chosen, system=system or None, settings=ChatSettings(**settings))
        prompt = make_prompt(open_history(history_path()), COMMANDS)
        Chat(client, conversation, prompt.prompt).run()


def _print_stream(server: Server, model: str, parts: Generator[StreamPart], prompt: str | None = None) -> None:
    write = _text_writer()
    if prompt is not None:
        if server.as_json:
            print_json({"type": "prompt", "text": prompt})
        else:
            write(prompt)
    last = ""
    usage: Usage | None = None
    reason: str | None = None
    try:
        with closing(parts):
            for part in parts:
                usage = part.usage or usage
                reason = part.finish_reason or reason
                if server.as_json:
                    for kind, text in (("reasoning", part.reasoning), ("text", part.text)):
                        if text:
                            print_json({"type": kind, "text": text})
                elif part.text:
                    last = part.text  # before it is shown: Ctrl-C may come at any moment
                    write(part.text)
    finally:
        if last and not last.endswith("\n") and not server.as_json:
            write("\n")  # the shell's prompt or an error message begins a line of its own
    if server.as_json:
        print_json({"type": "done", "model": model, "finish_reason": reason, "usage": usage})


def _print_answer(server: Server, model: str, part: StreamPart, prompt: str | None = None) -> None:
    if server.as_json:
        document = {"model": model, "text": part.text, "finish_reason": part.finish_reason, "usage": part.usage}
        print_json(document if prompt is None else {"prompt": prompt} | document)
        return
    text = (prompt or "") + part.text
    _text_writer()(text if text.endswith("\n") else text + "\n")


def _text_writer() -> Callable[[str], None]:
    """Writes text at once: to a terminal without control characters, to a file or pipe as it is."""
    cleaned = sys.stdout.isatty()

    def write(text: str) -> None:
        sys.stdout.write(printable(text) if cleaned else text)
        sys.stdout.flush()

    return write


def _input_text(argument: str | None, name: str, *, strip: bool = True) -> str:
    """The text of an argument, or of stdin where the argument is missing or `-`."""
    if argument is not None and argument != "-":
        text = _utf8(argument) or ""
    else:
        if argument is None and sys.stdin.isatty():
            raise click.UsageError(f"give a {name}, or - and pipe the text in")
        try:
            text = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise click.UsageError(f"stdin is not UTF-8 text: byte {error.start} is not valid") from error
    if not text.strip():
        raise click.UsageError(f"the {name} is empty")
    return text.strip() if strip else text


def _utf8(argument: str | None) -> str | None:
    """The argument, if it can be sent: the shell passes bytes that are not UTF-8 as lone surrogates."""
    if argument is not None:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise click.UsageError("an argument is not UTF-8 text") from error
    return argument
