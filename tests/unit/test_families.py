"""The table of architectures: who is supported, who is refused and why, and what is told of a name that is neither."""

import json
from pathlib import Path

import pytest

from finetune.errors import WeightsError
from finetune.model import checkpoint_family
from finetune.moe.families import FAMILIES, REFUSED, family_of
from tests.families import CONFIGS
from tests.support import save_tiny_mixtral
from tests.unit.test_model import recipe_for


def refusal(folder: Path, model_type: str) -> str:
    """What a user reads who gives a checkpoint of this type; its weights are not there to be read."""
    path = save_tiny_mixtral(folder) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": model_type}))
    with pytest.raises(WeightsError) as caught:
        checkpoint_family(folder, recipe_for(folder))
    return str(caught.value)


def test_every_mixture_of_experts_of_the_table_is_tested() -> None:
    assert set(CONFIGS) == {name for name, family in FAMILIES.items() if family.moe is not None}


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_what_cannot_be_supported_is_refused_by_name_with_the_reason(model_type: str, tmp_path: Path) -> None:
    found = refusal(tmp_path, model_type)
    assert found.startswith(f"{tmp_path}/config.json: {model_type} is not supported: ")
    assert REFUSED[model_type] in found
    assert "use one of: deepseek_v2, " in found


def test_an_unknown_architecture_is_refused_and_a_misspelt_one_recognised(tmp_path: Path) -> None:
    assert refusal(tmp_path, "switchboard").startswith(
        f"{tmp_path}/config.json: architecture is not supported: nothing says where its experts and router are, and "
        "how they are stored; got switchboard; use one of: deepseek_v2, deepseek_v3, "
    )
    with pytest.raises(WeightsError, match=r"got qwen3moe; did you mean qwen3_moe\? use one of: deepseek_v2"):
        family_of("qwen3moe", "config.json")
