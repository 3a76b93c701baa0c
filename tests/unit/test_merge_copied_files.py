"""What stands beside the merged weights: configuration, tokenizer, template, generation settings, shards."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from finetune.checkpoint import CheckpointReader, CheckpointWriter, TensorSpec
from finetune.errors import WeightsError
from finetune.merge import merge
from finetune.merge.copied_files import merged_config
from tests.support import save_tiny_mistral
from tests.unit.merge_adapters import save_adapter


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_mistral(tmp_path / "base", num_hidden_layers=1)


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return save_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])


def test_tokenizer_template_and_generation_settings_come_from_the_base(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    merge(adapter, tmp_path / "out", show_progress=False)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in base.iterdir()} | {
        "merge-report.json",
        "merge-times.json",
        "SHA256SUMS",
        "README.md",
    }
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


def test_the_tokenizer_and_template_that_were_trained_win_over_the_base(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(adapter)
    merge(adapter, tmp_path / "out", show_progress=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"


def test_a_template_alone_in_the_adapter_folder_wins_too(adapter: Path, base: Path, tmp_path: Path) -> None:
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    merge(adapter, tmp_path / "out", show_progress=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"


def test_links_of_a_download_cache_become_files(adapter: Path, base: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in base.iterdir():
        (cache / path.name).symlink_to(path)
    merge(adapter, tmp_path / "out", base=cache, show_progress=False)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_a_base_named_as_on_the_hub_is_found_where_it_was_downloaded(
    adapter: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    repository, commit = tmp_path / "cache" / "models--maker--tiny", "0123456789" * 4
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text(commit)
    shutil.copytree(base, repository / "snapshots" / commit)
    record, settings = adapter / "finetune.json", adapter / "adapter_config.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"base": {**content["base"], "name_or_path": "maker/tiny"}}))
    with pytest.raises(WeightsError, match="the recorded base is not on this machine; got maker/tiny"):
        merge(adapter, tmp_path / "out", show_progress=False)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"revision": "v1"}))
    assert merge(adapter, tmp_path / "out", show_progress=False).adapters[0]["base_recorded"]


def test_a_sharded_base_gives_a_sharded_model(adapter: Path, base: Path, tmp_path: Path) -> None:
    sharded = shutil.copytree(base, tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    reader = CheckpointReader(base)
    specs = [TensorSpec(key, reader.info(key).dtype, reader.info(key).shape) for key in reader.keys]
    with CheckpointWriter(sharded, specs, max_shard_bytes=150_000) as writer:
        for key in reader.keys:
            writer.write(key, reader.read(key))
    merge(adapter, tmp_path / "out", base=sharded, show_progress=False)
    names = {path.name for path in sharded.glob("model*")}
    assert {path.name for path in (tmp_path / "out").glob("model*")} == names
    assert len(names) > 2


def test_router_logits_are_not_left_on(base: Path, tmp_path: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"output_router_logits": True}))
    adapter = save_adapter(base, tmp_path / "adapter", r=2, target_modules=["q_proj"])
    merge(adapter, tmp_path / "out", show_progress=False)
    assert AutoConfig.from_pretrained(tmp_path / "out").output_router_logits is False


@pytest.mark.parametrize(
    ("base_config", "expected"),
    [
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 5e5},
        ),
        (
            {"rope_theta": 5e5},
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 5e5},
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
                "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
        ),
        ({"rope_parameters": {"full": {"rope_theta": 1.0}}}, {"rope_parameters": {"full": {"rope_theta": 1.0}}}),
        ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float32"}),
        ({"dtype": "bfloat16", "output_router_logits": True}, {"dtype": "float32", "output_router_logits": False}),
    ],
)
def test_the_configuration_says_the_same_to_readers_old_and_new(
    base_config: dict[str, Any], expected: dict[str, Any]
) -> None:
    merged = merged_config(base_config, "F32")
    assert {key: merged.get(key) for key in expected} == expected


@pytest.mark.parametrize(
    ("base_config", "expected"),
    [
        ({"eos_token_id": 2, "pad_token_id": 3}, {"eos_token_id": 5, "pad_token_id": 5}),
        ({"eos_token_id": [2, 4], "pad_token_id": None}, {"eos_token_id": [5, 2, 4], "pad_token_id": None}),
        ({"eos_token_id": [2, 5]}, {"eos_token_id": [2, 5]}),
        ({"eos_token_id": None}, {"eos_token_id": 5}),
    ],
)
def test_the_configuration_keeps_the_ends_of_the_base(base_config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert merged_config(base_config, None, eos=5, pad=5) == expected


def test_the_rotary_base_survives_a_reload(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(adapter, tmp_path / "out", show_progress=False)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    before, after = AutoConfig.from_pretrained(base), AutoConfig.from_pretrained(tmp_path / "out")
    assert after.rope_parameters == before.rope_parameters
    assert written["rope_theta"] == before.rope_parameters["rope_theta"]
