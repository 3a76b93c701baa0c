"""Checkpoints of a run: what it needs to continue bit for bit, and a complete adapter.

The training thread takes a snapshot; a thread of its own writes it beside its name, with a list of checksums, waits for
the disk, renames it and removes old ones. A full disk does not end the run: the last whole checkpoint stays, and it is
tried again some steps later.
"""

import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.cards import adapter_card
from finetune.checkpoint import new_folder, sync_files, write_sums
from finetune.data import template_args, template_day
from finetune.data.tokenizer import end_ids
from finetune.errors import Problem, RunError, disk_problem
from finetune.files import write_json, write_text
from finetune.generation_config import FILE, generation_settings
from finetune.methods.common import TrainerSetup
from finetune.methods.router_term import STATE_FILE as ROUTER_FILE
from finetune.methods.training_state import write_state
from finetune.model import AdapterSnapshot, save_adapter
from finetune.run import training_facts
from finetune.run.checkpoints import (
    IDENTITY_FILE,
    STATE_FILE,
    checkpoint_folder,
    checkpoints,
    remove_old,
    replace_by,
    replacement,
)

_TRIES = 10
"""A checkpoint that could not be written is tried again after a tenth of the steps between checkpoints."""


def adapter_facts(setup: TrainerSetup) -> dict[str, Any]:
    """What `finetune.json` says of the training so far."""
    tokenizer = setup.base.tokenizer
    settings = template_day(tokenizer), template_args(tokenizer)
    return training_facts(setup.run, setup.rows.counts(), tokenizer.chat_template, *settings)


def write_adapter(folder: Path, setup: TrainerSetup, adapter: AdapterSnapshot, facts: Mapping[str, Any]) -> None:
    """A complete adapter folder, except for its checksums."""
    base, tokenizer = setup.base, setup.base.tokenizer
    record = save_adapter(adapter, folder, setup.recipe, base, setup.choice, setup.initial_adapter, facts)
    tokenizer.save_pretrained(folder)
    ends = end_ids(tokenizer, (source.response_end for source in setup.recipe.data.sources("train")))
    write_json(folder / FILE, generation_settings(base.folder, ends, tokenizer.pad_token_id))
    write_text(folder / "README.md", adapter_card(record.as_dict()))


@dataclass(frozen=True)
class Snapshot:
    """Everything of one step that a checkpoint holds; no tensor of it changes any more.

    `state`: the tree of `training_state`; `trainer_state`: text; `best`: the step that is kept besides the newest.
    """

    step: int
    adapter: AdapterSnapshot
    facts: Mapping[str, Any]
    state: Mapping[str, Any]
    trainer_state: str
    router: Mapping[str, Any] | None
    best: int | None


class CheckpointSaver:
    """Writes one snapshot at a time, off the training thread. Only the main process has one."""

    def __init__(self, setup: TrainerSetup, steps_between: int) -> None:
        self.setup, self.run = setup, setup.run.path
        self._pause = max(steps_between // _TRIES, 1)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._step = 0  # of the snapshot that is being written, or was
        self.retry_at: int | None = None
        """The step at which to try again what the disk did not take."""

    def save(self, snapshot: Snapshot) -> None:
        """Wait for the checkpoint before, then write this one while the training goes on."""
        self.wait()
        self.retry_at = None
        self._step = snapshot.step
        self._thread = threading.Thread(target=self._write_noting_errors, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until the running write has ended. Raises what it raised, unless the disk is the reason."""
        if self._thread is not None:
            self._thread.join()
        self.look()

    def look(self) -> None:
        """Say what went wrong in a write that has ended, without waiting for one that has not."""
        if self._thread is None or self._thread.is_alive():
            return
        self._thread, error, self._error = None, self._error, None
        if error is None:
            return
        folder = checkpoint_folder(self.run, self._step)
        problem = disk_problem(error, folder)
        if problem is None:
            raise error
        self.retry_at = self._step + self._pause
        print(f"{problem}; the run goes on, {self._kept()}, and it is tried again at step {self.retry_at}", flush=True)

    def wait_or_raise(self) -> None:
        """As `wait`; RunError where the disk did not take the last checkpoint."""
        self.wait()
        if self.retry_at is not None:
            what = f"the checkpoint of step {self._step} could not be saved, {self._kept()}"
            raise RunError(Problem(str(self.run), what, "free space, and give the same command again"))

    def _kept(self) -> str:
        kept = list(checkpoints(self.run))
        return f"its last whole checkpoint is of step {kept[-1]}" if kept else "it has no whole checkpoint yet"

    def _write_noting_errors(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:  # raised again on the training thread
            self._error = error

    def _write(self, snapshot: Snapshot) -> None:
        target = checkpoint_folder(self.run, snapshot.step)
        # One that is there already was written before its evaluation; it stays until the new one is whole.
        written = replacement(target) if target.is_dir() else target
        with new_folder(written, tensor_bytes((snapshot.adapter.factors, snapshot.state))) as folder:
            write_adapter(folder, self.setup, snapshot.adapter, snapshot.facts)
            write_state(folder, snapshot.state)
            if snapshot.router is not None:
                write_json(folder / ROUTER_FILE, snapshot.router)
            write_text(folder / STATE_FILE, snapshot.trainer_state)
            write_json(folder / IDENTITY_FILE, {"identity": self.setup.identity})
            write_sums(folder)
            sync_files(folder)
        if written != target:
            replace_by(target, written)
        remove_old(self.run, self.setup.recipe.save.keep, snapshot.best)


def tensor_bytes(tree: Any) -> int:
    """Bytes of all tensors and arrays in nested containers."""
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        return sum(map(tensor_bytes, tree))
    return int(getattr(tree, "nbytes", 0))


def state_text(state: Any) -> str:
    """`trainer_state.json`: the fields of transformers' TrainerState, without paths."""
    fields = {**vars(state), "best_model_checkpoint": None}
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"
