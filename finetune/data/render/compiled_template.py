"""A tokenizer's chat template: messages -> text, as generation would render them too; the shipped templates by name.

The template is compiled once, in the sandbox of `apply_chat_template` with bounds.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from finetune.data.render.call_arguments import Form, arguments_form, with_arguments_as_text
from finetune.data.render.control_tokens import control_tokens
from finetune.data.render.prompt_ends import Turns, ending
from finetune.data.render.reasoning import PLACEHOLDER, reasoning_key
from finetune.data.render.row_clock import RowClock
from finetune.data.render.sandbox import ANOTHER_TEMPLATE, write
from finetune.data.render.template_settings import CLOCK, clock_of, stop_tokens, template_args
from finetune.data.render.template_source import check_template_args, compile_templates, source_problems, variables_of
from finetune.data.row_errors import RowError
from finetune.data.types import Function, Message, ToolCall
from finetune.errors import DataError, Problem
from finetune.files import read_text

FOLDER = Path(__file__).parent / "templates"
MAX_TEMPLATE_BYTES = 1 << 20
SHIPPED = tuple(sorted(path.stem for path in FOLDER.glob("*.jinja")))

Tools = list[dict[str, Any]] | None


def read_template(name_or_path: str) -> str:
    """The Jinja source of a shipped template (by name) or of a file; `DataError` if it is neither."""
    path = FOLDER / f"{name_or_path}.jinja" if name_or_path in SHIPPED else Path(name_or_path)
    try:
        return read_text(path, MAX_TEMPLATE_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        absent = isinstance(error, FileNotFoundError)
        reason = error.__class__.__name__ if absent else getattr(error, "strerror", None) or error
        raise DataError(
            Problem(
                where="data.chat_template",
                what="no such template" if absent else "cannot be read as a template",
                got=f"{name_or_path!r} ({reason})",
                do=f"name a shipped template ({', '.join(SHIPPED)}) or the path of a .jinja file",
            )
        ) from error


class Prompt(NamedTuple):
    """The generation prompt before a turn of a rendered conversation.

    `end`: where it ends in the text; None if the text does not begin with it, and then `text` is the prompt. `proven`:
    the turn itself stands in the text as it would if it were the last one.
    """

    end: int | None
    text: str = ""
    proven: bool = False


class CompiledTemplate:
    """The chat template of `tokenizer`, ready to render; `name` is what messages call it.

    Raises `DataError` where there is no template or it cannot be read.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        if not tokenizer.chat_template:
            do = "name one in data.chat_template: a shipped template or a .jinja file"
            raise DataError(Problem(where="data.chat_template", what="the tokenizer has no chat template", do=do))
        self.name = name
        self.clock_of_row = RowClock()
        self.eos: str = tokenizer.eos_token
        self.stops = stop_tokens(tokenizer)
        self.control = control_tokens(tokenizer)
        self.args = template_args(tokenizer)
        try:
            self._sources = [tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])]
        except ValueError as error:
            what = "the tokenizer has several chat templates, and none is called default"
            do = "give one of them as a .jinja file in data.chat_template"
            names = ", ".join(sorted(tokenizer.chat_template))
            raise DataError(Problem("data.chat_template", what, do, names)) from error
        self.clock = clock_of(tokenizer)
        self._compiled = compile_templates(self._sources, name)
        check_template_args(self.variables, self.args, name)
        pairs = zip(self._compiled, self._sources, strict=True)
        self._endings = [_ending(template, source) for template, source in pairs]
        # Template.render copies the environment's globals a call, which costs more than a short template itself.
        common = {**tokenizer.special_tokens_map, "documents": None, **self.args}
        if self.clock is not None:
            common[CLOCK] = self.clock
        self._variables = [{**template.globals, **common} for template in self._compiled]

    def text(self, messages: Sequence[Message], tools: Tools = None, generation: bool = False, **args: Any) -> str:
        """What the template writes; `generation` adds what makes the model answer; `args` are further variables.

        `RowError` if it fails.
        """
        return self._rendered([self._taken(message) for message in messages], tools, generation, args)

    def text_and_prompts(
        self, messages: Sequence[Message], tools: Tools, indices: Sequence[int]
    ) -> tuple[str, list[Prompt]]:
        """The whole text, and for each turn of `indices` the prompt before it."""
        fixed = self._endings[bool(tools)]
        if fixed is None:
            text, starts = self.text(messages, tools), []
        else:
            written: list[str] = []
            turns = Turns([self._taken(message) for message in messages], written)
            self._write(written, turns, tools, False)
            text, starts = "".join(written), turns.starts()
        prompts: list[Prompt] = []
        for index in indices:
            self.clock_of_row.check()
            start = starts[index] if index < len(starts) else None
            if start is None or fixed is None:
                prompt = self.text(messages[:index], tools, generation=True)
                prompts.append(Prompt(len(prompt)) if text.startswith(prompt) else Prompt(None, prompt))
            elif text.startswith(fixed, start):
                prompts.append(Prompt(start + len(fixed), proven=True))
            else:
                prompts.append(Prompt(None, text[:start] + fixed))
        return text, prompts

    @property
    def source_problems(self) -> list[Problem]:
        """What may not stand in a chat template, although it can be run with it."""
        return source_problems(self._sources, self.name)

    @cached_property
    def variables(self) -> tuple[str, ...]:
        """The names that the template reads beside the messages, the tools and the tokenizer's special tokens."""
        return tuple(sorted({variable for source in self._sources for variable in variables_of(source, self.name)}))

    @cached_property
    def arguments_form(self) -> Form:
        """Whether the template takes the arguments of a call as an object or as JSON text; tried once."""
        return arguments_form(self._rendered)

    @cached_property
    def reasoning_key(self) -> str | None:
        """The key under which the template reads the reasoning of a message; None if it reads none; tried once."""
        question, function = Message(role="user", content="qhxq1"), Function(name="probe", arguments={})
        call = ToolCall(type="function", id="abcdefghi", function=function)
        answers = [
            Message(role="assistant", content="qhxa2"),
            Message(role="assistant", content="", tool_calls=[call]),
        ]
        return reasoning_key(self._rendered, question, [self._taken(answer) for answer in answers])

    def _write(
        self,
        written: list[str],
        messages: Turns | list[Any],
        tools: Tools,
        generation: bool,
        args: Mapping[str, Any] | None = None,
    ) -> None:
        """Add to `written` what the template writes, piece by piece as it does."""
        with_tools = bool(tools)
        template = self._compiled[with_tools]
        variables = {
            **self._variables[with_tools],
            **(args or {}),
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": generation,
        }
        try:
            write(template, variables, written, self.name)
        except RowError as error:
            named = next((name for name in self.variables if re.search(rf"\b{name}\b", error.got or "")), None)
            if named is not None:
                error.do = f"give {named} in data.template_args, or {ANOTHER_TEMPLATE}"
            raise

    def _taken(self, message: Message) -> Any:
        """The message as generation has it: without our `train`, arguments and reasoning as the template reads them."""
        taken: Any = message
        if "train" in message:
            taken = {key: value for key, value in message.items() if key != "train"}
        if "tool_calls" in message and self.arguments_form == "text":
            taken = with_arguments_as_text(taken)
        if "reasoning" in message:
            taken = {key: value for key, value in taken.items() if key != "reasoning"}
            if self.reasoning_key is not None:
                taken[self.reasoning_key] = message["reasoning"]
        return taken

    def _rendered(
        self, messages: list[Any], tools: Tools, generation: bool = False, args: Mapping[str, Any] | None = None
    ) -> str:
        written: list[str] = []
        self._write(written, messages, tools, generation, args)
        return "".join(written)


@lru_cache(maxsize=64)
def _ending(template: Any, source: str) -> str | None:
    return ending(template, source)


def with_placeholder(message: Message) -> Message:
    """The message with a placeholder as its reasoning."""
    return {**message, "reasoning": PLACEHOLDER}
