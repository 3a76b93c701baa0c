"""Rows for the tests of rendering, and how they are read back."""

from typing import Any

from finetune.data.render import IGNORED, Renderer, TokenizedText
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation, Document, Function, Message, ToolCall

CALL_ID = "abcdefghi"


def chat(*contents: str, system: str | None = None) -> Conversation:
    """User and assistant in turn."""
    first = [] if system is None else [Message(role="system", content=system)]
    turns = [Message(role="assistant" if i % 2 else "user", content=text) for i, text in enumerate(contents)]
    return Conversation(first + turns)


def tool_schema(name: str) -> dict[str, Any]:
    """A tool of one argument, as OpenAI writes it."""
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    return {
        "type": "function",
        "function": {"name": name, "description": "Says what is asked", "parameters": parameters},
    }


def tool_call(name: str, call_id: str = CALL_ID, **arguments: Any) -> ToolCall:
    """A call of it."""
    return ToolCall(type="function", function=Function(name=name, arguments=arguments), id=call_id)


def weather(result: str = "22 degrees", final: str = "It is warm.") -> Conversation:
    """A question, a call, its result and the answer."""
    messages = [
        Message(role="user", content="How is Oslo?"),
        Message(role="assistant", content="", tool_calls=[tool_call("get_weather", city="Oslo", days=3, wind=True)]),
        Message(role="tool", content=result, tool_call_id=CALL_ID, name="get_weather"),
        Message(role="assistant", content=final),
    ]
    return Conversation(messages, [tool_schema("get_weather")])


def labelled(renderer: Renderer, example: Conversation | Document) -> TokenizedText:
    """Render and tokenise one row; raises its `RowError`."""
    rendered = renderer.tokenise([renderer.render(example)])[0]
    if isinstance(rendered, RowError):
        raise rendered
    return rendered


def supervised(tokenizer: Any, rendered: TokenizedText) -> list[str]:
    """The texts of the runs of supervised tokens."""
    runs: list[list[int]] = [[]]
    for label in rendered.labels.tolist():
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(label)
    return [tokenizer.decode(run) for run in runs if run]
