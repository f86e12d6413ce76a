"""Facts out of a text, and a call of a function, by the official client against any InferFlux server.

    inferflux serve                                        the demo model on http://127.0.0.1:8080
    python ask.py [--url http://127.0.0.1:8080] [--model NAME]

Needs `pip install openai`.
"""

from __future__ import annotations

import argparse
import sys
from typing import Literal

import openai
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field

TEXT = "Marie Curie was born in Warsaw in 1867. She won two Nobel Prizes."


class Person(BaseModel):
    """What the answer has to be. Bounds keep a small model from wandering."""

    name: str = Field(max_length=30)
    birthplace: str = Field(max_length=30)
    birth_year: int = Field(ge=1000, le=2100)


class GetWeather(BaseModel):
    """Tells the weather of a city."""

    city: str = Field(max_length=30)
    unit: Literal["celsius", "fahrenheit"]


def person(client: openai.OpenAI, model: str, text: str) -> Person:
    """The person that a text is about. The server lets the model write nothing but a `Person`."""
    question = _user(f"Extract the facts as JSON: {text}")
    answer = client.chat.completions.parse(
        model=model, messages=question, response_format=Person, temperature=0, max_tokens=200
    )
    parsed = answer.choices[0].message.parsed
    if parsed is None:  # OpenAI's own models may refuse to answer; the client makes room for that
        raise openai.OpenAIError("there is no answer")
    return parsed


def mood(client: openai.OpenAI, model: str, review: str) -> str:
    """One of three words: `structured_outputs` is vLLM's field, which the client sends along as it is."""
    answer = client.chat.completions.create(
        model=model,
        messages=_user(f"Is this review positive, negative or neutral? {review}"),
        temperature=0,
        extra_body={"structured_outputs": {"choice": ["positive", "negative", "neutral"]}},
    )
    return answer.choices[0].message.content or ""


def weather_call(client: openai.OpenAI, model: str, question: str) -> GetWeather:
    """The call that the model makes of a question, printed to standard output while it is written."""
    tool = openai.pydantic_function_tool(GetWeather, name="get_weather")
    with client.chat.completions.stream(
        model=model, messages=_user(question), tools=[tool], tool_choice="required", parallel_tool_calls=False, temperature=0
    ) as stream:
        for event in stream:
            if event.type == "tool_calls.function.arguments.delta":
                sys.stdout.write(event.arguments_delta)
                sys.stdout.flush()
    sys.stdout.write("\n")
    calls = stream.get_final_completion().choices[0].message.tool_calls or []
    return GetWeather.model_validate_json(calls[0].function.arguments)


def _user(text: str) -> list[ChatCompletionMessageParam]:
    return [{"role": "user", "content": text}]


def main() -> None:
    parser = argparse.ArgumentParser(description="Structured output and tool calls.")
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="base URL of the server")
    parser.add_argument("--model", default="demo", help="name of a model on it")
    parser.add_argument("--api-key", default="unused", help="its API key, if it wants one")
    options = parser.parse_args()
    with openai.OpenAI(base_url=options.url.rstrip("/") + "/v1", api_key=options.api_key) as client:
        try:
            found = person(client, options.model, TEXT)
            sys.stdout.write(f"{found.name}, born in {found.birthplace} in {found.birth_year}\n")
            sys.stdout.write(f"{mood(client, options.model, 'I love this phone, it is great!')}\n")
            call = weather_call(client, options.model, "What is the weather like in Paris today?")
            sys.stdout.write(f"get_weather: city {call.city}, unit {call.unit}\n")
        except openai.LengthFinishReasonError:
            sys.exit("Error: the answer did not fit into its max_tokens")
        except openai.APIConnectionError:
            sys.exit(f"Error: nobody answers at {options.url}; start `inferflux serve`, or name another --url")
        except openai.OpenAIError as error:
            sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
