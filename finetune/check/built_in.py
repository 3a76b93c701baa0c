"""Conversations with which `finetune template` shows a template: turns, a system message, calls, reasoning."""

from typing import Any

from finetune.data.types import Conversation, Message, ToolCall


def _turns(*contents: str) -> list[Message]:
    return [
        Message(role="assistant" if index % 2 else "user", content=content) for index, content in enumerate(contents)
    ]


def _call(number: int, city: str) -> ToolCall:
    # Mistral's templates want ids of nine letters and digits.
    return ToolCall(
        type="function", id=f"weather0{number}", function={"name": "get_weather", "arguments": {"city": city}}
    )


def _calls(cities: list[str], answer: str) -> Conversation:
    calls = [_call(number, city) for number, city in enumerate(cities, start=1)]
    results = [
        Message(role="tool", content='{"sky": "rain"}', name="get_weather", tool_call_id=call["id"]) for call in calls
    ]
    question = Message(role="user", content=f"What is the weather in {' and '.join(cities)}?")
    called = Message(role="assistant", content="", tool_calls=calls)
    return Conversation([question, called, *results, Message(role="assistant", content=answer)], [_TOOL])


_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The name of the city"}},
            "required": ["city"],
        },
    },
}

_QUESTIONS = (
    *("Which planet is closest to the sun?", "Mercury.", "Which is the largest?", "Jupiter."),
    *("How many moons does Mars have?", "Two: Phobos and Deimos."),
)
_THREE_TURNS = Conversation(_turns(*_QUESTIONS))
_SYSTEM = Conversation([Message(role="system", content="Answer in one short sentence."), *_turns(*_QUESTIONS[:2])])
_CALL = _calls(["Bergen"], "It is raining in Bergen.")
_PARALLEL = _calls(["Bergen", "Oslo"], "It is raining in both.")
_first, _thought, _second, _thought_too = _turns(*_QUESTIONS[:4])
_REASONING = Conversation(
    [
        _first,
        {**_thought, "reasoning": "The order is Mercury, Venus, Earth."},
        _second,
        {**_thought_too, "reasoning": "Jupiter and Saturn are the giants; Jupiter is larger."},
    ]
)

CALL, TWO_CALLS = "a call", "two calls"
SHOWN = {"three turns": _THREE_TURNS, CALL: _CALL, "reasoning": _REASONING}
"""Each is shown, unless the template refuses it."""
TRIED = {"system": _SYSTEM, TWO_CALLS: _PARALLEL}
"""Only what the template refuses of these is said."""
