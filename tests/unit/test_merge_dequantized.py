"""`--into dequantized`: the base as 4-bit training saw it, bit for bit, and merges into it."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from finetune.adapters.lineage import made_from
from finetune.checkpoint import CheckpointReader, fingerprint
from finetune.errors import WeightsError
from finetune.merge import merge
from finetune.merge.dequantized_base import DequantizedReader, Matrix, quantize
from finetune.moe.families import FAMILIES
from finetune.moe.lora import factor_stacks
from finetune.moe.nf4 import Nf4Stack
from tests.families import CONFIGS, save_tiny
from tests.support import save_tiny_mixtral
from tests.unit.four_bits import adapter_in_4_bits, loaded_in_4_bits, seen_weights
from tests.unit.merge_adapters import load, logits, tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_in_4_bits(base, tmp_path_factory.mktemp("adapter") / "adapter")


def reader_of(folder: Path, dtype: torch.dtype = torch.float32) -> DequantizedReader:
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return DequantizedReader(folder, FAMILIES[model_type], dtype)


def assert_seen(folder: Path, dtype: torch.dtype) -> None:
    """What the reader gives is, through transformers' loader, what training computes with; all else is untouched."""
    trained = loaded_in_4_bits(folder, str(dtype).removeprefix("torch."))
    reader, plain = reader_of(folder, dtype), CheckpointReader(folder)
    values = {key: reader.read(key) for key in reader.keys}
    found = type(trained).from_pretrained(None, config=load(folder).config, state_dict=values, dtype=dtype)
    parameters, seen = dict(found.named_parameters()), seen_weights(trained)
    assert len(seen) > 5
    for name, value in seen.items():
        assert torch.equal(parameters[name].data, value), name
    for key in set(reader.keys) - reader.quantized:
        assert torch.equal(values[key], plain.read(key)), key
    for name, parameter in trained.named_parameters():
        assert name in seen or torch.equal(parameter.data, parameters[name].data), name


@pytest.mark.parametrize("model_type", CONFIGS)
def test_every_family_reads_bit_for_bit_what_training_computes_with(model_type: str, tmp_path: Path) -> None:
    assert_seen(save_tiny(model_type, tmp_path, dtype="bfloat16"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_values_come_in_the_type_that_was_trained_in(dtype: torch.dtype, base: Path) -> None:
    assert_seen(base, dtype)
    reader = reader_of(base, dtype)
    assert {reader.read(key).dtype for key in reader.quantized} == {dtype}


def test_a_stack_that_lies_on_disk_as_the_model_holds_it(tmp_path: Path) -> None:
    model = load(save_tiny_mixtral(tmp_path / "published"))
    model.save_pretrained(tmp_path / "as_loaded", save_original_format=False)
    assert_seen(tmp_path / "as_loaded", torch.float32)


def test_head_embeddings_routers_and_norms_do_not_go_through_nf4(base: Path) -> None:
    names = {key.rpartition("layers.")[2].lstrip("01.") for key in reader_of(base).quantized}
    assert not any(word in name for name in names for word in ("lm_head", "embed", "gate", "norm"))
    assert any("self_attn" in name for name in names)
    assert any("experts.3.w2" in name for name in names)


def test_rows_and_whole_tensors_are_the_same_from_any_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[str, int]] = []

    def counted(matrix: Matrix, *args: Any) -> Nf4Stack:
        fetched.append((matrix.weight, matrix.expert))
        return quantize(matrix, *args)

    monkeypatch.setattr("finetune.merge.dequantized_base.quantize", counted)
    folder = save_tiny("gpt_oss", tmp_path)
    wanted = {key: reader_of(folder).read(key) for key in reader_of(folder).keys}
    fetched.clear()
    reader = reader_of(folder)

    def by_rows(key: str) -> torch.Tensor:
        shape = reader.info(key).shape
        rows = [reader.read_rows(key, start, start + 7) for start in range(0, reader.info(key).as_rows().shape[0], 7)]
        return torch.cat(rows).reshape(shape)

    with ThreadPoolExecutor(4) as pool:
        keys = [key for key in reader.keys if reader.info(key).shape]
        for key, found in zip(keys, pool.map(by_rows, keys), strict=True):
            assert torch.equal(found, wanted[key]), key
    assert len(fetched) == len(set(fetched)) == 8 + 4 * 4  # each matrix once, whatever the rows that were asked for


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_merged_is_the_4bit_base_plus_the_adapter(model_type: str, tmp_path: Path) -> None:
    folder = save_tiny(model_type, tmp_path / "base")
    adapter = adapter_in_4_bits(folder, tmp_path / "adapter")
    report = merge(adapter, tmp_path / "out", into="dequantized", show_progress=False)
    model = PeftModel.from_pretrained(loaded_in_4_bits(folder), adapter).eval()
    factor_stacks(model)  # PEFT's own forward needs dense stacks
    trained = logits(model)
    original = merge(adapter, tmp_path / "original", show_progress=False)
    assert (logits(load(tmp_path / "out")) - trained).abs().max() < 1e-3
    assert (logits(load(tmp_path / "original")) - trained).abs().max() > 0.1
    assert report.logits.merged_error_max < 1e-4
    assert (report.into, original.into) == ("dequantized", "original")
    assert (report.through_nf4, original.through_nf4) == (len(reader_of(folder).quantized), 0)
    assert f"dequantized base, {report.through_nf4} tensors through NF4" in report.table()
    assert tensors(tmp_path / "out").keys() == tensors(folder).keys()


def test_values_that_training_did_not_see_do_not_pass_the_proof(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof's reference comes from the training's own loader, not from the reader."""

    def without_the_mean(*args: Any) -> Nf4Stack:
        stack = quantize(*args)
        stack.offset_E.zero_()
        return stack

    monkeypatch.setattr("finetune.merge.dequantized_base.quantize", without_the_mean)
    with pytest.raises(WeightsError, match=r"merged model differs from base \+ adapter"):
        merge(adapter, tmp_path / "out", into="dequantized", show_progress=False)
    assert not (tmp_path / "out").exists()


def forget(record: dict[str, Any]) -> None:
    del record["quantization"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (forget, "finetune.json: does not record whether the base was quantised in training; merge --into original"),
        (lambda record: record.update(quantization=None), "trained on the 16-bit base, and never saw a dequantised"),
        (lambda record: record.update(dtype="int8"), "does not record the compute dtype; got int8"),
    ],
)
def test_an_adapter_that_never_saw_a_dequantised_base(
    change: Callable[[dict[str, Any]], None], message: str, base: Path, tmp_path: Path
) -> None:
    adapter = adapter_in_4_bits(base, tmp_path / "adapter")
    record = json.loads((adapter / "finetune.json").read_text())
    change(record)
    (adapter / "finetune.json").write_text(json.dumps(record))
    with pytest.raises(WeightsError, match=message):
        merge(adapter, tmp_path / "out", into="dequantized", show_progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_adapters_that_saw_different_dequantised_bases(base: Path, tmp_path: Path) -> None:
    both = [adapter_in_4_bits(base, tmp_path / dtype, dtype, r=r) for r, dtype in ((4, "float32"), (2, "bfloat16"))]
    with pytest.raises(
        WeightsError, match="trained with different compute dtypes, so their 4-bit bases differ; got bfloat16, float32"
    ):
        merge(both, tmp_path / "out", into="dequantized", show_progress=False)


def test_an_adapter_on_a_merge_into_it_does_not_go_onto_the_16_bit_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    merge(adapter, merged, into="dequantized", show_progress=False)
    then = adapter_in_4_bits(merged, tmp_path / "next", r=2)
    record = json.loads((then / "finetune.json").read_text())
    record["base"]["made_from"] = made_from(merged, fingerprint(merged))
    (then / "finetune.json").write_text(json.dumps(record))
    with pytest.raises(
        WeightsError, match="was trained on a merge into the dequantised base; this merge is into the 16-bit base"
    ):
        merge([adapter, then], tmp_path / "out", show_progress=False)
    with pytest.raises(WeightsError, match="trained on a merged checkpoint in 4 bits, not on this base in 4 bits"):
        merge([adapter, then], tmp_path / "out", into="dequantized", show_progress=False)
    assert merge(then, tmp_path / "out", into="dequantized", show_progress=False).logits.merged_error_max < 1e-3
