"""`--resume` believes nothing that it has not seen: another setting, other files, garbage; and options that clash."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import WeightsError
from finetune.merge import merge
from finetune.merge.journal import JOURNAL_FILE, Journal
from tests.support import save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter, tensors


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_mixtral(tmp_path_factory.mktemp("mixtral"))


@pytest.fixture(scope="module")
def sound(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))


@pytest.fixture
def adapter(sound: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return shutil.copytree(sound, tmp_path / "adapter")


@pytest.fixture
def unfinished(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an interrupted merge has left of `out`, with most of its tensors."""
    add = Journal.add

    def interrupted(self: Journal, entries: Any) -> None:
        add(self, entries)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("finetune.merge.stream.BYTES_BETWEEN_ENTRIES", 2**19)
        patched.setattr(Journal, "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            merge(adapter, tmp_path / "out", show_progress=False)
    return tmp_path / ".out.partial"


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_another_scale_is_another_merge(adapter: Path, unfinished: Path, tmp_path: Path) -> None:
    edit(adapter / "adapter_config.json", lora_alpha=8.5)
    with pytest.raises(WeightsError, match="the unfinished merge there is another one; got another settings"):
        merge(adapter, tmp_path / "out", resume=True, prove=False, show_progress=False)
    assert (unfinished / "model.safetensors").is_file()


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-8])


SPOILT: dict[str, Callable[[Path], object]] = {
    "weights gone": lambda folder: (folder / "model.safetensors").unlink(),
    "weights cut short": cut,
    "other weights": lambda folder: (folder / "model.safetensors").write_bytes(
        b"\0" * (folder / "model.safetensors").stat().st_size
    ),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT)
def test_files_that_the_journal_does_not_fit_are_refused(
    adapter: Path, unfinished: Path, tmp_path: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(unfinished)
    message = "model.safetensors: is not what the journal of the unfinished folder says; leave out --resume"
    with pytest.raises(WeightsError, match=message):
        merge(adapter, tmp_path / "out", resume=True, prove=False, show_progress=False)
    assert not (tmp_path / "out").exists()
    merge(adapter, tmp_path / "out", show_progress=False)


@pytest.mark.parametrize("content", [b"1\n", b'"x"\n', b"\xff\xfe\n", b"", b"{}\n"])
def test_a_journal_of_garbage_is_no_journal(
    adapter: Path, unfinished: Path, sound: Path, tmp_path: Path, content: bytes
) -> None:
    merge(sound, tmp_path / "whole", show_progress=False)
    (unfinished / JOURNAL_FILE).write_bytes(content)
    if content == b"{}\n":
        with pytest.raises(WeightsError, match="the unfinished merge there is another one"):
            merge(adapter, tmp_path / "out", resume=True, show_progress=False)
        return
    merge(adapter, tmp_path / "out", resume=True, show_progress=False)
    found, wanted = tensors(tmp_path / "out"), tensors(tmp_path / "whole")
    assert all((found[key] == value).all() for key, value in wanted.items())


def test_what_others_put_there_does_not_come_along(adapter: Path, unfinished: Path, tmp_path: Path) -> None:
    (unfinished / "evil.bin").write_text("x")
    (unfinished / "sub").mkdir()
    merge(adapter, tmp_path / "out", resume=True, show_progress=False)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"evil.bin", "sub", JOURNAL_FILE}


@pytest.mark.parametrize("resume", [True, False])
def test_a_link_in_the_place_of_the_unfinished_folder(adapter: Path, tmp_path: Path, resume: bool) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    (tmp_path / ".out.partial").symlink_to(precious)
    with pytest.raises(WeightsError, match="stands where the unfinished output would, and is no folder; remove it"):
        merge(adapter, tmp_path / "out", resume=resume, show_progress=False)
    assert (precious / "thesis.txt").read_text() == "years"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [float("nan")]}, "--weights: an adapter cannot be added so many times; got nan; give numbers"),
        ({"weights": [float("inf")]}, "--weights: an adapter cannot be added so many times; got inf"),
        ({"weights": [0.0]}, "--weights: an adapter cannot be added so many times; got 0"),
        ({"compare_rows": 0}, "--compare-rows: nothing could be measured; got 0; give a number of rows"),
        ({"prompts": Path("x"), "prove": False}, "--prompts: nothing is run on them without the proof; leave out"),
    ],
)
def test_options_without_a_meaning(adapter: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        merge(adapter, tmp_path / "out", show_progress=False, **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_adapter_is_not_added_to_one_that_went_on_from_it(adapter: Path, base: Path, tmp_path: Path) -> None:
    later = save_adapter(base, tmp_path / "later", b_std=0.04)
    report = merge(adapter, tmp_path / "first", show_progress=False)
    edit(later / "finetune.json", adapter={"name_or_path": "x", "sha256": report.adapters[0]["sha256"]})
    message = "went on from another of the adapters, whose change it holds already; got .*; name only the later one"
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
        ("finetune.json", {"base": {"made_from": {}}}),
        ("finetune.json", {"layout": "x"}),
        ("finetune.json", {"added_tokens": {"a": "b"}}),
        ("finetune.json", {"recipe": {"method": None}}),
    ],
)
def test_what_an_adapter_says_of_itself_in_other_kinds_of_values(
    adapter: Path, base: Path, tmp_path: Path, file: str, values: dict[str, Any]
) -> None:
    edit(adapter / file, **values)
    where = next(iter(values))
    with pytest.raises(
        WeightsError, match=rf"{file}: {where}.*(has the wrong type \(expected .*\); got .*|is missing); fetch or copy"
    ):
        merge(adapter, tmp_path / "out", base=base, show_progress=False)


def test_a_tokenizer_that_is_none(adapter: Path, base: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match=r"base: its tokenizer cannot be read; got .*; fetch or copy the file again"):
        merge(adapter, tmp_path / "out", base=copy, show_progress=False)
