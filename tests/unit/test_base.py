"""The base is read once in a start: one preflight and one look into the table of families, then the record is used."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.base import read_base
from finetune.checkpoint import fingerprint
from finetune.moe.families import family_of
from finetune.moe.preflight import check_loadable
from finetune.recipe import Recipe
from finetune.train import train
from tests.equivalence.dpo_runs import dpo_recipe, write_pairs
from tests.equivalence.sft_runs import recipe as sft_recipe
from tests.equivalence.sft_runs import write_rows
from tests.support import CHATML, save_tiny_mixtral
from tests.unit.added_tokens import MARKS, NEW, base_of, recipe_for

COUNTED: dict[str, Callable[..., Any]] = {"family_of": family_of, "check_loadable": check_loadable}


def count_calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of the two functions, from whichever module of the package."""
    calls: Counter[str] = Counter()

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return counted

    modules = [module for name, module in sys.modules.items() if name.startswith("finetune.")]
    for name, function in COUNTED.items():
        wrapper = counting(name, function)
        for module in modules:
            if getattr(module, name, None) is function:
                monkeypatch.setattr(module, name, wrapper)
    return calls


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_a_start_reads_the_base_once(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, out = save_tiny_mixtral(tmp_path / "base"), tmp_path / "run"
    recipe: Recipe = (
        sft_recipe(base, write_rows(tmp_path / "rows.jsonl", 8), out, max_steps=1)
        if method == "sft"
        else dpo_recipe(base, write_pairs(tmp_path / "pairs.jsonl", 8), out, max_steps=1)
    )
    calls = count_calls(monkeypatch)
    train(recipe, ["test"])
    assert calls == {"family_of": 1, "check_loadable": 1}
    assert (out / "adapter" / "adapter_model.safetensors").is_file()


def test_the_record_of_a_base(tmp_path: Path) -> None:
    folder = base_of(tmp_path / "base", "untied")
    base = read_base(recipe_for(folder, tmp_path / "turns.jinja"))
    assert (base.folder, base.family.model_type, base.config.num_local_experts) == (folder, "mixtral", 4)
    assert base.new_tokens == tuple(NEW)
    assert base.tokenizer.convert_tokens_to_ids(MARKS) == NEW
    assert base.tokenizer.chat_template != CHATML, "the recipe's"
    record = base.provenance.as_dict()
    config = record.pop("config")
    assert record == {"name_or_path": str(folder), "fingerprint": fingerprint(folder)}
    assert (config["num_experts_per_tok"], config["rms_norm_eps"]) == (2, 1e-5)
