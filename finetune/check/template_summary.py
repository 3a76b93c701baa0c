"""What a chat template puts around an answer: what opens and ends it, and which of its words the model must write."""

from dataclasses import dataclass
from typing import Any

from finetune.check.samples import Piece, shown
from finetune.data.render import ChatTemplate, Renderer, System
from finetune.data.types import Conversation, Message

Fields = list[tuple[str, str]]

_QUESTION, _ANSWER = "What is 2+2?", "It is four!"


@dataclass(frozen=True)
class TemplateSummary:
    """The texts around an answer, as the template writes them in one question and its answer.

    `opens`: the generation prompt, which is not supervised. `header`: what the model must write before the answer's
    text, and `ends` behind it: both supervised. `rest`: what the template writes after that, not supervised.
    """

    name: str
    opens: str
    header: str
    ends: str
    rest: str

    def fields(self) -> Fields:
        """As they are printed."""
        optional = [
            ("header", f"{visible(self.header)} (supervised: the model writes it before the answer)", self.header),
            ("after", f"{visible(self.rest)} (not supervised)", self.rest),
        ]
        return [
            ("opens", f"{visible(self.opens)} (not supervised: the generation prompt ends with it)"),
            *((name, value) for name, value, text in optional[:1] if text),
            ("ends", f"{visible(self.ends)} (supervised)"),
            *((name, value) for name, value, text in optional[1:] if text),
        ]


def visible(text: str) -> str:
    """A text on one line: line ends, spaces at its borders and control characters are shown."""
    return shown([Piece(text, (), False)])[0].replace("\n", "")


def summarise(tokenizer: Any, name: str, system: System = "error") -> TemplateSummary:
    """The summary of the tokenizer's chat template; `DataError` for a template that cannot work for any row."""
    question, answer = Message(role="user", content=_QUESTION), Message(role="assistant", content=_ANSWER)
    chat = ChatTemplate(tokenizer, name, system)
    rendering = Renderer(tokenizer, name, "assistant", system).render(Conversation([question, answer]))
    [place] = rendering.answers
    header, _, ends = rendering.text[place.start : place.end].partition(_ANSWER)
    return TemplateSummary(name, _generation_prompt(chat, question), header, ends, rendering.text[place.end :])


def _generation_prompt(chat: ChatTemplate, question: Message) -> str:
    """What the template adds to make the model answer; what follows the question where it adds nothing."""
    prompt = chat.text([question], generation=True)
    without = chat.text([question])
    added = prompt.removeprefix(without) if prompt.startswith(without) else ""
    return added or prompt.rpartition(question["content"])[2]
