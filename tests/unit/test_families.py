"""The table of architectures: who is supported, how far, who is refused and why, all before a weight is read."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from finetune.base import checkpoint_family
from finetune.errors import FinetuneError, WeightsError
from finetune.moe.families import FAMILIES, REFUSED, WITHOUT_CODE, families_table, family_of
from tests.families import CONFIGS, save_tiny
from tests.support import save_tiny_mixtral
from tests.unit.test_model import recipe_for


def complaint(folder: Path, **sections: dict[str, Any]) -> str:
    """What is said of the checkpoint in `folder` under a recipe with these changes; its weights are taken away."""
    (folder / "model.safetensors").rename(folder / "kept")
    header = (folder / "kept").read_bytes()
    length = 8 + int.from_bytes(header[:8], "little")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header[:length])
        file.truncate(len(header))
    recipe = recipe_for(folder)
    changed = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    with pytest.raises(FinetuneError) as caught:
        checkpoint_family(folder, recipe.model_copy(update=changed))
    return str(caught.value)


def refusal(folder: Path, model_type: str) -> str:
    """What a user reads who gives a checkpoint of this type; its weights are not there to be read."""
    path = save_tiny_mixtral(folder) / "config.json"
    (folder / "model.safetensors").unlink()  # told of its files first, a user would fetch others in vain
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


NO_CODE = "transformers has no code for it; code that comes with a checkpoint (trust_remote_code) is never run here"
MULTIMODAL = "a model of text with images, video or sound; only models of text alone are trained here"


def refused_name(model_type: str) -> str:
    with pytest.raises(WeightsError) as caught:
        family_of(model_type, "config.json")
    return str(caught.value).removesuffix(f"use one of: {', '.join(sorted(FAMILIES))}")


@pytest.mark.parametrize("model_type", sorted(WITHOUT_CODE))
def test_a_published_name_without_code_in_transformers_is_refused_by_name(model_type: str) -> None:
    assert model_type not in CONFIG_MAPPING
    model = WITHOUT_CODE[model_type]
    assert refused_name(model_type) == f"config.json: {model_type} is not supported: {model}; {NO_CODE}; "


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        *((name, MULTIMODAL) for name in ("llava", "mllama", "qwen2_vl", "qwen3_vl_moe", "mistral3", "qwen2_audio")),
        *((name, NO_CODE) for name in ("llama_moe", "minimax_m7", "qwen9_moe", "llama-vision")),
    ],
)
def test_an_architecture_that_resembles_a_supported_one_is_no_misspelling(model_type: str, reason: str) -> None:
    assert refused_name(model_type) == f"config.json: {model_type} is not supported: {reason}; "


@pytest.mark.parametrize(
    ("written", "meant"),
    [("mixtrall", "mixtral"), ("qwen3moe", "qwen3_moe"), ("deepseek-v3", "deepseek_v3"), ("Mistral", "mistral")],
)
def test_a_misspelt_architecture_is_recognised(written: str, meant: str) -> None:
    assert f"got {written}; did you mean {meant}? " in refused_name(written)


def test_an_architecture_of_transformers_that_the_table_lacks_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path, "bamba").startswith(
        f"{tmp_path}/config.json: architecture is not supported: nothing says where its experts and router are, and "
        "how they are stored; got bamba; use one of: deepseek_v2, deepseek_v3, "
    )


def test_what_is_refused_is_the_name_of_an_architecture_that_transformers_knows() -> None:
    assert set(REFUSED) <= set(CONFIG_MAPPING)
    assert not set(REFUSED) & set(FAMILIES)


def test_attention_code_that_an_architecture_lacks(tmp_path: Path) -> None:
    folder = save_tiny("gpt_oss", tmp_path)
    assert complaint(folder) == ("model.attn_implementation: gpt_oss has no such attention code; got sdpa; write eager")


def test_rows_are_not_packed_where_they_would_see_each_other(tmp_path: Path) -> None:
    assert complaint(save_tiny("jamba", tmp_path), data={"packing": True}) == (
        "data.packing: rows of jamba cannot be packed: its recurrent layers carry their state from one row into the "
        "next; got true; write packing: false"
    )


@pytest.mark.parametrize(
    ("model_type", "overrides", "target"),
    [
        ("qwen3_moe", {"mlp_only_layers": []}, "mlp"),
        ("granitemoeshared", {"shared_intermediate_size": 0}, "shared_experts"),
    ],
)
def test_a_part_that_this_checkpoint_lacks_though_its_architecture_has_it(
    model_type: str, overrides: dict[str, Any], target: str, tmp_path: Path
) -> None:
    folder = save_tiny(model_type, tmp_path, **overrides)
    found = complaint(folder, lora={"targets": ["attention", target]})
    what = f"this checkpoint has no {target}, though other models of type {model_type} may have"
    assert found.startswith(f"lora.targets: {what}; got {target}; remove it, or use experts or router")


def test_a_part_that_the_architecture_lacks(tmp_path: Path) -> None:
    assert complaint(save_tiny("olmoe", tmp_path), lora={"targets": ["shared_experts"]}) == (
        "lora.targets: olmoe has no shared_experts; got shared_experts; "
        "remove it, or use attention or experts or router"
    )


def test_the_listing_is_the_table() -> None:
    lines = families_table().splitlines()
    for name, family in FAMILIES.items():
        if family.moe is not None:
            (row,) = (line for line in lines if line.split()[:1] == [name])
            assert row.endswith(", ".join(family.targets))
        assert {f"  {name}: {limit}" for limit in family.limits} <= set(lines)
    assert {f"  {name}: {reason}" for name, reason in REFUSED.items()} <= set(lines)
    assert any(line.startswith("gpt_oss           one tensor a layer, transposed, biases  softmax ") for line in lines)
    assert "  gpt_oss: model.attn_implementation must be eager" in lines
    assert any(line.startswith("  jamba: data.packing must be false") for line in lines)


def test_the_listing_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from finetune.cli.main import main; main(['families']); "
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == families_table() + "\n"
