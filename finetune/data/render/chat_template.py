"""A chat template that knows its own form: roles, marks, how answers begin and end; each is tried once by rendering."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

from finetune.data.render.compiled_template import CompiledTemplate, with_placeholder
from finetune.data.render.control_tokens import by_first_character, find_token, strings
from finetune.data.render.ends import End, find_end, next_speaker
from finetune.data.render.frame_marks import TAG, finder, frame_marks
from finetune.data.render.reasoning import CLOSE, PLACEHOLDER, closing_mark, opened_block, split_inline
from finetune.data.render.sandbox import ANOTHER_TEMPLATE
from finetune.data.row_errors import RowError, shown
from finetune.data.types import Conversation, Function, Message, ToolCall

System = Literal["error", "merge_into_first_user"]

PROBE = "What is 2+2?"
PROBE_TURNS = (Message(role="user", content=PROBE), Message(role="assistant", content="It is four!"))
SWITCHES = ("enable_thinking", "thinking")
"""Variables with which templates open or close the block of reasoning in the generation prompt."""
_PLAIN = frozenset(("role", "content", "train"))
_SYSTEM_PROBE = "Count in base seven."
_TAG_AT_END = re.compile(rf"(?:{TAG.pattern})\Z")
_ANSWER, _NEXT, _VALUE, _OTHER, _RESULT = "qhxa1", "qhxn2", "qhxv3", "qhxw4", "qhxt5"
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "Looks it up",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "where"}},
            "required": ["city"],
        },
    },
}


class Switch(NamedTuple):
    """A variable and its value, with which the generation prompt opens a block of reasoning, or none."""

    name: str
    value: bool

    def __str__(self) -> str:
        return f"{self.name}: {str(self.value).lower()}"


class Frame(NamedTuple):
    """What a template writes between its generation prompt and an answer, and between the answer and its end."""

    header: str
    footer: str


class ChatTemplate(CompiledTemplate):
    """Renders with the chat template of `tokenizer`; `name` is what messages call it.

    `system` decides about a system message where the template has no system role: an error, or the beginning
    of the first user message. Raises `DataError` where there is no template.
    """

    def __init__(self, tokenizer: Any, name: str, system: System = "error") -> None:
        super().__init__(tokenizer, name)
        self._bos: str | None = tokenizer.bos_token
        self._system = system
        self._by_first = by_first_character(self.control)
        self.prompt_alone = False
        """Set where the tokenizer reads the end of a prompt otherwise once an answer follows."""

    def conversation(self, given: Conversation) -> Conversation:
        """The conversation as the template takes it: no content holds frame, and the system policy is applied.

        An empty system message is left out: it says nothing, unless the template has a system text of its own for
        conversations without one. A `<think>` block in an answer is its reasoning where the template knows reasoning.
        """
        if self._knows_think:
            given = _with_inline_reasoning(given)
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

    @cached_property
    def has_system(self) -> bool:
        """Whether a system message gets through."""
        system = Message(role="system", content=_SYSTEM_PROBE)
        return _SYSTEM_PROBE in self._tried([system, *PROBE_TURNS])

    @cached_property
    def text_end(self) -> End | None:
        """What ends an answer in text; None: nothing does."""
        question, answer = PROBE_TURNS[0], Message(role="assistant", content=_ANSWER)
        last = self._tried([question, answer])
        followed = self._tried([question, answer, Message(role="user", content=_NEXT), PROBE_TURNS[1]])
        followed = followed or self._tried([question, answer, Message(role="user", content=_NEXT)])
        return find_end(
            last.rpartition(_ANSWER)[2],
            followed.partition(_ANSWER)[2].partition(_NEXT)[0],
            self._tried([question], generation=True).rpartition(PROBE)[2],
            self.stops,
            self.control,
        )

    @cached_property
    def call_end(self) -> End | None:
        """What ends an answer that calls a tool; None if the template takes no calls."""
        question, result = PROBE_TURNS[0], Message(role="tool", content=_RESULT, tool_call_id="abcdefghi", name="probe")
        answer = _calling(_VALUE)
        last, followed = self._tried([question, answer], [_TOOL]), self._tried([question, answer, result], [_TOOL])
        if _VALUE not in last:
            return None
        behind, before_result = last.rpartition(_VALUE)[2], followed.partition(_VALUE)[2].partition(_RESULT)[0]
        if self.text_end_is_appended:
            return next_speaker(behind, before_result, "", self.control)
        prompt = self._tried([question], generation=True).rpartition(PROBE)[2]
        return find_end(behind, before_result, prompt, self.stops, self.control)

    @property
    def text_end_is_appended(self) -> bool:
        """Whether the next speaker's mark ends an answer."""
        return self.text_end is not None and bool(self.text_end.appended)

    def end_of(self, message: Message) -> End | None:
        """What ends this answer."""
        return (self.call_end if "tool_calls" in message else None) or self.text_end

    @property
    def end_tokens(self) -> tuple[str, ...]:
        """The tokens that end answers and calls."""
        return tuple(dict.fromkeys(end.token for end in (self.text_end, self.call_end) if end is not None))

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template writes the tools that may be called."""
        return self._tried([PROBE_TURNS[0]], [_TOOL]) != self._tried([PROBE_TURNS[0]])

    @cached_property
    def parallel_calls(self) -> bool:
        """Whether the template writes a second call of one answer."""
        answer = _calling(_VALUE, _OTHER)
        written = self._tried([PROBE_TURNS[0], answer], [_TOOL])
        return _VALUE in written and _OTHER in written

    @cached_property
    def opened(self) -> str:
        """The block of reasoning that the generation prompt opens; empty if it opens none."""
        return opened_block(self._tried([PROBE_TURNS[0]], generation=True))

    @cached_property
    def closing_arg(self) -> Switch | None:
        """The variable with which the prompt opens no block; None if there is none."""
        return self._switch(opens=False) if self.opened else None

    @cached_property
    def opening_arg(self) -> Switch | None:
        """The variable with which the prompt opens a block; None if there is none."""
        return None if self.opened else self._switch(opens=True)

    @cached_property
    def closing(self) -> str:
        """What ends the reasoning in a block that the prompt opened."""
        answer = Message(role="assistant", content=_ANSWER)
        written = self._tried([PROBE_TURNS[0], with_placeholder(answer)]) if self.reasoning_key else ""
        between = written.rpartition(PLACEHOLDER)[2].partition(_ANSWER)[0] if PLACEHOLDER in written else ""
        return between or (closing_mark(self.opened) if self.opened else "")

    @cached_property
    def frame(self) -> Frame:
        """What the template writes around an answer in text without reasoning."""
        return self._frame(Message(role="assistant", content=_ANSWER))

    def answer_in(self, generated: str) -> str:
        """The answer in what a model wrote behind the generation prompt: without header words, reasoning and end."""
        for token in dict.fromkeys([*self.end_tokens, *self.stops]):
            generated = generated.partition(token)[0]
        for mark in self._last_marks:
            generated = generated.rpartition(mark)[2]
        footer = self.frame.footer.strip()
        return generated.strip().removesuffix(footer).strip() if footer else generated.strip()

    @cached_property
    def reasoning_header(self) -> str:
        """What a template writes between its generation prompt and the reasoning of an answer, or of a call."""
        prompt = self._tried([PROBE_TURNS[0]], generation=True)
        for answer in (Message(role="assistant", content=_ANSWER), _calling(_VALUE)) if self.reasoning_key else ():
            written = self._tried([PROBE_TURNS[0], with_placeholder(answer)])
            if written.startswith(prompt) and PLACEHOLDER in written:
                return written[len(prompt) :].partition(PLACEHOLDER)[0]
        return ""

    @cached_property
    def _last_marks(self) -> tuple[str, ...]:
        """The mark before the answer, without reasoning and with it."""
        headers = [self.frame.header]
        if self.reasoning_key:
            headers.append(self._frame(with_placeholder(Message(role="assistant", content=_ANSWER))).header)
        if self.opened:
            headers.append(self.closing)
        found = []
        for header in headers:
            marks = [*((header.rfind(token), token) for token in self.control if token in header)]
            marks += [(match.start(), match[0]) for match in TAG.finditer(header)]
            found += [max(marks)[1]] if marks else []
        return tuple(dict.fromkeys(found))

    def is_frame(self, before: str, behind: str) -> bool:
        """Whether what a template writes around an answer ends and begins with marks: tags or special tokens."""
        before, behind = before.rstrip(), behind.lstrip()
        opens = not before or before.endswith(self.control) or bool(_TAG_AT_END.search(before))
        return opens and (not behind or behind.startswith(self.control) or bool(TAG.match(behind)))

    def closes_block(self, prompt: str) -> bool:
        """Whether a generation prompt ends with a block of reasoning that is closed."""
        mark = self.closing.strip() or CLOSE
        return prompt.rstrip().endswith(mark)

    def _frame(self, answer: Message) -> Frame:
        prompt, written = self._tried([PROBE_TURNS[0]], generation=True), self._tried([PROBE_TURNS[0], answer])
        header, _, footer = written[len(prompt) :].partition(_ANSWER) if written.startswith(prompt) else ("", "", "")
        end = self.text_end.token if self.text_end and not self.text_end.appended else None
        return Frame(header, footer.partition(end)[0] if end else "")

    def _switch(self, opens: bool) -> Switch | None:
        for name in SWITCHES:
            for value in (False, True) if name in self.variables else ():
                prompt = self._tried([PROBE_TURNS[0]], generation=True, **{name: value})
                if prompt and bool(opened_block(prompt)) == opens:
                    return Switch(name, value)
        return None

    def _tried(self, messages: Sequence[Message], tools: Any = None, generation: bool = False, **args: Any) -> str:
        """What the template writes; nothing where it refuses."""
        try:
            return self.text(messages, tools, generation, **args)
        except RowError:
            return ""

    @cached_property
    def _knows_think(self) -> bool:
        """Whether the template writes reasoning, be it in `<think>` or in marks of its own."""
        return bool(self.reasoning_key or self.opened or self.opening_arg)

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
        user = PROBE_TURNS[0]
        try:
            return len(self.text([user])) > len(self.text([Message(role="system", content=""), user]))
        except RowError:
            return False

    @cached_property
    def _marks(self) -> re.Pattern[str] | None:
        return finder(frame_marks(self.text, self.control, self._bos, self.eos))


def _with_inline_reasoning(given: Conversation) -> Conversation:
    """The conversation with the `<think>` blocks of its answers as their reasoning."""
    turns = enumerate(given.messages)
    if not any("reasoning" in message or "think>" in message["content"] for _, message in turns):
        return given
    messages = [
        split_inline(message, f"messages[{index}]") if message["role"] == "assistant" else message
        for index, message in enumerate(given.messages)
    ]
    return replace(given, messages=messages)


def _calling(*values: str) -> Message:
    """An answer that calls the probe once with each value."""
    calls = [
        ToolCall(
            type="function", id=f"abcdefgh{'ij'[place]}", function=Function(name="probe", arguments={"city": value})
        )
        for place, value in enumerate(values)
    ]
    return Message(role="assistant", content="", tool_calls=calls)
