"""What `merge` refuses before it writes anything, and what the message says."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.errors import DiskError, WeightsError
from finetune.merge import merge
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import EVERYTHING, save_adapter

Tensors = dict[str, torch.Tensor]
STACK = "base_model.model.model.layers.0.mlp.experts"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def sound(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(sound, tmp_path / "adapter")


def refused(adapter: Path, message: str, base: Path | None = None) -> None:
    before = sorted(adapter.parent.iterdir())
    with pytest.raises((WeightsError, DiskError), match=message):
        merge(adapter, adapter.parent / "out", base=base, show_progress=False)
    assert sorted(adapter.parent.iterdir()) == before


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def respell(adapter: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file({key: value.clone() for key, value in change(load_file(file)).items()}, file)


def without(*keys: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: value for key, value in tensors.items() if key not in keys}


def test_a_base_with_another_fingerprint(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = save_tiny_mixtral(tmp_path / "other", seed=1)
    refused(
        adapter, r"base fingerprint differs; got \w{12} where the adapter records \w{12}; give the base", base=other
    )
    moved = shutil.copytree(base, tmp_path / "moved")
    edit(
        adapter / "finetune.json",
        base={**json.loads((adapter / "finetune.json").read_text())["base"], "name_or_path": "gone"},
    )
    refused(adapter, r"finetune.json: the recorded base is not on this machine; got gone; name the folder .* --base")
    merge(adapter, tmp_path / "out", base=moved, show_progress=False)


def test_no_record_of_the_base(adapter: Path, base: Path, tmp_path: Path) -> None:
    (adapter / "finetune.json").unlink()
    refused(adapter, r"does not record its base \(finetune.json\); name the base checkpoint with --base")
    report = merge(adapter, tmp_path / "out", base=base, show_progress=False)
    assert not report.adapters[0]["base_recorded"]
    assert "not recorded by the adapter" in report.table()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: (
                t | {f"{Q_PROJ.replace('.0.', '.7.')}.lora_{x}.weight": t[f"{Q_PROJ}.lora_{x}.weight"] for x in "AB"}
            ),
            r"tensor matches nothing in the base; got base_model.model.model.layers.7.self_attn.q_proj; merge into",
        ),
        (without(f"{STACK}.lora_B.weight"), "model.layers.0.mlp.experts has no lora_B; got only lora_A"),
        (
            without(f"{Q_PROJ}.lora_A.weight", f"{Q_PROJ}.lora_B.weight"),
            "has no factors for model.layers.0.self_attn.q_proj, which its settings name",
        ),
        (
            without(f"{STACK}.base_layer.lora_A.weight", f"{STACK}.base_layer.lora_B.weight"),
            "has no factors for model.layers.0.mlp.experts.gate_up_proj, which its settings name",
        ),
        (
            lambda t: (
                t | {f"{Q_PROJ}.lora_A.weight": torch.zeros(2, 64), f"{Q_PROJ}.lora_B.weight": torch.zeros(64, 2)}
            ),
            r"shape or rank does not fit; got A \[2, 64\] and B \[64, 2\]; A \[4, 64\] and B \[64, 4\] fit r=4 ",
        ),
        (
            lambda t: t | {f"{STACK}.lora_A.weight": torch.zeros(16, 95)},
            r"mlp.experts: shape or rank does not fit; got A \[16, 95\]",
        ),
        (
            lambda t: t | {"base_model.model.model.norm.weight": torch.zeros(2, 2)},
            "tensor is not a LoRA factor; got base_model",
        ),
        (
            lambda t: t | {f"{Q_PROJ}.lora_A.weight": torch.zeros(4)},
            r"factor is not a floating-point matrix; got F32\[4\]",
        ),
        (lambda t: {}, "holds no LoRA tensors"),
    ],
)
def test_factors_that_do_not_fit(adapter: Path, change: Callable[[Tensors], Tensors], message: str) -> None:
    respell(adapter, change)
    refused(adapter, message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: adapter is not LoRA; got IA3"),
        ({"use_dora": True}, "use_dora: setting is not supported by the merge; got true"),
        ({"bias": "all"}, 'bias: setting is not supported by the merge; got "all"'),
        (
            {"modules_to_save": ["lm_head"]},
            "has no tensors of lm_head, which its settings name; save the",
        ),
        ({"modules_to_save": "lm_head"}, 'modules_to_save: must be a list of names of modules; got "lm_head"'),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: this initialisation changes the base weights; got pissa"),
        ({"r": None}, "r: missing or not a number; got None"),
        ({"r": 8}, "shape or rank does not fit"),
    ],
)
def test_settings_that_change_what_the_adapter_computes(adapter: Path, settings: dict[str, Any], message: str) -> None:
    edit(adapter / "adapter_config.json", **settings)
    refused(adapter, message)


def test_an_adapter_in_pickle_format_or_none_at_all(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    refused(adapter, r"the adapter is in pickle format; got adapter_model.bin; save it again as safetensors")
    (adapter / "adapter_model.bin").unlink()
    refused(adapter, r"has no adapter_model.safetensors")
    (adapter / "adapter_config.json").unlink()
    refused(adapter, r"is not an adapter folder: it has no adapter_config.json")


def test_an_expert_layout_of_another_version(adapter: Path) -> None:
    edit(adapter / "finetune.json", layout={"expert_lora": "A:rank-major,B:rank-major"})
    refused(adapter, "unknown order of the experts' factors; got A:rank-major,B:rank-major")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "gpt2"}, "got gpt2; use one of: deepseek_v2, "),
        ({"quantization_config": {"bits": 4}}, "the checkpoint is already quantised; .* give the 16-bit checkpoint"),
        ({"vocab_size": 100}, r"mismatched_keys; got lm_head.weight is \[512, 64\], must be \[100, 64\]"),
    ],
)
def test_a_base_of_another_kind(
    adapter: Path, base: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    edit(other / "config.json", **settings)
    refused(adapter, message, base=other)


def test_a_tokenizer_with_more_tokens_than_the_model(tmp_path: Path) -> None:
    small = save_tiny_mixtral(tmp_path / "small", vocab_size=100)
    refused(save_adapter(small, tmp_path / "adapter"), r"outside the model's vocabulary; got id \d+ for 100 entries")


def test_a_base_without_tokenizer(adapter: Path, base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(base, tmp_path / "other", ignore=shutil.ignore_patterns("tokenizer*"))
    refused(adapter, "has no tokenizer; the base folder needs its tokenizer files", base=other)


def test_an_output_folder_that_is_not_empty(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    refused(adapter, "output folder is not empty; got mine.txt; name a new folder")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_too_little_disk(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(adapter)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    refused(adapter, r"out: there is not enough space on the disk: .* KiB are needed; got 97.66 KiB free; free space")


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), None), (float("inf"), None), (1e6, "float16")])
def test_a_result_that_is_not_finite(adapter: Path, tmp_path: Path, value: float, dtype: str | None) -> None:
    def spoil(tensors: Tensors) -> Tensors:
        tensors[f"{Q_PROJ}.lora_B.weight"][5, 1] = value
        return tensors

    respell(adapter, spoil)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(WeightsError, match=r"model.layers.0.self_attn.q_proj.weight: merged tensor is not finite"):
        merge(adapter, tmp_path / "out", dtype=dtype, show_progress=False)
    assert sorted(tmp_path.iterdir()) == before


def test_a_target_that_peft_would_match_only_in_part(base: Path, tmp_path: Path) -> None:
    lora = {**EVERYTHING, "target_modules": ["layers.1.self_attn.q_proj"], "target_parameters": None}
    folder = save_adapter(base, tmp_path / "adapter", **lora)
    edit(folder / "adapter_config.json", target_modules=["q_proj"])
    refused(folder, "has no factors for model.layers.0.self_attn.q_proj")


def test_an_adapter_is_not_added_to_one_that_went_on_from_it(adapter: Path, base: Path, tmp_path: Path) -> None:
    later = save_adapter(base, tmp_path / "later", b_std=0.04)
    report = merge(adapter, tmp_path / "first", show_progress=False)
    edit(later / "finetune.json", adapter={"name_or_path": "x", "sha256": report.adapters[0]["sha256"]})
    message = "continues another of the adapters and already contains its change; got .*; name only the later one"
    with pytest.raises(WeightsError, match=message):
        merge([adapter, later], tmp_path / "out", show_progress=False)


def test_a_trainers_checkpoint_with_moved_biases(adapter: Path, tmp_path: Path) -> None:
    (adapter / "trainer_state.json").write_text("{}")
    (adapter / "router_balance.json").write_text(json.dumps({"frequency": [[1.0]], "bias": {"x": [1.0]}}))
    with pytest.raises(WeightsError, match="is a state of training, and its moved router biases are not among the fac"):
        merge(adapter, tmp_path / "out", show_progress=False)


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("adapter_config.json", {"rank_pattern": {"q_proj": "x"}}),
        ("adapter_config.json", {"rank_pattern": ["q_proj"]}),
        ("adapter_config.json", {"alpha_pattern": {"q_proj": None}}),
        ("adapter_config.json", {"target_modules": 3}),
        ("adapter_config.json", {"trainable_token_indices": "abc"}),
        ("adapter_config.json", {"lora_alpha": float("nan")}),
        ("finetune.json", {"base": "x"}),
        ("finetune.json", {"base": {"name_or_path": 5}}),
        ("finetune.json", {"layout": "x"}),
        ("finetune.json", {"added_tokens": {"a": "b"}}),
        ("finetune.json", {"recipe": {"method": None}}),
    ],
)
def test_values_of_a_wrong_type_are_refused(
    adapter: Path, base: Path, tmp_path: Path, file: str, values: dict[str, Any]
) -> None:
    edit(adapter / file, **values)
    where = next(iter(values))
    with pytest.raises(
        WeightsError, match=rf"{file}: {where}.*has the wrong type \(expected .*\); got .*; fetch or copy"
    ):
        merge(adapter, tmp_path / "out", base=base, show_progress=False)


def test_a_tokenizer_that_is_none(adapter: Path, base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match=r"base: no tokenizer could be loaded; got .*; give the folder"):
        merge(adapter, tmp_path / "out", base=copy, show_progress=False)
