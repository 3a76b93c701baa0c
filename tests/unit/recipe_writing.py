"""A sound recipe as text, and a way to read the complaints about a changed one."""

from pathlib import Path

import pytest

from finetune.errors import RecipeError
from finetune.recipe import Recipe, load_recipe

SOUND = """\
output_dir: runs/test
model:
  name_or_path: some/model
  load_in_4bit: true
  dtype: float32
lora:
  targets: [attention, experts]
  r: 8
  lora_alpha: 16
router:
  router_aux_loss_coef: 0.02
method:
  kind: sft
data:
  train: {path: rows.jsonl, format: messages}
  max_length: 256
training:
  max_steps: 30
  learning_rate: 1e-3
  global_batch_size: 16
"""


def changed(*edits: tuple[str, str], after: str = "") -> str:
    """SOUND with each (old, new) replaced exactly once, and lines added `after` it."""
    text = SOUND
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text + after


class RecipeFile:
    """A folder with one `recipe.yaml`, spoken of by its bare name as a user in that folder would."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(folder)
        self.path = Path("recipe.yaml")

    def load(self, text: str, *overrides: str) -> Recipe:
        """Write and load."""
        self.path.write_text(text, encoding="utf-8")
        return load_recipe(self.path, overrides)

    def problems(self, text: str, *overrides: str) -> list[str]:
        """The lines of the one error that loading raises."""
        with pytest.raises(RecipeError) as caught:
            self.load(text, *overrides)
        assert caught.value.exit_code == 2
        lines = str(caught.value).split("\n")
        assert len(lines) == len(caught.value.problems), "each problem is one line"
        return lines
