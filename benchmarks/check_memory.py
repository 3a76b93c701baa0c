"""Peak memory of `finetune check` as the number of rows grows: in a process of its own, on generated JSONL."""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.harness import Bar
from tests.support import save_tiny_mixtral

SIZES = (100_000, 1_000_000)
LIMIT = 1.15

_RECIPE = """\
output_dir: {folder}/run
model: {{name_or_path: {folder}/model, load_in_4bit: true, dtype: float32}}
lora: {{targets: [attention], r: 8, lora_alpha: 16}}
router: {{router_aux_loss_coef: 0.02}}
method: {{kind: sft}}
data:
  train: {{path: {folder}/rows.jsonl, format: messages}}
  max_length: 256
  packing: true
training: {{max_steps: 1, learning_rate: 1e-3, global_batch_size: 1}}
"""

# The peak of the process itself (VmHWM); `ru_maxrss` of a child begins at what its parent held.
_CHILD = """
import json, sys
from pathlib import Path
from finetune.cli.main import main
code = main(["check", *sys.argv[2:]])
status = Path("/proc/self/status").read_text()
Path(sys.argv[1]).write_text(json.dumps({"exit": code, "peak_KiB": int(status.partition("VmHWM:")[2].split()[0])}))
"""

_TEXT = "the a light lamp kitchen door turn on off set timer to ten minutes please now and then open close what is"
_WORDS = _TEXT.split()


def write_rows(path: Path, rows: int, seed: int = 0) -> None:
    """Short conversations, no two alike."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            question = f"{number}: {' '.join(draw.choices(_WORDS, k=draw.randint(3, 12)))}?"
            answer = " ".join(draw.choices(_WORDS, k=draw.randint(1, 8)))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def check(rows: int) -> dict[str, Any]:
    """Rows, file size, seconds, and peak bytes of one `finetune check`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder / "rows.jsonl", rows)
        save_tiny_mixtral(folder / "model")
        (folder / "recipe.yaml").write_text(_RECIPE.format(folder=folder), encoding="utf-8")
        command = [sys.executable, "-c", _CHILD, str(folder / "result.json"), str(folder / "recipe.yaml")]
        environment = os.environ | {"FINETUNE_CACHE": str(folder / "cache")}
        started = time.monotonic()
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.monotonic() - started
        if run.returncode or json.loads((folder / "result.json").read_text())["exit"]:
            raise SystemExit(f"bench: finetune check failed on {rows} generated rows:\n{run.stdout}{run.stderr}")
        peak = json.loads((folder / "result.json").read_text())["peak_KiB"] * 1024
        size = (folder / "rows.jsonl").stat().st_size
    return {"rows": rows, "file_bytes": size, "seconds": seconds, "peak_bytes": peak}


def measure_check(sizes: tuple[int, int] = SIZES) -> tuple[list[Bar], dict[str, Any]]:
    """The ratio of the peaks of the larger and the smaller file, and what a row more costs."""
    small, large = (check(rows) for rows in sizes)
    at = f"{sizes[0]:,} and {sizes[1]:,} rows"
    ratio = large["peak_bytes"] / small["peak_bytes"]
    a_row = (large["peak_bytes"] - small["peak_bytes"]) / (sizes[1] - sizes[0])
    bars = [
        Bar("peak of finetune check, many rows / few", at, ratio, "<=", LIMIT, "memory"),
        Bar("bytes of that peak for each row more", at, a_row, "<=", None, "memory"),
    ]
    return bars, {"small": small, "large": large}
