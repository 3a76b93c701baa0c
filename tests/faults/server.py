"""Starts commands at once: imports everything, then forks a process for each line on its input.

A line is JSON: `{"words": ["train", "recipe.yaml"], "folder": ..., "log": ...}` is answered with the number of the
process, which leads a process group of its own and writes into `log`; `{"wait": number}` with its exit code, minus the
signal of one that was killed. What a command imports besides is imported here once it has ended, for the next ones.
"""

import importlib
import json
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import peft
import transformers
import trl
from tqdm import tqdm

import finetune.merge
import finetune.train
from finetune.cli.main import main

assert peft, trl
assert transformers.MixtralForCausalLM  # imported when it is asked for
assert finetune.merge


def detach(job: dict[str, Any]) -> None:
    """Make this forked process as independent of the server as one that a shell starts."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell has started the tests with `&`
    output = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(opened, descriptor)
    # Forks share tqdm's lock: after a kill in the middle of drawing a bar nobody could draw one any more.
    tqdm.set_lock(threading.RLock())
    os.chdir(job["folder"])
    os.environ.update(job["environment"])
    sys.argv = ["finetune", *job["words"]]


def run(words: list[str]) -> int:
    """The command's exit code. `train` would start a launcher, and that a process which imports everything again."""
    return finetune.train.main(words[1:]) if words[0] == "train" else main(words)


def imported_file(log: str) -> Path:
    return Path(f"{log}.imported")


def import_what_it_did(job: dict[str, Any]) -> None:
    path = imported_file(job["log"])
    for name in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        if name not in sys.modules:
            with suppress(Exception):
                importlib.import_module(name)


def work(job: dict[str, Any]) -> NoReturn:
    """A forked process to its end. As the interpreter ends one, but without taking the modules apart: a second."""
    code = 1
    try:
        detach(job)
        code = run(job["words"])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    for thread in threading.enumerate():
        if not thread.daemon and thread is not threading.current_thread():
            thread.join()
    sys.stdout.flush()
    sys.stderr.flush()
    imported_file(job["log"]).write_text("\n".join(sys.modules), encoding="utf-8")
    os._exit(code)


def serve(answers: TextIO) -> None:
    """Answer until the input ends; then end whatever still runs."""
    jobs: dict[int, dict[str, Any]] = {}
    for line in sys.stdin:
        job = json.loads(line)
        if number := job.get("wait"):
            _, status = os.waitpid(number, 0)
            print(os.waitstatus_to_exitcode(status), file=answers, flush=True)
            import_what_it_did(jobs.pop(number))
            continue
        child = os.fork()
        if child == 0:
            work(job)
        jobs[child] = job
        print(child, file=answers, flush=True)
    for number in jobs:
        with suppress(ProcessLookupError):
            os.killpg(number, signal.SIGKILL)


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # some modules print when they are imported
    serve(answers)
    os._exit(0)
