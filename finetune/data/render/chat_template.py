"""A tokenizer's chat template: conversation -> text, as generation would render it too; the shipped templates by name.

The template is compiled once, in the sandbox of `apply_chat_template` with bounds.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from finetune.data.render.call_arguments import Form, arguments_form, with_arguments_as_text
from finetune.data.render.frame_marks import finder, frame_marks
from finetune.data.render.prompt_ends import Turns, ending
from finetune.data.render.sandbox import ANOTHER_TEMPLATE, write
from finetune.data.render.template_settings import clock_of
from finetune.data.render.template_source import compile_templates
from finetune.data.row_errors import RowError, shown
from finetune.data.types import Conversation, Message
from finetune.errors import DataError, Problem

FOLDER = Path(__file__).parent / "templates"
SHIPPED = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))


def read_template(name_or_path: str) -> str:
    """The Jinja source of a shipped template (by name) or of a file; `DataError` if it is neither."""
    path = FOLDER / f"{name_or_path}.jinja" if name_or_path in SHIPPED else Path(name_or_path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            Problem(
                where="data.chat_template",
                what="no such template",
                got=f"{name_or_path!r} ({error.__class__.__name__})",
                do=f"name a shipped template ({', '.join(SHIPPED)}) or the path of a .jinja file",
            )
        ) from error


System = Literal["error", "merge_into_first_user"]

PROBE = "What is 2+2?"
PROBE_TURNS = (Message(role="user", content=PROBE), Message(role="assistant", content="It is four!"))
_PLAIN = frozenset(("role", "content", "train"))
_SYSTEM_PROBE = "Count in base seven."


class ChatTemplate:
    """Renders with the chat template of `tokenizer`; `name` is what messages call it.

    `system` decides about a system message where the template has no system role: an error, or the beginning
    of the first user message. Raises `DataError` where there is no template.
    """

    def __init__(self, tokenizer: Any, name: str, system: System = "error") -> None:
        if not tokenizer.chat_template:
            do = "name one in data.chat_template: a shipped template or a .jinja file"
            raise DataError(Problem(where="data.chat_template", what="the tokenizer has no chat template", do=do))
        self.name = name
        self.eos: str = tokenizer.eos_token
        self._bos: str | None = tokenizer.bos_token
        self._system = system
        sources = [tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])]
        self._compiled = compile_templates(sources, name)
        self._endings = [ending(template, source) for template, source in zip(self._compiled, sources, strict=True)]
        # Template.render copies the environment's globals a call, which costs more than a short template itself.
        common = {**tokenizer.special_tokens_map, **clock_of(tokenizer), "documents": None}
        self._variables = [{**template.globals, **common} for template in self._compiled]
        self.control = control_tokens(tokenizer)
        self._by_first = by_first_character(self.control)
        self._has_system: bool | None = None

    def text(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None = None, generation: bool = False
    ) -> str:
        """What the template writes; `generation` adds what makes the model answer. `RowError` if it fails."""
        return self._rendered([self._taken(message) for message in messages], tools, generation)

    def text_and_prompts(
        self, messages: Sequence[Message], tools: list[dict[str, Any]] | None, indices: Sequence[int]
    ) -> tuple[str, list[int | str]]:
        """The whole text, and for each turn of `indices` the prompt before it.

        That is where it ends in the text, or, if it is not a prefix of the text, the prompt itself.
        """
        fixed = self._endings[bool(tools)]
        if fixed is None:
            text, starts = self.text(messages, tools), []
        else:
            written: list[str] = []
            turns = Turns([self._taken(message) for message in messages], written)
            self._write(written, turns, tools, False)
            text, starts = "".join(written), turns.starts()
        prompts: list[int | str] = []
        for index in indices:
            start = starts[index] if index < len(starts) else None
            if start is None or fixed is None:
                prompt = self.text(messages[:index], tools, generation=True)
                prompts.append(len(prompt) if text.startswith(prompt) else prompt)
            elif text.startswith(fixed, start):
                prompts.append(start + len(fixed))
            else:
                prompts.append(text[:start] + fixed)
        return text, prompts

    def _write(
        self, written: list[str], messages: Turns | list[Message], tools: list[dict[str, Any]] | None, generation: bool
    ) -> None:
        """Add to `written` what the template writes, piece by piece as it does."""
        with_tools = bool(tools)
        template = self._compiled[with_tools]
        variables = {
            **self._variables[with_tools],
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": generation,
        }
        write(template, variables, written, self.name)

    def conversation(self, given: Conversation) -> Conversation:
        """The conversation as the template takes it: no content holds frame, and the system policy is applied.

        An empty system message is left out: it says nothing, unless the template has a system text of its own for
        conversations without one.
        """
        self._check_contents(given)
        first = given.messages[0]
        if first["role"] != "system":
            return given
        if not first["content"] and not (self.has_system and self._has_default_system):
            return replace(given, messages=given.messages[1:])
        if self.has_system:
            return given
        if self._system == "error":
            what = f"{self.name} has no system role"
            policy = "set data.system to merge_into_first_user (--system of evaluate)"
            do = f"{policy}, remove the message, or {ANOTHER_TEMPLATE}"
            raise RowError("messages[0].role", what, do, shown(first["content"]))
        if len(given.messages) < 2 or given.messages[1]["role"] != "user":
            do = "let a user message follow, or remove it"
            raise RowError("messages[0].role", "no user message follows to take the system message", do)
        user = given.messages[1]
        merged: Message = {**user, "content": first["content"] + "\n\n" + user["content"]}
        if first.get("train") is False:
            merged["train"] = False
        return replace(given, messages=[merged, *given.messages[2:]])

    def prompt(self, conversation: Conversation) -> str:
        """The prompt of the last message: all turns before it, with the generation prompt."""
        given = self.conversation(conversation)
        return self.text(given.messages[:-1], given.tools, generation=True)

    @property
    def has_system(self) -> bool:
        """Whether a system message gets through; tried once."""
        if self._has_system is None:
            turns = [
                Message(role="system", content=_SYSTEM_PROBE),
                Message(role="user", content=PROBE),
                Message(role="assistant", content="4"),
            ]
            try:
                self._has_system = _SYSTEM_PROBE in self.text(turns)
            except RowError:
                self._has_system = False
        return self._has_system

    def _check_contents(self, given: Conversation) -> None:
        """Raise `RowError` where anything that the template writes of a row would be read as frame."""
        for index, message in enumerate(given.messages):
            found = self._frame_in(message["content"])
            if found is None and not _PLAIN.issuperset(message):
                found = next(filter(None, map(self._frame_in, strings({**message}))), None)
            if found is not None:
                field, got = f"messages[{index}].content", shown(message["content"])
                raise RowError(field, f"contains {found}", "remove it or write it differently", got)
        for text in strings(given.tools or []):
            if found := self._frame_in(text):
                raise RowError("tools", f"contain {found}", "remove it or write it differently", shown(text))

    def _frame_in(self, content: str) -> str | None:
        """What is wrong with a content that holds a part of the conversation's frame: `[INST]` or a special token."""
        token = find_token(content, self._by_first)
        if token is not None:
            return f"the control token {token}, which would be read as the conversation's frame"
        if self._marks is not None and (found := self._marks.search(content)):
            mark = found[0].strip()
            return f"{mark}, which {self.name} writes itself: it would be read as the conversation's frame"
        return None

    @cached_property
    def _has_default_system(self) -> bool:
        """Whether the template writes more without a system message than with an empty one."""
        user = Message(role="user", content=PROBE)
        try:
            return len(self.text([user])) > len(self.text([Message(role="system", content=""), user]))
        except RowError:
            return False

    def _taken(self, message: Message) -> Message:
        """The message as generation has it, without our `train`, and with arguments in the template's form."""
        if "train" in message:
            message = message.copy()
            del message["train"]
        if "tool_calls" in message and self.arguments_form == "text":
            return with_arguments_as_text(message)
        return message

    @cached_property
    def arguments_form(self) -> Form:
        """Whether the template takes the arguments of a call as an object or as JSON text; tried once."""
        return arguments_form(self._rendered)

    def _rendered(self, messages: list[Any], tools: list[dict[str, Any]] | None, generation: bool = False) -> str:
        written: list[str] = []
        self._write(written, messages, tools, generation)
        return "".join(written)

    @cached_property
    def _marks(self) -> re.Pattern[str] | None:
        return finder(frame_marks(self.text, self.control, self._bos, self.eos))


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The special tokens: text that says one of them is read as that token, whether the template writes it or not."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted(special, key=lambda token: (-len(token), token)))


ByFirstCharacter = list[tuple[str, list[str]]]


def by_first_character(tokens: Iterable[str]) -> ByFirstCharacter:
    """Tokens by their first character, for `find_token`."""
    groups: dict[str, list[str]] = {}
    for token in tokens:
        groups.setdefault(token[:1], []).append(token)
    return list(groups.items())


def find_token(text: str, groups: ByFirstCharacter) -> str | None:
    """The first of the tokens that occurs in a text."""
    for first, tokens in groups:
        if first in text:
            for token in tokens:
                if token in text:
                    return token
    return None


def strings(value: object) -> Iterator[str]:
    """Every string inside a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings(inner)
