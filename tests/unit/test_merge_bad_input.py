"""What others may hand us: pickles, damaged and cunning files. Each is refused before anything is written."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.checkpoint import SUMS_FILE, CheckpointReader, fingerprint, verify_sums, write_sums
from finetune.errors import FinetuneError, as_expected
from finetune.merge import merge
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter

WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base in several shards and an adapter, each with its list of checksums."""
    folder = tmp_path_factory.mktemp("sound")
    base = save_tiny_mixtral(folder / "base")
    adapter = save_adapter(base, folder / "adapter")
    for each in (base, adapter):
        write_sums(each)
    return base, adapter


@pytest.fixture
def base(sound: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(sound[0], tmp_path / "base")


@pytest.fixture
def adapter(sound: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(sound[1], tmp_path / "adapter")


def refusal(adapter: Path, base: Path) -> str:
    """What the merge says, on one line; nothing was written."""
    before = sorted(path.name for path in adapter.parent.iterdir())
    with pytest.raises((FinetuneError, OSError)) as caught:
        merge(adapter, adapter.parent / "out", base=base, show_progress=False)
    assert sorted(path.name for path in adapter.parent.iterdir()) == before
    assert isinstance(caught.value, FinetuneError | OSError)
    line = str(as_expected(caught.value))
    assert "\n" not in line
    return line


def flip(file: Path, offset: int) -> None:
    """Turn one bit, `offset` bytes before the end."""
    content = bytearray(file.read_bytes())
    content[-offset] ^= 1
    file.write_bytes(content)


def explosive(file: Path) -> None:
    """A pickle that would leave a trace if anyone opened it."""

    class Trap:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return Path.touch, (file.with_name("trace"),)

    file.write_bytes(pickle.dumps(Trap()))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_never_opened(adapter: Path, base: Path, name: str) -> None:
    (adapter / SUMS_FILE).unlink()
    (adapter / ADAPTER_WEIGHTS).unlink()
    explosive(adapter / name)
    assert f"the adapter is in pickle format; got {name}; save it again as safetensors: pickle files can" in refusal(
        adapter, base
    )
    assert not (adapter / "trace").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pt", "model.pth"])
def test_a_base_of_pickles_is_refused_with_how_to_convert(adapter: Path, base: Path, name: str) -> None:
    (base / SUMS_FILE).unlink()
    (base / WEIGHTS).unlink()
    explosive(base / name)
    assert f"holds no safetensors weights; got {name}; convert the checkpoint to safetensors" in refusal(adapter, base)
    assert not (base / "trace").exists()


def test_a_flipped_bit_in_the_base_is_seen(adapter: Path, base: Path) -> None:
    flip(base / WEIGHTS, 20_001)
    assert refusal(adapter, base).startswith(f"{base / WEIGHTS}: differs from its sum in {SUMS_FILE}; got ")


def test_a_flipped_bit_in_the_adapter_is_seen(adapter: Path, base: Path) -> None:
    flip(adapter / ADAPTER_WEIGHTS, 101)
    assert f"{ADAPTER_WEIGHTS}: differs from its sum in {SUMS_FILE}; got " in refusal(adapter, base)
    flip(adapter / ADAPTER_WEIGHTS, 101)
    (adapter / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text().replace("4", "5", 1))
    assert "adapter_config.json: differs from its sum" in refusal(adapter, base)


def test_a_file_that_the_list_names_and_a_list_that_is_none(adapter: Path, base: Path) -> None:
    (base / "tokenizer.json").unlink()
    assert "tokenizer.json: is missing, and SHA256SUMS lists it; fetch or copy the folder again" in refusal(
        adapter, base
    )
    (base / SUMS_FILE).write_text("0" * 64 + "  ../../outside\n")
    line = refusal(adapter, base)
    assert f"{SUMS_FILE}:1: is not a SHA-256 sum and the name of a file beside it; got 0000" in line


def test_a_readme_may_be_edited(base: Path) -> None:
    (base / "README.md").write_text("mine")
    assert verify_sums(base)


def test_a_truncated_base(adapter: Path, base: Path) -> None:
    (base / SUMS_FILE).unlink()
    content = (base / WEIGHTS).read_bytes()
    (base / WEIGHTS).write_bytes(content[:-1000])
    assert "file is truncated; got" in refusal(adapter, base)
    (base / WEIGHTS).write_bytes(content[:100])
    assert "header is truncated or not safetensors; got 100 bytes" in refusal(adapter, base)


@pytest.mark.parametrize(
    "name", ["../../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "..\\x.safetensors"]
)
def test_an_index_cannot_lead_out_of_the_folder(adapter: Path, base: Path, name: str) -> None:
    (base / SUMS_FILE).unlink()
    (base / WEIGHTS).rename(base / "model-00001-of-00001.safetensors")
    keys = load_file(base / "model-00001-of-00001.safetensors")
    index = {"weight_map": {**dict.fromkeys(keys, "model-00001-of-00001.safetensors"), "lm_head.weight": name}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names a shard outside the folder or of another kind; got {name}" in refusal(adapter, base)


def test_an_index_that_names_a_shard_that_is_not_there(adapter: Path, base: Path) -> None:
    (base / SUMS_FILE).unlink()
    (base / WEIGHTS).unlink()
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-00002-of-00002.safetensors: shard is missing; fetch or copy the file again" in refusal(adapter, base)


def test_links_that_lead_in_a_circle(adapter: Path, base: Path, tmp_path: Path) -> None:
    (base / SUMS_FILE).unlink()
    (base / WEIGHTS).unlink()
    (base / WEIGHTS).symlink_to(base / "other.safetensors")
    (base / "other.safetensors").symlink_to(base / WEIGHTS)
    assert "holds neither model.safetensors nor model.safetensors.index.json" in refusal(adapter, base)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    assert "circle: is not a folder; give the folder that holds config.json" in refusal(adapter, tmp_path / "circle")


def test_an_output_that_is_a_link_in_a_circle(adapter: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "out")
    assert "output exists and is not a folder; name a new folder" in refusal(adapter, base)


def test_factors_and_weights_in_numbers_that_cannot_be_added(adapter: Path, base: Path) -> None:
    (adapter / SUMS_FILE).unlink()
    factors = load_file(adapter / ADAPTER_WEIGHTS)
    key = next(key for key in factors if "q_proj.lora_A" in key)
    save_file({**factors, key: factors[key].to(torch.int32)}, adapter / ADAPTER_WEIGHTS)
    assert "factor is not a floating-point matrix; got I32[4, 64]" in refusal(adapter, base)
    save_file(factors, adapter / ADAPTER_WEIGHTS)
    (base / SUMS_FILE).unlink()
    weights = load_file(base / WEIGHTS)
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, name: weights[name].to(torch.float8_e4m3fn)}, base / WEIGHTS, metadata={"format": "pt"})
    record = json.loads((adapter / "finetune.json").read_text())
    record["base"]["fingerprint"] = fingerprint(base)
    (adapter / "finetune.json").write_text(json.dumps(record))
    line = refusal(adapter, base)
    assert "1 tensors are stored in 8 bits or fewer" in line
    assert "q_proj.weight in F8_E4M3; give the 16-bit checkpoint" in line


def test_an_adapter_for_another_model_of_equal_shapes(adapter: Path, tmp_path: Path) -> None:
    other = save_tiny_mixtral(tmp_path / "other", seed=1)
    assert "base fingerprint differs; got" in refusal(adapter, other)


def test_the_list_sees_a_bit_that_the_fingerprint_does_not_look_at(adapter: Path, base: Path) -> None:
    info = CheckpointReader(base).info("lm_head.weight")
    before, content = fingerprint(base), bytearray((base / WEIGHTS).read_bytes())
    content[info.offset + info.nbytes // 15 // 2 + 3000] ^= 1  # between the first two of its windows
    (base / WEIGHTS).write_bytes(content)
    assert fingerprint(base) == before
    assert f"{WEIGHTS}: differs from its sum in {SUMS_FILE}" in refusal(adapter, base)
