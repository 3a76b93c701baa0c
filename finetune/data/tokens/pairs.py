"""Two answers to one prompt, as tokens."""

from dataclasses import dataclass

from finetune.data.render.rendering import Ints


@dataclass(frozen=True, slots=True)
class TokenPair:
    """One pair, int32 throughout. A whole conversation is `prompt_ids` and then one answer.

    `prompt_ids` are what generation is given: the same for both answers, at least one token, none of them supervised.
    `chosen_labels` and `rejected_labels` are as long as their ids: the id where the token is supervised, else -100 (a
    tool's result between two turns, say), NOT shifted; each has at least one supervised token. `row` is `file:line`.
    """

    prompt_ids: Ints
    chosen_ids: Ints
    chosen_labels: Ints
    rejected_ids: Ints
    rejected_labels: Ints
    row: str

    @property
    def answers(self) -> tuple[tuple[Ints, Ints], tuple[Ints, Ints]]:
        """(ids, labels) of the chosen and of the rejected answer."""
        return (self.chosen_ids, self.chosen_labels), (self.rejected_ids, self.rejected_labels)
