"""Every value of every file of a model and of an adapter is replaced by hostile ones, through every command.

Each command runs in a fork: no traceback, no crash, no hang, no more than 20 s and 1 GiB, and never without a message.
The seed is that of the other faults; each night draws other values.
"""

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from finetune.adapters.initial import read_initial_adapter
from finetune.base import read_base
from finetune.cli.main import main
from finetune.errors import FinetuneError, as_expected
from finetune.model import adapt, load_base
from finetune.recipe import load_recipe
from tests.faults.harness import SEED
from tests.hostile_models import Outcome, mutations, outcome, spoiled
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter
from tests.unit.recipe_writing import changed

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3600)]

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
    "added_tokens.json",
    "model.safetensors.index.json",
)
WHOLE = (b"", b"\0" * 64, b"[]", b"7", b"{", b"\xff\xfe{}", b'{"a":' + b"[" * 200_000, b"null", b'"text"')
EACH = 2
"""Values of the list that each key is given."""


class Models:
    """A sound base and adapter, a place for spoiled ones, and the commands on them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.base, self.adapter = folder, folder / "base", folder / "adapter"
        save_tiny_mixtral(self.base)
        save_adapter(self.base, self.adapter)
        for name, text in {
            "special_tokens_map.json": '{"eos_token": "<|im_end|>", "pad_token": {"content": "<|pad|>"}}',
            "chat_template.json": '{"chat_template": "{{ messages[0].content }}"}',
            "added_tokens.json": '{"<|im_end|>": 2}',
        }.items():
            (self.base / name).write_text(text)
        _shard(self.base)
        self.spoiled, self.log = folder / "spoiled", folder / "log"
        rows = folder / "rows.jsonl"
        row = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
        rows.write_text(row * 8)
        self.recipe, self.rows = folder / "recipe.yaml", rows
        edits = (("some/model", str(self.spoiled)), ("rows.jsonl", str(rows)), ("runs/test", str(folder / "run")))
        self.recipe.write_text(changed(*edits, ("  r: 8", "  r: 4"), ("lora_alpha: 16", "lora_alpha: 8")))
        self._record_everything()

    def _record_everything(self) -> None:
        """Let the adapter's record say all that training writes."""
        file = self.adapter / "finetune.json"
        rows = {"name": "rows.jsonl", "rows": 8, "tokens": 80, "content": "0" * 64}
        facts = {
            "recipe": load_recipe(self.recipe).model_dump(mode="json"),
            "data": {"train": [rows]},
            "metrics": {"train": {"loss": 1.0}},
            "template_sha256": "0" * 64,
            "template_args": {"a": 1},
            "versions": {"peft": "0.21.0"},
            "dtype": "float32",
        }
        file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))

    def model_commands(self) -> dict[str, Callable[[], int]]:
        model, rows, out = str(self.spoiled), str(self.rows), str(self.folder / "out")
        return {
            "check": lambda: main(["check", str(self.recipe)]),
            "train": self._load,
            "template": lambda: main(["template", model]),
            "inspect": lambda: main(["inspect", model]),
            "evaluate": lambda: main(["evaluate", model, "--data", rows, "--output", out + ".json"]),
            "merge": lambda: main(["merge", str(self.adapter), "--base", model, "--output", out]),
        }

    def adapter_commands(self) -> dict[str, Callable[[], int]]:
        adapter, base, out = str(self.spoiled), str(self.base), str(self.folder / "out")
        return {
            "merge": lambda: main(["merge", adapter, "--base", base, "--output", out]),
            "inspect": lambda: main(["inspect", adapter]),
            "export": lambda: main(["export", adapter, "--format", "vllm", "--base", base, "--output", out]),
            "train": lambda: _said(lambda: read_initial_adapter(self.spoiled)),
        }

    def _load(self) -> int:
        """What `finetune train` does before its first step, and a forward."""

        def start() -> None:
            recipe = load_recipe(self.recipe)
            base = read_base(recipe)
            model = adapt(load_base(base, recipe.model), base, recipe)
            model(input_ids=torch.tensor([[1, 2, 3, 4]]))

        return _said(start)

    def run(self, command: Callable[[], int]) -> Outcome:
        found = outcome(command, self.log)
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        return found


def _said(command: Callable[[], object]) -> int:
    """As `main` says expected errors."""
    try:
        command()
    except (FinetuneError, OSError) as error:
        expected = as_expected(error)
        print(expected)
        return expected.exit_code
    return 0


def _shard(base: Path) -> None:
    """The weights under an index."""
    name = "model-00001-of-00001.safetensors"
    (base / "model.safetensors").rename(base / name)
    with safe_open(base / name, "pt") as weights:
        index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights.keys(), name)}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


def report(what: str, command: str, found: Outcome) -> str:
    return f"{command}: {what}: {found.faults}\n{found.text[-2000:]}"


@pytest.mark.parametrize("command", ["check", "train", "template", "inspect", "evaluate", "merge"])
def test_the_sound_model_passes(models: Models, command: str) -> None:
    """Else nothing below would mean anything."""
    spoiled(models.spoiled, models.base, "unread", "")
    found = models.run(models.model_commands()[command])
    assert found.code == 0, found.text
    assert not found.faults


@pytest.mark.parametrize("name", MODEL_FILES)
@pytest.mark.parametrize("command", ["check", "train", "template", "inspect", "evaluate", "merge"])
def test_every_value_of_a_model(models: Models, command: str, name: str) -> None:
    run, bad = models.model_commands()[command], []
    for what, text in mutations(models.base / name, SEED, EACH):
        spoiled(models.spoiled, models.base, name, text)
        if (found := models.run(run)).faults:
            bad.append(report(what, command, found))
    assert not bad, f"{len(bad)} faults\n" + "\n\n".join(bad[:10])


@pytest.mark.parametrize("name", [*MODEL_FILES, "model-00001-of-00001.safetensors", "tokenizer.model", "tekken.json"])
@pytest.mark.parametrize("command", ["check", "train", "template", "inspect", "evaluate", "merge"])
def test_whole_files_of_a_model(models: Models, command: str, name: str) -> None:
    bad = []
    for content in WHOLE:
        spoiled(models.spoiled, models.base, name, content)
        if name in ("tokenizer.model", "tekken.json"):
            (models.spoiled / "tokenizer.json").unlink()
        if (found := models.run(models.model_commands()[command])).faults:
            bad.append(report(f"{name} = {content[:20]!r}", command, found))
    assert not bad, f"{len(bad)} faults\n" + "\n\n".join(bad[:10])


@pytest.mark.parametrize("name", ["adapter_config.json", "finetune.json"])
@pytest.mark.parametrize("command", ["merge", "inspect", "export", "train"])
def test_every_value_of_an_adapter(models: Models, command: str, name: str) -> None:
    run, bad = models.adapter_commands()[command], []
    for what, text in mutations(models.adapter / name, SEED, EACH):
        spoiled(models.spoiled, models.adapter, name, text)
        if (found := models.run(run)).faults:
            bad.append(report(what, command, found))
    assert not bad, f"{len(bad)} faults\n" + "\n\n".join(bad[:10])


@pytest.mark.parametrize("name", ["adapter_config.json", "finetune.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("command", ["merge", "inspect", "export", "train"])
def test_whole_files_of_an_adapter(models: Models, command: str, name: str) -> None:
    bad = []
    for content in WHOLE:
        spoiled(models.spoiled, models.adapter, name, content)
        if (found := models.run(models.adapter_commands()[command])).faults:
            bad.append(report(f"{name} = {content[:20]!r}", command, found))
    assert not bad, f"{len(bad)} faults\n" + "\n\n".join(bad[:10])


def test_bytes_of_a_header(models: Models) -> None:
    """Single bytes of the header of the weights, at random."""
    name = "model-00001-of-00001.safetensors"
    sound, draw, bad = (models.base / name).read_bytes(), random.Random(SEED), []
    (length,) = struct.unpack("<Q", sound[:8])
    for _ in range(60):
        content = bytearray(sound)
        place = draw.randrange(8 + length)
        content[place] = draw.choice((0, 0x22, 0x2D, 0x39, 0x5B, 0x7B, 0xFF))
        spoiled(models.spoiled, models.base, name, bytes(content))
        for command in ("inspect", "check"):
            if (found := models.run(models.model_commands()[command])).faults:
                bad.append(report(f"byte {place} = {content[place]:#x}", command, found))
    assert not bad, f"{len(bad)} faults\n" + "\n\n".join(bad[:10])
