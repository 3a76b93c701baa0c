"""Starts merges at once: imports everything, then forks a process for each line of words on its input.

Prints the process's number; its output goes to the file that the line names first.
"""

import json
import os
import sys

import peft  # noqa: F401
import transformers

import finetune.merge
from finetune.cli.main import main

assert finetune.merge
assert transformers.MixtralForCausalLM  # imported when it is asked for


def serve() -> None:
    for line in sys.stdin:
        log, *words = json.loads(line)
        child = os.fork()
        if child == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os._exit(main(words))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    serve()
