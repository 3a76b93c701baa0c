"""Models and adapters with hostile files: each is refused with the file and the reason, and nothing in it runs.

The same through every command, and for every key: `tests/faults/test_hostile_models.py`.
"""

import json
import logging
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.base import read_base
from finetune.checkpoint import SUMS_FILE, CheckpointReader, verify_sums
from finetune.checkpoint.reader import read_header
from finetune.cli.main import main
from finetune.environment import print_plainly
from finetune.errors import FinetuneError, as_expected
from finetune.inspect import inspect
from finetune.merge import merge
from finetune.merge.copied_files import merged_config
from finetune.model import load_base
from finetune.model_files import load_config, read_config, read_tokenizer, without_code
from finetune.moe.families import FAMILIES
from finetune.recipe import Recipe, load_recipe
from finetune.upcycle.gguf_header import check_header
from tests.hostile_models import outcome
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter
from tests.unit.recipe_writing import changed

DEEP = '{"a":' + "[" * 200_000
KERNEL = "kernels-community/evil"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sound")
    base = save_tiny_mixtral(folder / "base")
    return base, save_adapter(base, folder / "adapter", record=False)


@pytest.fixture
def base(sound: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(sound[0], tmp_path / "base")


@pytest.fixture
def adapter(sound: tuple[Path, Path], tmp_path: Path) -> Path:
    return shutil.copytree(sound[1], tmp_path / "adapter")


def edited(file: Path, **values: Any) -> Path:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return file.parent


def refusal(command: Callable[[], object]) -> str:
    with pytest.raises((FinetuneError, OSError)) as caught:
        command()
    assert isinstance(caught.value, FinetuneError | OSError)
    return str(as_expected(caught.value))


def merged(adapter: Path, base: Path) -> object:
    return merge(adapter, adapter.parent / "out", base=base, show_progress=False)


def recipe_for(base: Path) -> Recipe:
    file = base.parent / "recipe.yaml"
    file.write_text(changed(("some/model", str(base))))
    return load_recipe(file)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: must be a whole number from 1 to 1,024; got 1000000000"),
        ({"num_hidden_layers": 99}, "num_hidden_layers: the weights have 2; got 99"),
        ({"num_hidden_layers": -1}, "num_hidden_layers: must be a whole number from 1 to 1,024; got -1"),
        ({"num_local_experts": 10**9}, "num_local_experts: must be a whole number from 0 to 65,536"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok: must be from 1 to the number of experts, 4; got 5"),
        ({"vocab_size": 10**12}, "vocab_size: must be a whole number from 1 to 16,777,216"),
        ({"num_attention_heads": 0}, "num_attention_heads: must be a whole number from 1"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: must divide num_attention_heads, 4; got 3"),
        ({"hidden_size": [64]}, "config.json: "),
        ({"hidden_size": True}, "hidden_size: must be a whole number from 1 to 16,777,216; got true"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: is not a number; got NaN"),
        ({"rms_norm_eps": "tiny"}, 'rms_norm_eps: must be a number from 0 to 1; got "tiny"'),
        ({"rope_parameters": 7}, "rope_parameters: must be an object; got 7"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -1.0}}, "rope_theta: must be a number from 0.001"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings: is beyond"),
        ({"whatever": 10**30}, "whatever: is beyond 9007199254740992; got a number of 31 digits"),
        ({"whatever": json.loads("[" * 40 + "]" * 40)}, "is nested deeper than 32 levels"),
        ({"model_type": {}}, "config.json"),
    ],
)
def test_a_value_that_no_model_has_is_refused(base: Path, values: dict[str, Any], said: str) -> None:
    edited(base / "config.json", **values)
    line = refusal(lambda: read_base(recipe_for(base)))
    assert str(base / "config.json") in line
    assert said in line


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_published_values_of_every_family_are_within_the_bounds(tmp_path: Path, family: str) -> None:
    from transformers import CONFIG_MAPPING

    CONFIG_MAPPING[family]().save_pretrained(tmp_path)
    assert load_config(tmp_path).model_type == family


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", '{"model_type": "mixtral", "layer_types": 7}'),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 3, "merges": []}}'),
        ("tokenizer_config.json", '{"tokenizer_class": 7}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
        ("special_tokens_map.json", '{"eos_token": 7}'),
    ],
)
def test_what_a_library_fails_at_is_one_error(base: Path, name: str, text: str) -> None:
    (base / name).write_text(text)
    line = refusal(lambda: read_tokenizer(str(base)))
    assert str(base) in line
    assert "\n" not in line


def test_a_normalizer_that_doubles_a_text_without_end_is_refused(base: Path) -> None:
    doubles = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    edited(base / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [doubles] * 40})
    line = refusal(lambda: read_tokenizer(str(base)))
    assert "tokenizer.json: the normalizer may make a text 1.1e+12 times longer" in line


@pytest.mark.parametrize("name", ["_attn_implementation", "attn_implementation", "experts_implementation"])
def test_a_config_chooses_no_code(base: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's loader is not reached, and code of the folder is not imported."""
    monkeypatch.setattr("transformers.modeling_utils.lazy_import_flash_attention", _trap)
    monkeypatch.setattr("transformers.dynamic_module_utils.get_class_in_module", _trap)
    (base / "evil.py").write_text(f"open({str(base / 'trace')!r}, 'w')\nclass Evil: pass\n")
    auto = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    code = {name: KERNEL, "auto_map": auto, "use_kernels": True, "transformers_weights": "other.safetensors"}
    edited(base / "config.json", **code)
    edited(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    recipe = recipe_for(base)
    read = read_base(recipe)
    model = load_base(read, recipe.model)
    assert model.config._attn_implementation == "sdpa"
    assert not hasattr(model.config, "auto_map")
    assert not (base / "trace").exists()
    assert KERNEL not in json.dumps(merged_config(read_config(base), None))
    assert without_code({"model_type": "a", "text_config": {"b": 1, **code}}) == {
        "model_type": "a",
        "text_config": {"b": 1},
    }


def _trap(*args: object, **_: object) -> None:
    raise AssertionError(f"reached with {args}")


@pytest.mark.parametrize(("name", "what"), [("adapter_config.json", "an adapter"), (".metadata", "a sharded")])
def test_nothing_beside_the_weights_is_loaded_with_them(base: Path, name: str, what: str) -> None:
    """transformers would put an adapter that lies there onto the weights, and read a sharded state in their place."""
    (base / name).write_text('{"base_model_name_or_path": "owner/evil", "peft_type": "LORA"}')
    assert f"{base / name}: is {what}" in refusal(lambda: read_base(recipe_for(base)))


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_deep_json_is_refused(base: Path, name: str) -> None:
    (base / name).write_text(DEEP)
    assert f"{base / name}: cannot be read as JSON; got nested too deeply" in refusal(
        lambda: read_base(recipe_for(base))
    )


@pytest.mark.parametrize("name", ["adapter_config.json", "finetune.json"])
def test_deep_json_of_an_adapter_is_refused(adapter: Path, base: Path, name: str) -> None:
    (adapter / name).write_text(DEEP)
    assert f"{adapter / name}: cannot be read as JSON; got nested too deeply" in refusal(lambda: merged(adapter, base))


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (DEEP, "header cannot be read; got nested too deeply"),
        ('{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}', "malformed header entry"),
        ('{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}', "malformed header entry"),
        ('{"a": {"dtype": "F32", "shape": [0, 1e30], "data_offsets": [0, 0]}}', "malformed header entry"),
        ('{"a": {"dtype": "F32", "shape": [0, 99999999999999999], "data_offsets": [0, 0]}}', "malformed header entry"),
        ('{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}', "bytes do not fit the shape"),
        ('{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "bytes do not fit the shape"),
        (
            '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, '
            '"b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}',
            "b: overlaps a",
        ),
        ('{"a": 7}', "malformed header entry"),
    ],
)
def test_a_hostile_header_is_refused(tmp_path: Path, header: str, said: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header.encode() + bytes(8))
    line = refusal(lambda: read_header(file))
    assert line.startswith(str(file))
    assert said in line


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..\\secret.safetensors"])
def test_a_name_that_leads_out_of_the_folder_is_refused(base: Path, name: str) -> None:
    (base / SUMS_FILE).write_text(f"{'0' * 64}  {name}\n")
    assert "is not a SHA-256 sum and the name of a file beside it" in refusal(lambda: verify_sums(base)) or "\\" in name
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    assert "names a shard outside the folder or of another kind" in refusal(lambda: CheckpointReader(base))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "tokenizer_config.json"])
def test_only_regular_files_of_a_model_are_read(base: Path, name: str) -> None:
    (base / name).unlink()
    os.mkfifo(base / name)
    line = refusal(lambda: read_base(recipe_for(base)))
    assert str(base) in line


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"(.*.*)*x": 4}},
        {"alpha_pattern": {"((a|e|i|o|.)+)+x": 4}},
        {"target_modules": r"((\w|\.)+)+x"},
        {"exclude_modules": "(m|o|d|e|l|.)*(.|.)*x"},
        {"layers_to_transform": [0], "layers_pattern": "(.+)+x"},
    ],
    ids=lambda settings: next(reversed(settings)),
)
def test_an_endless_expression_is_refused(
    adapter: Path, base: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.adapters.targets.SECONDS", 0.05)
    edited(adapter / "adapter_config.json", **settings)
    line = refusal(lambda: merged(adapter, base))
    assert line.startswith(f"{adapter / 'adapter_config.json'}: ")
    assert "was not matched with the base's modules within 0.05 s" in line


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank_pattern": {"(": 4}}, "cannot be matched with names of modules; got missing )"),
        ({"target_modules": [7]}, "target_modules: has the wrong type"),
        ({"target_modules": {"a": 1}}, "target_modules: has the wrong type"),
        ({"exclude_modules": 7}, "exclude_modules: has the wrong type"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform: has the wrong type"),
        ({"layers_pattern": {"a": 1}}, "layers_pattern: has the wrong type"),
        ({"modules_to_save": ["(a+)+$"]}, "modules_to_save: must be a list of names of modules"),
        ({"base_model_name_or_path": ["https://evil.example"]}, "base_model_name_or_path: has the wrong type"),
        ({"revision": {"a": 1}}, "revision: has the wrong type"),
        ({"r": True}, "r: missing or not a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha: has the wrong type"),
        ({"megatron_config": {"a": 1}}, "megatron_config: setting is not supported by the merge"),
    ],
)
def test_odd_settings_of_an_adapter_are_refused(adapter: Path, base: Path, settings: dict[str, Any], said: str) -> None:
    edited(adapter / "adapter_config.json", **settings)
    line = refusal(lambda: merged(adapter, base))
    assert str(adapter / "adapter_config.json") in line
    assert said in line


@pytest.mark.parametrize(
    "location", ["https://evil.example/x", "../../etc", "file:///etc/passwd", "a\0b", "\x1b]0;x\x07"]
)
def test_a_recorded_base_is_never_fetched(adapter: Path, location: str) -> None:
    (adapter / "finetune.json").write_text(json.dumps({"base": {"name_or_path": location, "fingerprint": "0"}}))
    line = refusal(lambda: merge(adapter, adapter.parent / "out", show_progress=False))
    # A folder that happens to be there is read as a base, and is none.
    refused = ("the recorded base is not on this machine", "cannot be accessed", "holds neither")
    assert any(reason in line for reason in refused)
    assert "\x1b" not in line


def test_a_record_names_no_file_elsewhere(adapter: Path, base: Path) -> None:
    (adapter / "finetune.json").write_text(json.dumps({"router_bias": "../../secret"}))
    assert "finetune.json: router_bias: unknown file; got ../../secret" in refusal(lambda: merged(adapter, base))


def _gguf(keys: bytes = b"", count: int = 0, tensors: bytes = b"", tensor_count: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, count) + keys + tensors


def _text(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def _tensor(shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return _text(b"t") + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"GGUF", "beyond the end of the file"),
        (_gguf(version=9), "version 9"),
        (_gguf(count=2**60), "keys"),
        (_gguf(tensor_count=2**60), "tensors"),
        (_gguf(_text(b"a", 2**60), 1), "a text of"),
        (_gguf(_text(b"a") + struct.pack("<I", 8) + _text(b"", 2**60), 1), "a text of"),
        (_gguf(_text(b"a") + struct.pack("<I", 8) + _text(b"", 2**20), 1), "beyond the end of the file"),
        (_gguf(_text(b"a") + struct.pack("<IIQ", 9, 4, 2**60), 1), "entries in 'a'"),
        (_gguf(_text(b"a") + struct.pack("<IIQ", 9, 4, 2**20), 1), "beyond the end of the file"),
        (_gguf(_text(b"a") + struct.pack("<IIQIQ", 9, 9, 1, 9, 1), 1), "of the unknown type 9"),
        (_gguf(_text(b"a") + struct.pack("<I", 99), 1), "of the unknown type 99"),
        (_gguf(_text(b"\xff") + struct.pack("<IB", 0, 0), 1), "can't decode byte 0xff"),
        (_gguf(_text(b"general.alignment") + struct.pack("<II", 4, 0), 1), "an alignment of 0"),
        (_gguf(tensors=_tensor((2**40, 2**40)), tensor_count=1), "bytes, where"),
        (_gguf(tensors=_tensor((4,), offset=2**60), tensor_count=1), "bytes, where"),
        (_gguf(tensors=_tensor((0,)), tensor_count=1), "of shape [0]"),
        (_gguf(tensors=_tensor((4,), kind=999), tensor_count=1), "of the unknown type 999"),
        (_gguf(tensors=_text(b"t") + struct.pack("<I", 2**31), tensor_count=1), "with 2147483648 axes"),
    ],
    ids=lambda value: value.strip("'") if isinstance(value, str) else "",
)
def test_a_hostile_gguf_header_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    line = refusal(lambda: check_header(file))
    assert line.startswith(f"{file}: is not a readable GGUF file; got ")
    assert said in line


def test_nothing_printed_commands_the_terminal(base: Path, tmp_path: Path) -> None:
    """Names and values, on both streams, whatever code prints them."""
    evil = "\x1b]0;pwned\x07\x1b[31m\u202e"
    named = base.rename(tmp_path / f"base{evil}")

    def anything() -> int:
        print_plainly()
        print(evil)
        print(evil, file=sys.stderr)
        logging.getLogger().warning(evil)
        return 0

    def usage() -> int:
        """What argparse prints, of the command line."""
        with pytest.raises(SystemExit):
            main(["inspect", "model", f"--{evil}"])
        return 2

    commands: dict[str, Callable[[], int]] = {
        "anything": anything,
        "usage": usage,
        "inspect": lambda: main(["inspect", str(named)]),
        "missing": lambda: main(["inspect", str(named / "nothing")]),
    }
    for name, command in commands.items():
        done = outcome(command, tmp_path / "log")
        assert not done.faults, done.text
        assert "pwned" in done.text or name == "inspect"
        assert not {"\x1b", "\x07", "\u202e"} & set(done.text)


def test_what_inspect_shows_of_a_foreign_record_is_escaped(adapter: Path) -> None:
    record = {"base": {"name_or_path": "\x1b]0;pwned\x07\x1b[31mbase", "fingerprint": "0"}}
    (adapter / "finetune.json").write_text(json.dumps(record))
    shown = inspect(adapter)
    assert not {"\x1b", "\x07"} & set(shown)
    assert r"\u001b]0;pwned\u0007\u001b[31mbase" in shown


def test_pickles_beside_the_weights_change_nothing(base: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "model.pt", "model.pth"):
        (base / name).write_bytes(b"\x80\x04c__builtin__\nexit\n.")
    recipe = recipe_for(base)
    load_base(read_base(recipe), recipe.model)
    (base / "model.safetensors").unlink()
    line = refusal(lambda: read_base(recipe))
    assert "holds no safetensors weights; got model.pt, model.pth, pytorch_model.bin" in line
    assert "weights_only" not in line
