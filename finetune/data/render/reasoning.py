"""Reasoning before an answer: the key under which a template reads it, and the block that a generation prompt opens.

Some prompts end with an opened block (`<think>`) that the finished text is written without: the template drops it from
what was said (DeepSeek-R1), or writes it only where there is reasoning (Nemotron 3, MiniMax-M2). The model then writes
its reasoning, the closing mark and the answer.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from finetune.data.row_errors import RowError, shown
from finetune.data.types import REASONING_KEYS, Message

OPEN, CLOSE = "<think>", "</think>"
PLACEHOLDER = "qhxr9"
"""Stands where reasoning would: what a template writes around it is what the model writes around none."""

_NAMES = "think|thinking|thought|reasoning|reason|analysis|cot"
_OPENED = re.compile(
    rf"(?:<((?:\w+:)?(?:{_NAMES}))>|\[(THINK)\]|<\|START_(THINKING)\|>|\u25c1(think)\u25b7|<\|channel>(thought))(\n*)\Z"
)
_CLOSED = re.compile(rf"<({_NAMES})>\s*</\1>\s*\Z")
_CLOSERS = ("</{}>", "[/{}]", "<|END_{}|>", "\u25c1/{}\u25b7", "<channel|>")
_INLINE = re.compile(rf"\s*(?:{OPEN})?(.*?){CLOSE}(.*)", re.DOTALL)


def reasoning_key(render: Callable[[list[Any], None], str], question: Message, answers: Sequence[Any]) -> str | None:
    """The key that a template reads in one of these answers."""
    for key in REASONING_KEYS:
        for answer in answers:
            try:
                if PLACEHOLDER in render([question, {**answer, key: PLACEHOLDER}], None):
                    return key
            except RowError:
                continue
    return None


def opened_block(prompt: str) -> str:
    """The block that the end of a prompt opens, with the line breaks behind it; empty if it opens none."""
    match = _OPENED.search(prompt)
    return match[0] if match else ""


def closed_block(prompt: str) -> str:
    """The block without reasoning that ends a prompt; empty if there is none."""
    match = _CLOSED.search(prompt)
    return match[0] if match else ""


def closing_mark(opened: str) -> str:
    """What ends the reasoning in a block that a prompt opened, where the template itself does not write it.

    As DeepSeek-R1 (`<think>` and a line break) and DeepSeek-V3.1 (`<think>` alone) write it.
    """
    match = _OPENED.fullmatch(opened)
    assert match is not None
    name, closer = next((name, closer) for name, closer in zip(match.groups(), _CLOSERS, strict=False) if name)
    mark = closer.format(name)
    return f"\n{mark}\n\n" if match[6] else mark


def without_empty_block(text: str, opened: str) -> str:
    """The text without a block of no reasoning at its beginning, or the end of one."""
    opening, closing = re.escape(opened.strip()), re.escape(closing_mark(opened).strip())
    return re.sub(rf"\A\s*(?:{opening})?\s*{closing}\s*", "", text)


def inline_reasoning(content: str) -> str:
    """The reasoning in a `<think>` block at the beginning of a text; empty if there is none."""
    match = _INLINE.fullmatch(content) if CLOSE in content else None
    return match[1].strip() if match else ""


def split_inline(message: Message, field: str) -> Message:
    """The message with a `<think>` block at its beginning as its reasoning."""
    text, reasoning = message["content"], message.get("reasoning", "")
    if any(mark in reasoning for mark in (OPEN, CLOSE)):
        what, do = f"contains {OPEN} or {CLOSE}, which the template writes itself", "remove the mark"
        raise RowError(f"{field}.reasoning", what, do, shown(reasoning))
    if CLOSE not in text:
        if text.lstrip().startswith(OPEN):
            do = f"write {CLOSE} and the answer, or remove the row: its end may have been cut off"
            raise RowError(f"{field}.content", f"opens a {OPEN} block and does not close it", do, shown(text))
        return message
    match = _INLINE.fullmatch(text)
    assert match is not None
    written, content = match[1].strip(), match[2].strip()
    if problem := _inline_problem(message, written, content):
        raise RowError(f"{field}.content", *problem, shown(text))
    split: Message = {**message, "content": content}
    if written:
        split["reasoning"] = written
    return split


def _inline_problem(message: Message, written: str, content: str) -> tuple[str, str] | None:
    """(what, do) of a block that is no reasoning before an answer."""
    if message.get("reasoning", written) != written:
        return f"has another {OPEN} block than its reasoning", "keep one of the two"
    if OPEN in content or CLOSE in content:
        return f"has more than one {OPEN} block", "keep the one before the answer"
    if OPEN in written:
        return f"has text before its {OPEN} block", "put the reasoning first"
    if not content and "tool_calls" not in message:
        return "has reasoning and no answer", f"remove the row, or write the answer after {CLOSE}"
    return None
