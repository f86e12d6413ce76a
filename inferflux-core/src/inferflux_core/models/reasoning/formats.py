"""How families of models mark their thoughts, and how to tell by the chat template which family a model is of."""

from __future__ import annotations

from dataclasses import dataclass

from inferflux_core.errors import ConfigError

WHITESPACE = " \t\r\n"
"""What may stand between a tag and the text next to it, and belongs to neither."""


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """A family of tags. An answer is `begin`, thoughts, `end`, content.

    Attributes:
        name: for the setting `reasoning_parser`.
        begin, end: the tags as text. In some vocabularies they are control tokens, in others ordinary text.
        markers: texts of the control tokens in these tags, where the vocabulary has such tokens.
        closing: what a model is made to write when its budget of thoughts is used up. It ends with `end`: whatever follows
            belongs to the answer, and a grammar may forbid it.
        signs: texts that a chat template of the family contains, all of them.
        wrapper: tags that the family puts around the content after thoughts, each possibly empty. They are no content.
    """

    name: str
    begin: str
    end: str
    markers: tuple[str, ...]
    closing: str
    signs: tuple[str, ...]
    wrapper: tuple[str, str] = ("", "")


def _tags(name: str, begin: str, end: str, *signs: str, wrapper: tuple[str, str] = ("", "")) -> ReasoningFormat:
    """A family whose tags stand on lines of their own, and are one token each where they are control tokens."""
    return ReasoningFormat(name, begin, end, (begin, end), "\n" + end, signs or (end,), wrapper)


# The first whose signs a template contains is the template's, so special families stand before the common one.
_FAMILIES = (
    _tags("seed_oss", "<seed:think>", "</seed:think>"),
    _tags("hy_v3", "<think:opensource>", "</think:opensource>", "</think{}>", ":opensource"),
    _tags("minimax_m3", "<mm:think>", "</mm:think>"),
    _tags("kimi_vl", "◁think▷", "◁/think▷"),
    _tags("mistral", "[THINK]", "[/THINK]"),
    _tags("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
    ReasoningFormat(
        name="gemma4",
        begin="<|channel>thought",
        end="<channel|>",
        markers=("<|channel>", "<channel|>"),
        closing="\n<channel|>",
        signs=("<|channel>", "<channel|>"),
    ),
    _tags("granite_text", "Here is my thought process:", "Here is my response:"),
    _tags("apriel", "Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]", wrapper=("", "[END FINAL RESPONSE]")),
    _tags("granite", "<think>", "</think>", "</think>", "<response></response>", wrapper=("<response>", "</response>")),
    _tags("think", "<think>", "</think>"),
)
_BY_NAME = {family.name: family for family in _FAMILIES}
_COMMON = "think"

# What vLLM calls its parsers of the same tags.
_ALIASES = {
    "deepseek_r1": _COMMON,
    "deepseek_v3": _COMMON,
    "qwen3": _COMMON,
    "glm45": _COMMON,
    "kimi_k2": _COMMON,
    "minimax_m2": _COMMON,
    "nemotron_v3": _COMMON,
    "olmo3": _COMMON,
    "step3": _COMMON,
    "ernie45": "granite",
    "cohere_command": "cohere",
}

REASONING_FORMATS = tuple(_BY_NAME)
"""Names of all families."""


def reasoning_format(name: str, template: str | None) -> ReasoningFormat | None:
    """The family of a model; None if its answers are not searched for thoughts.

    Args:
        name: of a family; `auto` tells by the template, `none` is no family.
        template: source of the model's chat template, if it has one.

    Raises:
        ConfigError: there is no family of this name.
    """
    if name == "none":
        return None
    if name == "auto":
        return next((family for family in _FAMILIES if template and all(sign in template for sign in family.signs)), None)
    family = _BY_NAME.get(_ALIASES.get(name, name))
    if family is None:
        raise ConfigError(f"unknown reasoning_parser {name!r}. There are: auto, none, {', '.join(REASONING_FORMATS)}")
    return family


def opens_thoughts(family: ReasoningFormat, prompt_text_tail: str) -> bool:
    """Whether a rendered prompt ends within thoughts, so that the answer begins there.

    Args:
        prompt_text_tail: the end of what the template itself wrote, at least as long as the tag with white space around it;
            never what a user wrote.
    """
    return prompt_text_tail.rstrip(WHITESPACE).endswith(family.begin)
