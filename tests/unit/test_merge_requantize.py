"""`--requantize nf4`: the merged model in 4 bits, which loads as it is, and what rounding cost."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.checkpoint import CheckpointReader, fingerprint
from finetune.errors import FinetuneError, WeightsError
from finetune.evaluate import evaluate
from finetune.merge import merge
from finetune.merge.matrices import quantize
from finetune.merge.report import Nf4Figures
from finetune.merge.requantize import judge_nf4
from finetune.moe import quantizer
from finetune.moe.nf4 import Nf4Stack
from finetune.moe.stored import StoredReader
from finetune.train import train
from tests.equivalence.sft_runs import recipe, write_rows
from tests.families import CONFIGS, save_tiny
from tests.support import save_tiny_mixtral
from tests.unit.engine import base_model
from tests.unit.four_bits import adapter_in_4_bits, loaded_in_4_bits, seen_weights
from tests.unit.merge_adapters import load, logits, tensors

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"), dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_in_4_bits(base, tmp_path_factory.mktemp("adapter") / "adapter")


@pytest.fixture(scope="module")
def sixteen(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The merged model in 16 bits."""
    folder = tmp_path_factory.mktemp("sixteen") / "out"
    merge(adapter, folder, show_progress=False)
    return folder


@pytest.fixture(scope="module")
def four(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in NF4."""
    folder = tmp_path_factory.mktemp("four") / "out"
    merge(adapter, folder, requantize=True, show_progress=False)
    return folder


def stored_bits(model: Any) -> Tensors:
    """Everything that a loaded model holds, as it is held."""
    found: Tensors = {}
    for name, parameter in model.named_parameters():
        if isinstance(parameter.data, Nf4Stack):
            found |= {f"{name}.{part}": value for part, value in enumerate(parameter.data.stored)}
        elif hasattr(parameter, "quant_state"):
            state = parameter.quant_state
            found |= {name: parameter.data, f"{name}.absmax": state.absmax, f"{name}.offset": state.offset}
            found |= {f"{name}.nested": state.state2.absmax, f"{name}.code": state.code}
        else:
            found[name] = parameter.data
    return found


def assert_same_model(folder: Path, other: Path, dtype: str) -> None:
    one, two = loaded_in_4_bits(folder, dtype), loaded_in_4_bits(other, dtype)
    bits, others = stored_bits(one), stored_bits(two)
    assert bits.keys() == others.keys()
    for name, value in bits.items():
        assert value.dtype == others[name].dtype, name
        assert torch.equal(value, others[name]), name
    values = seen_weights(two)
    assert {value.dtype for value in values.values()} == {getattr(torch, dtype)}
    assert all(torch.equal(value, values[name]) for name, value in seen_weights(one).items())
    assert torch.equal(logits(one), logits(two))


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_family_loads_what_quantising_the_merged_model_gives(model_type: str, tmp_path: Path) -> None:
    folder = save_tiny(model_type, tmp_path / "base", dtype="bfloat16")
    adapter = adapter_in_4_bits(folder, tmp_path / "adapter", b_std=0.1)
    merge(adapter, tmp_path / "sixteen", prove=False, show_progress=False)
    merge(adapter, tmp_path / "four", prove=False, requantize=True, show_progress=False)
    assert_same_model(tmp_path / "four", tmp_path / "sixteen", "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_computes_in_the_type_that_it_is_loaded_in(dtype: str, sixteen: Path, four: Path) -> None:
    assert_same_model(four, sixteen, dtype)


def test_nothing_is_quantised_while_it_loads(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("quantised again")

    monkeypatch.setattr(quantizer._Quantize, "convert", never)
    monkeypatch.setattr(torch.ops.bitsandbytes.quantize_4bit, "default", never)
    assert any(isinstance(parameter.data, Nf4Stack) for parameter in loaded_in_4_bits(four).parameters())


def test_what_it_cost_is_told_and_the_proof_is_of_the_16_bit_merge(adapter: Path, tmp_path: Path) -> None:
    report = merge(adapter, tmp_path / "out", requantize=True, show_progress=False)
    nf4 = report.proof.nf4
    assert nf4 is not None
    assert nf4.lost is not None
    assert nf4.logit_error_mean is not None
    assert nf4.base_error_mean is not None
    # NF4 takes 9 to 10 % of normal weights; the adapter is 7 % of them here.
    assert set(nf4.lost) == {"attention", "experts"}  # routers are not quantised
    assert all(lost is not None and 1.0 < lost < 1.6 for lost in nf4.lost.values())
    assert 0.5 * nf4.base_error_mean < nf4.logit_error_mean < 1.5 * nf4.base_error_mean
    assert report.logits.merged_error_mean < 0.1 * report.logits.adapter_effect_mean
    assert nf4.nbytes < 0.65 * report.nbytes  # the vocabulary is most of such a tiny model
    assert report.fingerprint == fingerprint(tmp_path / "out")
    assert "written in NF4" in report.table()
    assert "rounding the base to NF4 makes" in report.table()
    assert json.loads((tmp_path / "out" / "merge-report.json").read_text())["proof"]["nf4"]["matrices"] == 24
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.startswith(".") for name in names)


def test_it_can_be_evaluated(four: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "light", "completion": "on"}) + "\n")
    assert evaluate(four, data, "prompt_completion").rows == 1


def test_an_adapter_on_it_is_merged_into_what_its_nf4_stands_for(four: Path, base: Path, tmp_path: Path) -> None:
    adapter = adapter_in_4_bits_of(four, tmp_path / "adapter")
    report = merge(adapter, tmp_path / "out", into="dequantized", show_progress=False)
    assert report.logits.merged_error_mean < 0.1 * report.logits.adapter_effect_mean
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    # Under the names that published checkpoints have, which other programs read.
    assert tensors(tmp_path / "out").keys() == tensors(base).keys()
    with pytest.raises(WeightsError, match="stored in NF4 and has no 16-bit weights; merge --into dequantized"):
        merge(adapter, tmp_path / "other", show_progress=False)


def adapter_in_4_bits_of(four: Path, folder: Path) -> Path:
    """Stock PEFT makes the factors on the 16-bit model that the checkpoint stands for."""
    dense = folder.parent / "dense"
    reader = StoredReader(four)
    dense.mkdir()
    save_file({key: reader.read(key) for key in reader.keys}, dense / "model.safetensors", metadata={"format": "pt"})
    (dense / "config.json").write_text(json.dumps(reader.config))
    adapter = adapter_in_4_bits(dense, folder)
    record = json.loads((adapter / "finetune.json").read_text())
    record["base"] = {"name_or_path": str(four), "fingerprint": fingerprint(four)}
    (adapter / "finetune.json").write_text(json.dumps(record))
    return adapter


def test_transformers_alone_does_not_load_it_as_something_else(four: Path) -> None:
    code = f"import transformers as t; t.AutoModelForCausalLM.from_pretrained({str(four)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode != 0
    assert "Unknown quantization type, got moe_nf4" in done.stderr
    assert "size mismatch" in done.stderr


# What must not load, and what must not be written.


def test_16_bits_are_not_to_be_had_from_it(four: Path) -> None:
    with pytest.raises(FinetuneError, match=r"stored in NF4 and has no 16-bit weights; write model.load_in_4bit: true"):
        base_model(four, load_in_4bit=False)


def spoilt(four: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    folder.mkdir()
    for path in four.iterdir():
        if path.suffix == ".json":
            (folder / path.name).write_bytes(path.read_bytes())
    found = load_file(four / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


STACK, QUERY = "model.layers.1.mlp.experts.down_proj", "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found.pop(f"{STACK}.offset"), rf"{STACK}.offset: the checkpoint has no such tensor; the weight"),
        (
            lambda found: found.update({f"{STACK}.packed": found[f"{STACK}.packed"][:3].clone()}),
            rf"{STACK}.packed: must be U8\[4, 3072\]; got U8\[3, 3072\]; write the folder again",
        ),
        (
            lambda found: found[f"{QUERY}.quant_state.bitsandbytes__nf4"].fill_(7),
            "q_proj.weight.quant_state.bitsandbytes__nf4: is not what bitsandbytes keeps beside a matrix",
        ),
        (lambda found: found.pop("model.norm.weight"), "missing_keys; got model.norm.weight"),
        (lambda found: found[f"{STACK}.nested_absmax"].fill_(float("nan")), rf"{STACK}: holds NaN or infinity"),
    ],
)
def test_a_folder_that_is_not_whole(
    change: Callable[[Tensors], None], message: str, four: Path, tmp_path: Path
) -> None:
    with pytest.raises(FinetuneError, match=message):
        base_model(spoilt(four, tmp_path / "spoilt", change))


def test_a_folder_of_another_version(four: Path, tmp_path: Path) -> None:
    folder = spoilt(four, tmp_path / "spoilt", lambda found: None)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FinetuneError, match=r"the checkpoint's NF4 is of another version; got .*'format': 2"):
        base_model(folder)


@pytest.mark.parametrize("part", ["offset_E", "nested_absmax_ES", "packed_EN", "absmax_EQ"])
def test_wrong_values_are_told_from_rounding(
    part: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*args: Any) -> Nf4Stack:
        stack = quantize(*args)
        stored = getattr(stack, part)
        stored.copy_(
            torch.zeros_like(stored)
            if part == "offset_E"
            else stored.roll(1, -1)
            if stored.shape[1] > 1
            else 2 * stored
        )
        return stack

    monkeypatch.setattr("finetune.merge.requantize.quantize", wrong)
    with pytest.raises(WeightsError, match="a value in NF4 is further from the merged one than rounding can bring it"):
        merge(adapter, tmp_path / "out", requantize=True, show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_logits_that_rounding_does_not_explain() -> None:
    sound = Nf4Figures(24, 1, {}, logit_error_mean=0.6, base_error_mean=0.5)
    judge_nf4(sound)
    with pytest.raises(
        WeightsError, match=r"mean difference 1.6 where rounding the base to NF4 makes 0.5; merge without"
    ):
        judge_nf4(Nf4Figures(24, 1, {}, logit_error_mean=1.6, base_error_mean=0.5))


def test_what_is_not_quantised_is_copied(sixteen: Path, four: Path) -> None:
    plain, stored = CheckpointReader(sixteen), StoredReader(four)
    kept = [key for key in plain.keys if "experts" not in key and "self_attn" not in key]
    assert len(kept) == 9
    assert all(torch.equal(plain.read(key), stored.read(key)) for key in kept)
    assert (logits(load(sixteen)) - logits(loaded_in_4_bits(four))).abs().max() > 0.1


def test_a_run_trains_on_it_as_on_the_16_bit_model(sixteen: Path, four: Path, tmp_path: Path) -> None:
    rows, adapters = write_rows(tmp_path / "rows.jsonl"), []
    for base in (sixteen, four):
        folder = tmp_path / base.parent.name
        made = recipe(base, rows, folder, max_steps=2, save_steps=1)
        train(made, [])
        shutil.rmtree(folder / "adapter")
        shutil.rmtree(folder / "checkpoint-2")
        resumed = made.training.model_copy(update={"resume_from_checkpoint": True})
        train(made.model_copy(update={"training": resumed}), [])
        adapters.append(tensors(folder / "adapter"))
        record = json.loads((folder / "adapter" / "finetune.json").read_text())
        assert (record["base"]["fingerprint"], record["quantization"]) == (fingerprint(base), "nf4")
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())


def test_it_goes_on_after_a_kill_and_what_lay_there_goes_away(adapter: Path, four: Path, tmp_path: Path) -> None:
    """Killed while the copy was written; then the same merge, and one that is to be in 16 bits after all."""
    for resumed_in_nf4 in (True, False):
        partial = tmp_path / ".out.partial"
        for folder in (".16-bit", ".nf4"):
            (partial / folder).mkdir(parents=True)
        (partial / "model-00001-of-00002.safetensors").write_bytes(b"half")
        (partial / ".nf4" / "model.safetensors").write_bytes(b"half")
        merge(adapter, tmp_path / "out", requantize=resumed_in_nf4, resume=True, show_progress=False)
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names == {path.name for path in four.iterdir()}
        same = (tmp_path / "out" / "model.safetensors").read_bytes() == (four / "model.safetensors").read_bytes()
        assert same == resumed_in_nf4
        shutil.rmtree(tmp_path / "out")
