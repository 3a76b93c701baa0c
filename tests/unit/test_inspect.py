"""`finetune inspect`: what a folder is, made how, from what, for which base, and whether a merge can be proven."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.checkpoint import fingerprint
from finetune.errors import Problem, WeightsError
from finetune.export import export
from finetune.inspect import inspect
from finetune.merge import merge
from tests.support import save_tiny_llama, save_tiny_mixtral
from tests.unit.added_tokens import base_of, recipe_for, saved
from tests.unit.merge_adapters import EVERYTHING, save_adapter

SCREEN = 40  # lines


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"), dtype="bfloat16")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), b_std=0.3)


def said(folder: Path) -> dict[str, str]:
    """The lines by their names, those that are broken joined again."""
    lines: list[list[str]] = []
    text = inspect(folder)
    left = text.index("  ", max(len(line.split("  ")[0]) for line in text.splitlines() if line[0] != " "))
    for line in text.splitlines():
        name, rest = line[:left].strip(), line[left:].strip()
        if name:
            lines.append([name, rest])
        else:
            lines[-1][1] += f" {rest}"
    assert len(text.splitlines()) <= SCREEN
    return {name: rest for name, rest in reversed(lines)}  # noqa: C416


def test_an_adapter(base: Path, adapter: Path) -> None:
    shown = said(adapter)
    assert shown["what"] == "LoRA adapter, made by another tool with peft 0.21.2"
    assert shown["base"] == f"{base}, fingerprint {fingerprint(base)[:12]}"
    assert shown["LoRA"] == "r 4, lora_alpha 8"
    assert shown["checksums"] == "no SHA256SUMS to check against"
    assert shown["experts' factors"] == "A expert-major, B rank-major (PEFT's), recorded"
    assert shown["merge"] == (
        f"can be merged: the base is in {base}; 34 of its 41 tensors would change; weights were not read"
    )


def test_an_adapter_whose_base_is_not_here(adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    record = json.loads((copy / "finetune.json").read_text())
    record["base"]["name_or_path"] = "maker/away"
    (copy / "finetune.json").write_text(json.dumps(record))
    assert said(copy)["merge"].startswith("cannot be merged: ")
    assert "the recorded base is not on this machine; got maker/away" in said(copy)["merge"]


def test_an_adapter_of_a_chain_says_what_it_was_trained_on(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    record = json.loads((copy / "finetune.json").read_text())
    source = {"base_fingerprint": "b" * 64, "into": "original", "adapters": [{"sha256": "a" * 64, "weight": 0.5}]}
    record["base"] |= {"made_from": source, "fingerprint": "c" * 64}
    (copy / "finetune.json").write_text(json.dumps(record))
    shown = said(copy)
    assert shown["base"] == f"{base}, fingerprint {'c' * 12}: merged from {'b' * 12} with {'a' * 12} x 0.5"
    assert shown["merge"].startswith("cannot be merged: ")


def test_a_checkpoint(base: Path) -> None:
    shown = said(base)
    assert shown["what"] == "checkpoint of a mixtral: 2 layers of 64, 4 experts, top 2, vocabulary 512"
    assert shown["weights"].startswith("41 tensors, 0.2 M values, BF16, ")
    assert shown["fingerprint"] == fingerprint(base)
    assert shown["made by"] == "not recorded; neither a merge nor an upcycling of this toolkit"
    assert shown["training"] == "lora.targets: attention, experts, router"


def test_a_dense_checkpoint_has_no_experts(tmp_path: Path) -> None:
    assert said(save_tiny_llama(tmp_path / "base"))["what"] == "checkpoint of a llama: 2 layers of 64, vocabulary 512"


def test_a_merge_with_added_tokens_is_not_said_to_have_the_shapes_of_the_base(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", "untied", "float32")
    adapter = saved(recipe_for(base, tmp_path / "turns.jinja"), tmp_path / "adapter", fingerprint(base))
    report = merge(adapter, tmp_path / "out", show_progress=False)
    shown, but = said(tmp_path / "out"), "of the base, but: embedding and head have rows for 2 added tokens"
    assert shown["tensors on disk"].endswith(but)
    assert shown["added tokens"].startswith("2, with the rows that training left; their logits are off by ")
    assert but in report.table()


def test_more_problems_than_fit_on_a_screen_are_counted(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise WeightsError([Problem(f"tensor {number}", "does not fit", "train again") for number in range(60)])

    monkeypatch.setattr("finetune.inspect.inspect_adapter.prepare", refuse)
    assert said(adapter)["merge"].endswith("tensor 2: does not fit; train again; and 57 more")


def test_a_record_without_a_fingerprint_says_so(base: Path, adapter: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    edit(copy / "finetune.json", base={"name_or_path": str(base)})
    assert said(copy)["base"] == f"{base}, no fingerprint recorded"


@pytest.mark.parametrize("finished", [True, False])
def test_a_checkpoint_of_a_run(adapter: Path, tmp_path: Path, finished: bool) -> None:
    copy = shutil.copytree(adapter, tmp_path / "run" / "checkpoint-7")
    (copy / "trainer_state.json").write_text(json.dumps({"global_step": 7}))
    if finished:
        shutil.copytree(adapter, tmp_path / "run" / "adapter")
    then = f"its finished adapter is in {tmp_path / 'run' / 'adapter'}" if finished else "the run is not finished"
    assert said(copy)["what"] == f"checkpoint of a run at step 7; {then}"


def test_an_export_for_vllm(base: Path, tmp_path: Path) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **{**EVERYTHING, "target_parameters": None})
    export(adapter, tmp_path / "lora", "vllm")
    shown = said(tmp_path / "lora")
    assert shown["what"] == "LoRA adapter, exported for vLLM: r 4, needs --max-lora-rank 8"
    assert shown["made from"].startswith(f"{adapter}, SHA-256 ")
    assert shown["base"] == f"{base}, fingerprint {fingerprint(base)[:12]}"


# Damaged files, each a line that names it.


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"recipe": "sft"},
            r'finetune.json: recipe: has the wrong type \(expected an object\); got "sft"; fetch or copy',
        ),
        ({"versions": [1]}, r"finetune.json: versions: has the wrong type \(expected an object\); got \[1\]"),
        ({"base": "tiny"}, r'finetune.json: base: has the wrong type \(expected an object\); got "tiny"'),
        (
            {"base": {"name_or_path": 5}},
            r"finetune.json: base.name_or_path: has the wrong type \(expected text\); got 5",
        ),
        ({"adapter": "before"}, r'finetune.json: adapter: has the wrong type \(expected an object\); got "before"'),
        ({"adapter": {"name_or_path": "x"}}, r"finetune.json: adapter.sha256: is missing; fetch or copy"),
        (
            {"recipe": {"lora": {}, "method": {}}},
            r"finetune.json: does not have the fields that training writes; got no field 'training'",
        ),
        ({"base": {"made_from": {}}}, r"finetune.json: base.made_from.base_fingerprint: is missing"),
        ({"added_tokens": ["a"]}, r"finetune.json: added_tokens: has the wrong type \(expected an object\); got"),
    ],
)
def test_a_damaged_record(adapter: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    copy = shutil.copytree(adapter, tmp_path / "adapter")
    edit(copy / "finetune.json", **changes)
    with pytest.raises(WeightsError, match=message):
        inspect(copy)


@pytest.mark.parametrize(
    ("name", "content", "writer"),
    [
        (
            "merge-report.json",
            lambda base: {"fingerprint": fingerprint(base)},
            "a merge writes; got no field 'into'",
        ),
        ("upcycle.json", lambda base: {}, "an upcycling writes; got no field 'num_experts'"),
    ],
)
def test_a_damaged_file_beside_a_checkpoint(
    base: Path, tmp_path: Path, name: str, content: Callable[[Path], Any], writer: str
) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    (copy / name).write_text(json.dumps(content(copy)))
    with pytest.raises(WeightsError, match=f"{name}: does not have the fields that {writer}"):
        inspect(copy)


def test_a_run_of_which_little_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "provenance.json").write_text("{}")
    (tmp_path / "checkpoint-best").mkdir()
    shown = said(tmp_path)
    assert shown["what"] == "run, not finished, without a checkpoint"
    assert shown["started"] == "start time not recorded; packages not recorded"
    (tmp_path / "checkpoint-3").mkdir()
    assert said(tmp_path)["what"] == "run, not finished, without a checkpoint"
    assert said(tmp_path)["checkpoints"] == "none is whole; damaged: checkpoint-3"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("audit.json", "{", "audit.json: cannot be read as JSON"),
        ("audit.json", "{}", "audit.json: does not have the fields that a run writes; got no field 'parts'"),
        ("provenance.json", '{"git": "abc"}', "provenance.json: does not have the fields that a run writes"),
    ],
)
def test_a_damaged_file_of_a_run(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / "provenance.json").write_text("{}")
    (tmp_path / name).write_text(text)
    with pytest.raises(WeightsError, match=message):
        inspect(tmp_path)
