"""A disk that is full does not end a run, and whatever it does end says why and is repeated by the same command."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from finetune.checkpoint import verify_sums
from tests.end_to_end.workspaces import write_workspace
from tests.faults.harness import Commands, assert_same_files, disk_of, files_of, some_short, succeed, wait_for
from tests.support import save_tiny_llama, save_tiny_mixtral
from tests.unit.merge_adapters import save_adapter

PAGE = 4096
SIZES = (0.06, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9)  # of what the run takes in the end
ROOM = 64 * 2**20
OF_THE_RUN = ("metrics.jsonl", "router_load.jsonl")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps that saves a checkpoint every two."""
    folder = tmp_path_factory.mktemp("workspace")
    save_tiny_mixtral(folder / "base")
    write_workspace(
        folder,
        output_dir="run",
        model={"name_or_path": "base", "load_in_4bit": False, "dtype": "float32"},
        lora={"targets": ["attention", "experts"], "r": 4, "lora_alpha": 8},
        router={"router_aux_loss_coef": 0.02},
        data={"train": {"path": "rows.jsonl", "format": "prompt_completion"}, "max_length": 64},
        training={
            "max_steps": 8,
            "learning_rate": 0.01,
            "global_batch_size": 4,
            "per_device_train_batch_size": 4,
            "save_steps": 2,
            "logging_steps": 1,
        },
    )
    return folder


@pytest.fixture(scope="module")
def whole(workspace: Path, commands: Commands) -> Path:
    """The run on a disk with room."""
    succeed(commands.run(workspace, "train", "recipe.yaml", FINETUNE_CACHE=str(workspace / "cache")))
    return workspace / "run"


@contextmanager
def tiny_disk(folder: Path, size: int) -> Iterator[Callable[[int], None]]:
    """`disk_of`, or no test where there is none."""
    try:
        with disk_of(folder, size) as resize:
            yield resize
    except PermissionError as error:
        pytest.skip(f"no disk of one's own here: {error}")


def taken(folder: Path) -> int:
    """Bytes of the disk that a folder takes."""
    files = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // PAGE) * PAGE for size in files)


def assert_said(output: str, where: Path) -> None:
    """A message with the path, needed and free bytes, and no traceback."""
    assert "Traceback" not in output, output
    said = [line for line in output.split("\n") if f"{where}" in line and " free; free space on it" in line]
    assert any("are needed; got" in line for line in said), output


def assert_same_run(run: Path, whole: Path, how: str) -> None:
    assert_same_files(files_of(run / "adapter"), files_of(whole / "adapter"), how)
    for name in OF_THE_RUN:
        assert (run / name).read_bytes() == (whole / name).read_bytes(), f"{how}: {name}"


@pytest.mark.parametrize("share", some_short(SIZES, 1))
def test_a_run_on_a_full_disk_goes_on_and_the_same_command_finishes_it(
    share: float, workspace: Path, whole: Path, commands: Commands, tmp_path: Path
) -> None:
    run = tmp_path / "disk" / "run"
    words = ("train", "recipe.yaml", f"output_dir={run}")
    with tiny_disk(run.parent, int(share * taken(whole))) as resize:
        done = commands.run(workspace, *words, FINETUNE_CACHE=str(workspace / "cache"))
        assert_said(done.output, run)
        assert "the run goes on" in done.output
        assert done.code == (0 if (run / "adapter").exists() else 1), done.output
        assert not list(run.rglob("*.partial")), "something half-written is left"
        for checkpoint in run.glob("checkpoint-*"):
            assert verify_sums(checkpoint)
        if done.code == 1:
            assert "the same command then" in done.output
        resize(ROOM)
        succeed(commands.run(workspace, *words, FINETUNE_CACHE=str(workspace / "cache")))
        if done.code == 1:
            assert_same_run(run, whole, f"{share:.0%} of the disk")
        else:
            assert_same_files(files_of(run / "adapter"), files_of(whole / "adapter"), f"{share:.0%} of the disk")


def fill(file: Path) -> None:
    """Take all that is free on the disk."""
    with file.open("wb", buffering=0) as stream, suppress(OSError):
        while True:
            stream.write(bytes(2**16))


@pytest.mark.faults
def test_a_disk_that_is_full_for_a_while_costs_a_run_nothing(
    workspace: Path, commands: Commands, tmp_path: Path
) -> None:
    """Lines wait in memory and are written in their order, and checkpoints are saved again."""
    run, filler, steps = tmp_path / "disk" / "run", tmp_path / "disk" / "filler", 40
    with tiny_disk(run.parent, ROOM):
        words = ("train", "recipe.yaml", f"output_dir={run}", f"training.max_steps={steps}")
        running = commands.start(workspace, *words, FINETUNE_CACHE=str(workspace / "cache"))
        assert wait_for((run / "checkpoint-2").exists, running)
        fill(filler)
        assert wait_for(lambda: "it keeps its lines in memory" in running.log.read_text(errors="replace"), running)
        filler.unlink()
        done = succeed(running.wait())
        assert "that waited for space are written" in done.output
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, steps + 1))
        assert (run / f"checkpoint-{steps}").exists()
        assert verify_sums(run / "adapter")


@pytest.mark.faults
def test_a_reference_that_does_not_fit_is_continued_once_there_is_room(
    workspace: Path, commands: Commands, tmp_path: Path
) -> None:
    pairs = ({"prompt": "light " * (1 + n % 7), "chosen": "on", "rejected": "off"} for n in range(300))
    (workspace / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    run = tmp_path / "disk" / "run"
    method = ("method.kind=dpo", "method.beta=0.1", "method.reference=precomputed")
    rows = ("data.train.path=pairs.jsonl", "data.train.format=auto", "training.max_steps=2")
    words = ("train", "recipe.yaml", *method, *rows, f"output_dir={run}")
    with tiny_disk(run.parent, 36 * 2**10) as resize:
        done = commands.run(workspace, *words)
        assert done.code == 1
        assert_said(done.output, run / "reference" / "train.0.jsonl")
        before = (run / "reference" / "train.0.jsonl").read_text().split("\n")[:-1]
        assert before, done.output
        resize(ROOM)
        succeed(commands.run(workspace, *words))
        after = (run / "reference" / "train.0.jsonl").read_text().splitlines()
        assert after[: len(before)] == before
        assert len(after) == 300


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = save_tiny_mixtral(tmp_path_factory.mktemp("base"), "bfloat16")
    folder = save_adapter(base, tmp_path_factory.mktemp("adapter"), b_std=0.3)
    save_tiny_llama(folder.parent / "dense")
    return folder


COMMANDS = {
    "merge": ("merge", "ADAPTER", "--output", "OUT"),
    "export for PEFT": ("export", "ADAPTER", "--format", "peft", "--output", "OUT"),
    "export for vLLM": ("export", "ADAPTER", "--format", "vllm", "--output", "OUT"),
    "upcycle": ("upcycle", "DENSE", "OUT", "--num-experts", "4", "--top-k", "2"),
}


@pytest.mark.faults
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_on_a_full_disk_leaves_nothing_and_works_once_there_is_room(
    name: str, adapter: Path, commands: Commands, tmp_path: Path
) -> None:
    out = tmp_path / "disk" / "out"
    places = {"ADAPTER": adapter, "DENSE": adapter.parent / "dense", "OUT": out}
    words = [places.get(word, word) for word in COMMANDS[name]]
    for size in (16 * 2**10, 40 * 2**10):
        with tiny_disk(out.parent, size) as resize:
            done = commands.run(tmp_path, *words)
            assert done.code == 1, done.output
            assert_said(done.output, out)
            assert list(out.parent.iterdir()) == []
            resize(4 * ROOM)
            succeed(commands.run(tmp_path, *words))
            assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.faults
def test_a_cache_without_room_leaves_nothing_and_is_filled_once_there_is_room(
    workspace: Path, commands: Commands, tmp_path: Path
) -> None:
    cache = tmp_path / "disk" / "cache"
    with tiny_disk(cache.parent, 8 * 2**10) as resize:
        done = commands.run(workspace, "check", "recipe.yaml", FINETUNE_CACHE=str(cache))
        assert done.code == 1
        assert_said(done.output, cache)
        assert "set FINETUNE_CACHE to a folder on another disk" in done.output
        assert list(cache.iterdir()) == []
        resize(ROOM)
        succeed(commands.run(workspace, "check", "recipe.yaml", FINETUNE_CACHE=str(cache)))
        assert list(cache.iterdir())
