"""A conversation -> text, token ids and labels, through the tokenizer's chat template.

What is supervised is found by rendering prefixes, the way generation does it: the conversation up to an answer, with
the generation prompt, must be a prefix of the whole, as text and as token ids. The answer's tokens up to and with the
EOS are supervised; what the template writes after the EOS is not. No template needs `{% generation %}` marks, and one
for which this does not hold is refused.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from finetune.data.rows import RowError, shown
from finetune.data.types import Conversation, Message
from finetune.errors import DataError, Problem

IGNORED = -100
"""Label of a token that is not supervised; PyTorch's cross entropy leaves it out."""

ANOTHER_TEMPLATE = "name another one in data.chat_template"


@dataclass(frozen=True)
class Rendered:
    """One conversation: its text, `input_ids`, and `labels` of the same length, not shifted (`IGNORED`: no loss)."""

    text: str
    input_ids: list[int]
    labels: list[int]


class Renderer:
    """Renders conversations with the chat template of one fast tokenizer; `name` is what messages call the template.

    Text is tokenised without special tokens added, as `apply_chat_template` does at inference: the template alone
    decides whether there is a BOS, so there is never a second one.
    """

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer = tokenizer
        self._name = name
        self._control = self._control_tokens()
        self._check_template()

    def __call__(self, conversation: Conversation) -> Rendered:
        """Render one row; `RowError` if the template refuses it or the supervised tokens cannot be told for sure."""
        messages = conversation.messages
        self._check_contents(messages)
        text = self._text(messages)
        for index, message in enumerate(messages):
            if message["content"].strip() not in text:
                what = f"{self._name} drops or changes what the {message['role']} says"
                raise RowError(f"messages[{index}]", what, ANOTHER_TEMPLATE, shown(message["content"]))
        answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        prompts = [self._prompt(messages, index, text) for index in answers]
        ids, *prompts_ids = self._ids([text, *prompts])
        labels = [IGNORED] * len(ids)
        for index, prompt_ids in zip(answers, prompts_ids, strict=True):
            start, end = self._answer_tokens(index, ids, prompt_ids)
            labels[start:end] = ids[start:end]
        return Rendered(text, ids, labels)

    def _control_tokens(self) -> tuple[str, ...]:
        """The special tokens that frame a conversation: inside a content they would forge its frame."""
        tokenizer = self._tokenizer
        if not tokenizer.chat_template:
            do = "name one in data.chat_template: a shipped template or a .jinja file"
            raise DataError(Problem(where="data.chat_template", what="the tokenizer has no chat template", do=do))
        framing = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        return tuple(sorted(t for t in special if t in framing or t in tokenizer.chat_template))

    def _check_template(self) -> None:
        """Refuse a template that cannot work for any row, once and by its name."""
        probe = [Message(role="user", content="question?"), Message(role="assistant", content="answer!")]
        try:
            self(Conversation(probe))
        except RowError as error:
            where = "data.chat_template"
            raise DataError(Problem(where=where, what=error.what, do=error.do, got=error.got)) from error

    def _check_contents(self, conversation: list[Message]) -> None:
        for index, message in enumerate(conversation):
            for token in self._control:
                if token in message["content"]:
                    what = f"contains the control token {token}, which would be read as the conversation's frame"
                    got = shown(message["content"])
                    raise RowError(f"messages[{index}].content", what, "remove it or write it differently", got)

    def _text(self, conversation: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(conversation), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError) as error:
            do = f"change the row, or {ANOTHER_TEMPLATE}"
            got = str(error) or type(error).__name__
            raise RowError("messages", f"{self._name} refuses the conversation", do, got) from error
        return text

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: whether a row is too long is decided by the recipe, not by the tokenizer's own limit.
        ids: list[list[int]] = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _prompt(self, conversation: list[Message], index: int, text: str) -> str:
        """What generation would be given before answer `index`; checks that `text` goes on with answer and EOS."""
        field = f"messages[{index}]"
        prompt = self._text(conversation[:index], add_generation_prompt=True)
        until = self._text(conversation[: index + 1])
        if not text.startswith(prompt) or not text.startswith(until) or not until.startswith(prompt):
            what = f"{self._name} renders what comes before an answer differently once the answer is there"
            raise RowError(field, what, ANOTHER_TEMPLATE, shown(prompt[-60:]))
        answer, eos, rest = until[len(prompt) :].partition(self._tokenizer.eos_token)
        if not eos or rest.strip():
            what = f"{self._name} does not end an answer with the EOS token {self._tokenizer.eos_token}"
            do = f"{ANOTHER_TEMPLATE}: the model would never learn to stop"
            raise RowError(field, what, do, shown(until[len(prompt) :][-60:]))
        if answer.strip() != conversation[index]["content"].strip():
            what = f"{self._name} changes the answer or writes its own words into it"
            raise RowError(field, what, ANOTHER_TEMPLATE, shown(answer))
        return prompt

    def _answer_tokens(self, index: int, ids: list[int], prompt_ids: list[int]) -> tuple[int, int]:
        """First and past-the-last token of the answer that follows `prompt_ids`, its EOS included."""
        start = len(prompt_ids)
        if ids[:start] != prompt_ids:
            what = "a token straddles the border between prompt and answer, so generation would begin differently"
            do = f"remove the white space at the answer's beginning, or {ANOTHER_TEMPLATE}"
            straddling = next(i for i in range(start) if i >= len(ids) or ids[i] != prompt_ids[i])
            raise RowError(f"messages[{index}].content", what, do, shown(self._tokenizer.decode(ids[straddling])))
        # Contents cannot contain the EOS (checked above), so the next one is the answer's own end.
        return start, ids.index(self._tokenizer.eos_token_id, start) + 1
