"""`finetune export`: what other programs read holds exactly what was trained, and what they cannot serve is refused."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from finetune.checkpoint import write_sums
from finetune.checkpoint.reader import read_header
from finetune.cli.main import main
from finetune.errors import WeightsError
from finetune.export import export
from finetune.export.vllm import RANKS, SERVED
from finetune.moe.families import FAMILIES
from tests.families import CONFIGS, save_tiny
from tests.support import save_tiny_mistral, save_tiny_mixtral
from tests.unit.merge_adapters import EVERYTHING, EXPERTS, ROUTER, load, logits, save_adapter, tensors

PREFIX = "base_model.model."
IN_PEFT = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "ernie4_5_moe", "gpt_oss", "minimax_m2")
"""Architectures whose per-expert factors PEFT puts together again, and GPT-OSS, whose it need not."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


def served_adapter(base: Path, folder: Path, **changes: Any) -> Path:
    """An adapter with several ranks and scales on everything that vLLM serves of the base's architecture."""
    model_type = json.loads((base / "config.json").read_text())["model_type"]
    family, without = FAMILIES[model_type], SERVED[model_type].without
    assert family.moe is not None
    stacks = [f"{family.moe.experts_module}.{stack.parameter}" for stack in family.moe.stacks]
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": [name for name in family.attention if name.partition(".")[0] not in without],
        "target_parameters": [*stacks, family.moe.router_parameter],
        "rank_pattern": dict.fromkeys(stacks, 3),
        "alpha_pattern": {stacks[1]: 5},
    }
    return save_adapter(base, folder, **{**settings, **changes})


def change(folder: Path, name: str) -> torch.Tensor:
    """`scale B A` of one module of an exported folder, fp64."""
    settings, held = json.loads((folder / "adapter_config.json").read_text()), tensors(folder)
    a, b = (held[f"{PREFIX}{name}.lora_{factor}.weight"].double() for factor in "AB")
    product: torch.Tensor = b @ a * (settings["lora_alpha"] / settings["r"])
    return product


def refused(source: Path, message: str, tmp_path: Path, form: str = "vllm", **options: Any) -> None:
    """The export is refused with this line, and leaves nothing."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(WeightsError, match=message):
        export(source, tmp_path / "out", form, **options)
    assert sorted(tmp_path.iterdir()) == before


# vLLM: the factors of each expert


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_two_exports_are_the_same_bytes(base: Path, tmp_path: Path, form: str) -> None:
    adapter = served_adapter(base, tmp_path / "adapter")
    for name in ("one", "two"):
        export(adapter, tmp_path / name, form)
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert "adapter_model.safetensors" in one


@pytest.mark.parametrize("model_type", [name for name in CONFIGS if name in SERVED])
def test_the_factors_of_each_expert_make_the_change_of_the_adapter(model_type: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base")
    adapter = served_adapter(base, tmp_path / "adapter")
    export(adapter, tmp_path / "lora", "vllm")
    plain, merged = load(base), load(base, adapter).merge_and_unload()
    moe, rules = FAMILIES[model_type].moe, SERVED[model_type]
    assert moe is not None
    before, after, compared = plain.state_dict(), merged.state_dict(), 0
    for name, value in after.items():
        delta = (value - before[name]).double()
        if not delta.any():
            continue
        compared += 1
        for module, part in exported_parts(name, delta, moe, rules):
            assert (change(tmp_path / "lora", module) - part).abs().max() < 1e-6, module
    assert compared >= 3 * 2


def exported_parts(name: str, delta: torch.Tensor, moe: Any, rules: Any) -> Sequence[tuple[str, torch.Tensor]]:
    """The names that vLLM gives to what one parameter of the loaded model holds, and the change of each."""
    layer, _, rest = name.removesuffix(".weight").partition(".layers.")[2].partition(".")
    prefix = f"model.layers.{layer}."
    if rest == moe.router_parameter.removesuffix(".weight"):
        return [(prefix + (rules.router or moe.disk_router.removesuffix(".weight")), delta)]
    stack = next((each for each in moe.stacks if rest == f"{moe.experts_module}.{each.parameter}"), None)
    if stack is None or rules.stacked:
        return [(name.removesuffix(".weight"), delta)] if stack is None else []
    names = rules.names.get(stack.parameter, stack.disk_names)
    form = prefix + (rules.expert or moe.disk_expert.removesuffix(".weight"))
    return [
        (form.format(expert=number, name=each), part)
        for number, expert in enumerate(delta)
        for each, part in zip(names, expert.chunk(len(names)), strict=True)
    ]


@pytest.mark.parametrize("model_type", IN_PEFT)
def test_stock_peft_reads_the_folder_to_the_same_logits(model_type: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base")
    adapter = served_adapter(base, tmp_path / "adapter")
    export(adapter, tmp_path / "lora", "vllm")
    adapted = logits(load(base, adapter))
    assert (adapted - logits(load(base))).abs().max() > 0.1
    assert (logits(load(base, tmp_path / "lora")) - adapted).abs().max() < 2e-5 * adapted.abs().max()


def test_one_rank_and_one_scale_leave_the_factors_as_they_are(base: Path, adapter: Path, tmp_path: Path) -> None:
    export(adapter, tmp_path / "lora", "vllm")
    held, found = tensors(adapter), tensors(tmp_path / "lora")
    key = f"{PREFIX}model.layers.1.self_attn.q_proj.lora_B.weight"
    assert torch.equal(found[key], held[key])
    A_ErH = held[f"{PREFIX}model.layers.1.mlp.experts.base_layer.lora_A.weight"].reshape(4, 4, -1)
    for half in ("w1", "w3"):  # the halves of one stack: one A
        assert torch.equal(found[f"{PREFIX}model.layers.1.block_sparse_moe.experts.2.{half}.lora_A.weight"], A_ErH[2])
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize(
    "lora",
    [
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": dict.fromkeys(EXPERTS, 2), "alpha_pattern": {EXPERTS[1]: 5}},
        {"target_modules": ["q_proj"], "target_parameters": [EXPERTS[1]]},
        {"target_modules": ["q_proj"], "target_parameters": [EXPERTS[0], ROUTER]},
        {"target_modules": ["q_proj", "lm_head"], "target_parameters": []},
    ],
    ids=["rslora", "ranks and scales", "down_proj only", "gate_up_proj and router", "no experts"],
)
def test_every_kind_of_adapter_gives_the_same_logits(base: Path, tmp_path: Path, lora: dict[str, Any]) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **{**EVERYTHING, **lora})
    export(adapter, tmp_path / "lora", "vllm")
    settings = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert not any(settings[name] for name in ("rank_pattern", "alpha_pattern", "use_rslora"))
    adapted = logits(load(base, adapter))
    assert (adapted - logits(load(base))).abs().max() > 0.05
    assert (logits(load(base, tmp_path / "lora")) - adapted).abs().max() < 1e-4


@pytest.mark.parametrize("stack", EXPERTS)
def test_experts_of_which_one_stack_was_trained_have_zeros_for_the_other(
    base: Path, tmp_path: Path, stack: str
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", r=2, lora_alpha=2, target_parameters=[stack])
    export(adapter, tmp_path / "lora", "vllm")
    for expert in range(4):
        for name in ("w1", "w2", "w3"):  # vLLM needs the three of every expert
            trained = (name == "w2") == (stack == EXPERTS[1])
            delta = change(tmp_path / "lora", f"model.layers.0.block_sparse_moe.experts.{expert}.{name}")
            assert bool(delta.any()) == trained


def test_a_base_that_holds_stacks_as_the_loaded_model_does_gives_the_same_folder(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    load(base).save_pretrained(tmp_path / "stacks", save_original_format=False)
    record = json.loads((adapter / "finetune.json").read_text())
    del record["base"]["fingerprint"]
    export(adapter, tmp_path / "one", "vllm")
    copy = tmp_path / "copy"
    export(adapter, copy, "peft")
    (copy / "finetune.json").write_text(json.dumps(record))
    export(copy, tmp_path / "two", "vllm", base=tmp_path / "stacks")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_dense_model_is_served_too(tmp_path: Path) -> None:
    base = save_tiny_mistral(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    export(adapter, tmp_path / "lora", "vllm")
    assert torch.equal(logits(load(base, tmp_path / "lora")), logits(load(base, adapter)))


def test_a_16_bit_adapter_stays_one_unless_a_scale_is_multiplied_in(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    export(adapter, copy, "peft")
    save_file({key: value.bfloat16() for key, value in tensors(adapter).items()}, copy / "adapter_model.safetensors")
    export(copy, tmp_path / "lora", "vllm")
    assert {info.dtype for info in read_header(tmp_path / "lora" / "adapter_model.safetensors").values()} == {"BF16"}
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**settings, "alpha_pattern": {EXPERTS[0]: 3}}))
    export(copy, tmp_path / "folded", "vllm")
    assert {info.dtype for info in read_header(tmp_path / "folded" / "adapter_model.safetensors").values()} == {"F32"}


@pytest.mark.parametrize(("r", "wanted"), [(3, 8), (8, 8), (9, 16)])
def test_the_rank_to_serve_with_is_one_that_vllm_takes(base: Path, tmp_path: Path, r: int, wanted: int) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", r=r, lora_alpha=8, target_modules=["q_proj"])
    done = export(adapter, tmp_path / "lora", "vllm")
    assert f"--max-lora-rank {wanted} " in done.lines[-1]
    assert json.loads((tmp_path / "lora" / "export.json").read_text())["max_lora_rank"] == wanted


@pytest.mark.parametrize(("ends", "further"), [([2, 1], [1]), (2, []), (None, [])])
def test_ends_at_which_the_base_does_not_stop_are_said(
    base: Path, tmp_path: Path, ends: list[int] | int | None, further: list[int]
) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    if ends is not None:
        (adapter / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    done = export(adapter, tmp_path / "out", "vllm")
    assert [line for line in done.lines if "stop_token_ids" in line] == [
        "requests need stop_token_ids=[1]: answers end there, and the base does not stop at it"
    ] * len(further)
    assert ("| `stop_token_ids` of requests | [1] |" in (tmp_path / "out" / "README.md").read_text()) == bool(further)


@pytest.mark.parametrize("model_type", ["mixtral", "olmoe"])
def test_an_adapter_that_has_a_module_for_each_expert_already_is_taken_as_well(model_type: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base")
    export(served_adapter(base, tmp_path / "adapter"), tmp_path / "one", "vllm")
    export(tmp_path / "one", tmp_path / "two", "vllm", base=base)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_order_of_the_factors_can_be_said_as_to_the_merge(adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    export(adapter, copy, "peft")
    record = json.loads((copy / "finetune.json").read_text())
    del record["layout"]
    (copy / "finetune.json").write_text(json.dumps(record))
    for name in ("peft", "expert-major"):
        export(copy, tmp_path / name, "vllm", layout=name)
    one, two = tensors(tmp_path / "peft"), tensors(tmp_path / "expert-major")
    assert sum(not torch.equal(one[key], two[key]) for key in one) == 2 * 4 * 3  # every expert's B


# vLLM: refusals


def test_modules_that_were_trained_whole_are_refused(base: Path, tmp_path: Path) -> None:
    lora: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    adapter = save_adapter(base, tmp_path / "adapter", **lora, modules_to_save=["lm_head"])
    refused(adapter, "cannot serve modules that were trained whole; got lm_head.weight; merge it", tmp_path)


def test_factors_that_took_inputs_for_outputs_are_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    export(adapter, copy, "peft")
    held = tensors(adapter)
    for key in [key for key in held if ".experts." in key and "lora_A" in key]:
        partner = key.replace("lora_A", "lora_B")
        held[key], held[partner] = held[partner].T.contiguous(), held[key].T.contiguous()
    save_file(held, copy / "adapter_model.safetensors")
    settings = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**settings, "peft_version": "0.18.1"}))
    record = json.loads((copy / "finetune.json").read_text())
    del record["layout"]
    (copy / "finetune.json").write_text(json.dumps(record))
    refused(copy, "which swapped inputs and outputs; got .*; merge it", tmp_path)


def test_a_rank_beyond_vllms_largest_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", r=RANKS[-1] + 1, lora_alpha=8, target_modules=["q_proj"])
    refused(adapter, "serves ranks up to 512; got 513; merge it with `finetune merge`", tmp_path)


def test_what_vllm_folds_into_other_matrices_is_refused_by_name(tmp_path: Path) -> None:
    base = save_tiny("deepseek_v3", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", r=2, lora_alpha=2, target_modules=["kv_b_proj"])
    refused(adapter, r"cannot serve factors of model.layers.0.self_attn.kv_b_proj: .*; merge it", tmp_path)


def test_an_architecture_that_vllm_is_not_known_to_serve_is_refused(tmp_path: Path) -> None:
    base = save_tiny("flex_olmo", tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "adapter", r=2, lora_alpha=2, target_modules=["q_proj"])
    refused(adapter, "no code of its own for flex_olmo", tmp_path)


def test_rows_of_added_tokens_and_moved_biases_are_refused_together(tmp_path: Path) -> None:
    base = save_tiny("deepseek_v3", tmp_path / "base")
    lora: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": ["o_proj"]}
    adapter = save_adapter(base, tmp_path / "adapter", **lora, trainable_token_indices={"embed_tokens": [5]})
    (adapter / "router_bias.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(WeightsError) as error:
        export(adapter, tmp_path / "out", "vllm")
    assert "rows of added tokens" in str(error.value)
    assert "correction biases" in str(error.value)


def test_another_base_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = save_tiny_mixtral(tmp_path / "other", seed=1)
    refused(adapter, "base fingerprint differs", tmp_path, base=other)


# PEFT: as it was saved


def test_the_adapter_for_peft_is_a_whole_copy_that_peft_reads(base: Path, adapter: Path, tmp_path: Path) -> None:
    done = export(adapter, tmp_path / "copy", "peft")
    names = {path.name for path in adapter.iterdir()}
    assert {path.name for path in (tmp_path / "copy").iterdir()} == names
    assert all((tmp_path / "copy" / name).read_bytes() == (adapter / name).read_bytes() for name in names)
    assert "adapter_config.json, adapter_model.safetensors, finetune.json" in done.lines[0]
    assert torch.equal(logits(load(base, tmp_path / "copy")), logits(load(base, adapter)))


def test_an_adapter_that_does_not_say_its_base_is_not_whole(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", record=False)
    refused(adapter, "does not record its base", tmp_path, "peft")


def test_a_pickle_beside_the_adapter_is_not_handed_on(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    (adapter / "optimizer.pt").write_bytes(b"")
    refused(adapter, "holds pickle files; got optimizer.pt", tmp_path, "peft")


def test_factors_that_are_not_finite_are_not_handed_on(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    held = tensors(adapter)
    next(iter(held.values()))[0, 0] = float("nan")
    save_file(held, adapter / "adapter_model.safetensors")
    refused(adapter, "not finite", tmp_path, "peft")


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_an_adapter_that_changed_since_it_was_written_is_not_handed_on(base: Path, tmp_path: Path, form: str) -> None:
    adapter = save_adapter(base, tmp_path / "adapter")
    write_sums(adapter)
    with (adapter / "adapter_model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    refused(adapter, "differs from its sum in SHA256SUMS", tmp_path, form)


# The command


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_a_folder_that_is_no_adapter_is_refused(base: Path, tmp_path: Path, form: str) -> None:
    refused(base, "is a full model, and this format is for adapters", tmp_path, form)
    refused(tmp_path, "is not an adapter folder", tmp_path, form)


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_an_output_that_exists_is_left_alone(adapter: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    refused(adapter, "output folder is not empty", tmp_path, form)


def test_a_number_format_is_for_gguf_only(adapter: Path, tmp_path: Path) -> None:
    refused(adapter, "applies to GGUF only", tmp_path, outtype="f16")


def test_an_unknown_format_is_refused(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", str(adapter), "--format", "onnx", "--output", str(tmp_path / "out")])
    assert "invalid choice: 'onnx'" in capsys.readouterr().err


def test_the_command_says_what_it_wrote_and_how_to_serve_it(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(adapter), "--format", "vllm", "--output", str(tmp_path / "lora")]) == 0
    said = capsys.readouterr().out
    assert f"written: {tmp_path / 'lora'}" in said
    assert "vllm serve BASE --enable-lora --max-lora-rank 8" in said
    assert os.listdir(tmp_path) == ["lora"]
