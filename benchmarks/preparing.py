"""What preparing rows costs beside the bare tokenizer on the same rendered texts, and what packing adds.

Three arms take turns: `encode_batch` in one call; `prepare` from a JSONL file to the finished rows in an empty cache;
the packing of those rows. The tokenizer uses all cores of the machine in each of them, so time is taken on the wall;
processor time, all threads together, is reported, too.
"""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.harness import Bar, Timings, interleaved
from benchmarks.packing_waste import CAPACITY, draw_lengths
from finetune.data import prepare
from finetune.data.formats import reader
from finetune.data.render import Renderer
from finetune.data.types import Conversation
from finetune.recipe import DataSettings, DataSource

MEAN_TOKENS, SIGMA = 490, 1.0
ROWS = 8_000
PREPARE_LIMIT, PACK_LIMIT = 1.10, 0.20
BARE, PREPARE, PACK = "bare encode_batch", "prepare", "packing"


def write_rows(path: Path, rows: int, characters_a_token: float, seed: int = 0) -> None:
    """Conversations of one to three exchanges out of Python's own documentation, a lognormal number of tokens long."""
    text = "\n\n".join(topics.values())
    draw = random.Random(seed)

    def passage(length: int) -> str:
        start = draw.randrange(len(text) - length - 1)
        return text[start : start + length].strip() or "..."

    with path.open("w", encoding="utf-8") as file:
        for tokens in draw_lengths(MEAN_TOKENS, SIGMA, rows, seed):
            exchanges = draw.randint(1, 3)
            room = max(int(tokens * characters_a_token) // exchanges, 16)
            turns = [("user", room // 3), ("assistant", room - room // 3)] * exchanges
            messages = [{"role": role, "content": passage(length)} for role, length in turns]
            file.write(json.dumps({"messages": messages}) + "\n")


def characters_a_token(tokenizer: Any) -> float:
    """How many characters a token of this tokenizer holds on the text of the rows."""
    text = "\n\n".join(topics.values())
    return len(text) / len(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def settings_for(path: Path, packing: bool = False) -> DataSettings:
    """Rows as `messages`, over-long ones cut."""
    source = DataSource(path=str(path), format="messages")
    return DataSettings(train=source, max_length=CAPACITY, overlong="truncate", packing=packing)


def rendered_texts(path: Path, tokenizer: Any) -> list[str]:
    """What `prepare` gives the tokenizer."""
    renderer, read = Renderer(tokenizer, "the template"), reader("messages", {})
    texts = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            example = read(json.loads(line))
            assert isinstance(example, Conversation)
            texts.append(renderer.render(example).text)
    return texts


class Metered:
    """A step that notes its processor seconds, all threads together, each time it runs; it says nothing meanwhile."""

    def __init__(self, step: Callable[[], Any]) -> None:
        self.step = step
        self.cpu_seconds: list[float] = []

    def __call__(self) -> Any:
        """Run it."""
        started = time.process_time()
        with contextlib.redirect_stderr(io.StringIO()):
            result = self.step()
        self.cpu_seconds.append(time.process_time() - started)
        return result


class Arms:
    """The three steps on one file; each preparation and each packing starts without what the one before has left."""

    def __init__(self, path: Path, tokenizer: Any, cache: Path) -> None:
        self.settings, self.packed = settings_for(path), settings_for(path, packing=True)
        self.tokenizer, self.cache = tokenizer, cache
        self.texts = rendered_texts(path, tokenizer)
        self._number = itertools.count()

    def encode(self) -> Any:
        """One call on everything."""
        return self.tokenizer.backend_tokenizer.encode_batch(self.texts, add_special_tokens=False)

    def prepare(self) -> Any:
        """From the file to the finished rows, nothing cached."""
        os.environ["FINETUNE_CACHE"] = str(self.cache / f"fresh-{next(self._number)}")
        return prepare(self.settings.sources("train"), self.tokenizer, self.settings, seed=0)

    def pack(self) -> Any:
        """The same with packing, the rows themselves from the cache."""
        os.environ["FINETUNE_CACHE"] = str(self.cache / "rows")
        for entry in (self.cache / "rows").glob("packed-*"):
            shutil.rmtree(entry)
        return prepare(self.packed.sources("train"), self.tokenizer, self.packed, seed=0)


def check_same_work(arms: Arms) -> dict[str, Any]:
    """Stops where `prepare` and the bare call do not give the same ids; else what the rows are."""
    rows, bare = arms.prepare().dataset, arms.encode()
    for row, encoding in zip(rows, bare, strict=True):
        if row["input_ids"] != encoding.ids[:CAPACITY]:
            raise SystemExit(
                f"bench: prepare and encode_batch differ at {row['row']}; the comparison would not be fair"
            )
    lengths = np.array([len(encoding.ids) for encoding in bare])
    return {"rows": len(bare), "tokens": int(lengths.sum()), "mean_tokens": float(lengths.mean())}


def measure_preparing(name: str, tokenizer: Any, repeats: int, rows: int = ROWS) -> tuple[list[Bar], dict[str, Any]]:
    """Bars and raw figures of one tokenizer."""
    with TemporaryDirectory() as folder, _environment_kept():
        path = Path(folder, "rows.jsonl")
        write_rows(path, rows, characters_a_token(tokenizer))
        arms = Arms(path, tokenizer, Path(folder))
        work = check_same_work(arms)
        steps = {BARE: Metered(arms.encode), PREPARE: Metered(arms.prepare), PACK: Metered(arms.pack)}
        timings = interleaved(steps, repeats, clock=time.perf_counter, at_least=0)
    at = f"{name}, mean {work['mean_tokens']:.0f} tokens"
    cpu = Timings({arm: step.cpu_seconds[-repeats:] for arm, step in steps.items()})
    bars = [
        Bar(f"{PREPARE} / {BARE}, time", at, timings.ratio(PREPARE, BARE), "<=", PREPARE_LIMIT, "time"),
        Bar(f"{PREPARE} / {BARE}, processor time", at, cpu.ratio(PREPARE, BARE), "<=", None, "time"),
        Bar(f"{PACK} / {BARE}, time", at, timings.ratio(PACK, BARE), "<=", PACK_LIMIT, "time"),
    ]
    seconds = {
        arm: {"seconds": timings.seconds[arm], "cpu_seconds": cpu.seconds[arm], "median": timings.median(arm)}
        for arm in steps
    }
    return bars, work | {"tokenizer": name, "arms": seconds}


@contextlib.contextmanager
def _environment_kept() -> Iterator[None]:
    before = os.environ.get("FINETUNE_CACHE")
    try:
        yield
    finally:
        os.environ.pop("FINETUNE_CACHE", None)
        if before is not None:
            os.environ["FINETUNE_CACHE"] = before
