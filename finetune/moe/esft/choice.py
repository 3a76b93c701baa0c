"""The choice of experts to adapt in each layer, and the scores behind it (ESFT, arXiv 2407.01906).

L layers, E experts.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from finetune.errors import Problem, RunError
from finetune.files import write_json

SCORES = {"gate": "of the router weight", "token": "of the tokens' choices"}


@dataclass(frozen=True)
class LayerChoice:
    """One decoder layer, by its path in the model. `scores`: each expert's share, together 1; `experts`: ascending."""

    layer: str
    scores: tuple[float, ...]
    experts: tuple[int, ...]

    @property
    def share(self) -> float:
        """The adapted experts' share of the layer's score."""
        return sum(self.scores[expert] for expert in self.experts)


@dataclass(frozen=True)
class ExpertChoice:
    """The choice of a run. `share` as requested; `rows` and `tokens` as measured; layers in the model's order."""

    score: str
    share: float
    rows: int
    tokens: int
    layers: tuple[LayerChoice, ...]

    @property
    def experts(self) -> dict[str, tuple[int, ...]]:
        """Adapted experts by layer path."""
        return {layer.layer: layer.experts for layer in self.layers}

    @property
    def adapted(self) -> float:
        """Share of all expert parameters that are adapted; experts of one model are of one size."""
        return sum(len(layer.experts) for layer in self.layers) / sum(len(layer.scores) for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `reached` and `adapted` are informative and not read back."""
        layers = [{**asdict(layer), "reached": layer.share} for layer in self.layers]
        return {**asdict(self), "adapted": self.adapted, "layers": layers}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ExpertChoice":
        """The inverse of `as_dict`; raises ValueError, TypeError or KeyError for anything else."""
        layers = tuple(
            LayerChoice(str(layer["layer"]), tuple(map(float, layer["scores"])), tuple(map(int, layer["experts"])))
            for layer in values["layers"]
        )
        choice = cls(str(values["score"]), float(values["share"]), int(values["rows"]), int(values["tokens"]), layers)
        if choice.score not in SCORES or not layers or not all(_is_sound(layer) for layer in layers):
            raise ValueError("an unknown score, layer or expert")
        return choice

    def lines(self) -> list[str]:
        """The printed summary: one line per layer, and a total."""
        chosen = sum(len(layer.experts) for layer in self.layers)
        total = sum(len(layer.scores) for layer in self.layers)
        return [
            *(
                f"layer {layer.layer.rpartition('.')[2]}: {len(layer.experts)} of {len(layer.scores)} experts, "
                f"{100 * layer.share:.1f} % {SCORES[self.score]}"
                for layer in self.layers
            ),
            f"adapted: {chosen} of {total} experts, {100 * self.adapted:.1f} % of the experts' parameters "
            f"(measured on {self.tokens:,} tokens of {self.rows:,} rows)",
        ]

    def write(self, path: Path) -> None:
        """Write as JSON, in one step."""
        write_json(path, self.as_dict())


def read_choice(path: Path) -> ExpertChoice:
    """Read the choice written by a run; RunError if it is missing or invalid."""
    do = "start anew in another output_dir: experts that are measured again may be others"
    if not path.is_file():
        raise RunError(Problem(str(path), "the run that is to be continued has no choice of experts", do))
    try:
        return ExpertChoice.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError) as error:
        got = str(error) if type(error) is ValueError else repr(error)
        raise RunError(Problem(str(path), "not a choice of experts", do, got=got)) from error


def _is_sound(layer: LayerChoice) -> bool:
    """At least one expert, ascending, each with a score."""
    return list(layer.experts) == sorted(set(layer.experts) & set(range(len(layer.scores)))) != []


def smallest_set(scores_E: Sequence[int], share: float) -> tuple[int, ...]:
    """The fewest experts, by descending score, whose scores add up to at least `share` of the total; ascending.

    Exact: the scores are integers and the share is the decimal number in the recipe. Of equal scores the lower expert
    comes first.
    """
    wanted = Fraction(repr(share)) * sum(scores_E)
    reached, chosen = 0, []
    for expert in sorted(range(len(scores_E)), key=lambda expert: -scores_E[expert]):
        chosen.append(expert)
        reached += scores_E[expert]
        if reached >= wanted:
            break
    return tuple(sorted(chosen))
