"""Signals to a process that prepares or trains: real processes, which import no torch."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune.stopping import EXIT_CODES, Stop

PROGRAM = """
import ctypes, os, signal, subprocess, sys, threading, time
import finetune.stopping
from finetune.stopping import Interrupted, stop

def say(text):
    print(text, flush=True)

def step():
    for _ in range(1500):
        if stop.requested is None:
            time.sleep(0.02)
    assert stop.requested is not None
    time.sleep(0.2)

def never_returns():
    # To Python: a lock that this thread holds already. A pass through a large model looks the same to a handler.
    lock, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    library.pthread_mutex_lock(lock)
    threading.Timer(0.2, say, ["ready"]).start()
    library.pthread_mutex_lock(lock)

try:
    stop.install()
BODY
except Interrupted:
    say("interrupted")
sys.exit(stop.finish(stop.exit_code))
"""
PREPARE = """
    try:
        say("ready")
        time.sleep(30)
    finally:
        time.sleep(0.2)
        say("cleaned")
"""
TRAIN = """
    with stop.deferred():
        say("ready")
        step()
        say(stop.line("runs/a", 7))
"""
TRAIN_AND_SAVE = """
    with stop.deferred():
        open("ready", "w").close()
        step()
        say(stop.line("runs/a", 7))
        os.rename("ready", "saved")
"""
CODES = {signal.SIGTERM: 0, signal.SIGHUP: 0, signal.SIGUSR1: 85, signal.SIGINT: 130}
HINT = "\nsaving at the end of this step; Ctrl-C again ends at once, without saving\n"


def command(body: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM.replace("BODY", body)]


def start(body: str, **options: Any) -> "subprocess.Popen[str]":
    """The program, once it has said that it is ready."""
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process: subprocess.Popen[str] = subprocess.Popen(command(body), text=True, **options)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: "subprocess.Popen[str]") -> tuple[str, str, int]:
    out, err = process.communicate(timeout=20)
    return out, err, process.returncode


def test_the_signals_and_their_exit_codes() -> None:
    assert sorted(EXIT_CODES.items()) == sorted(CODES.items())
    assert Stop().exit_code == 0


def test_what_prepares_ends_at_once_and_cleans_up() -> None:
    processes = {number: start(PREPARE) for number in CODES}
    for number, process in processes.items():
        process.send_signal(number)
    time.sleep(0.1)
    for process in processes.values():
        process.send_signal(signal.SIGTERM)  # `timeout` sends its signal to the process and to its group
    for number, process in processes.items():
        assert ended(process) == ("cleaned\ninterrupted\n", "", CODES[number])


def test_what_trains_comes_to_the_end_of_its_step() -> None:
    processes = {number: start(TRAIN) for number in CODES}
    for number, process in processes.items():
        process.send_signal(number)
    time.sleep(0.1)
    for process in processes.values():
        process.send_signal(signal.SIGTERM)
    line = "stopped after step 7; run the same command again to continue from runs/a/checkpoint-7\n"
    for number, process in processes.items():
        assert ended(process) == (line, HINT if number == signal.SIGINT else "", CODES[number])


def test_the_line_says_what_continues_for_each_setting_of_resume() -> None:
    assert Stop().line() == "stopped before it trained; run the same command again"
    other = "stopped after step 7; run the same command with training.resume=auto to continue from r/checkpoint-7"
    assert Stop().line("r", 7, "never") == Stop().line("r", 7, "r/checkpoint-2") == other


def test_a_second_ctrl_c_ends_what_trains_although_python_does_not_run() -> None:
    process = start("    with stop.deferred():\n        never_returns()")
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    assert ended(process) == ("", HINT, 130)


def test_what_prepares_ends_although_python_does_not_run() -> None:
    process = start("    finetune.stopping._SECONDS_TO_PREPARE_THE_END = 0.2\n    never_returns()")
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == ("", "stopped before it trained; run the same command again\n", 85)


@pytest.mark.parametrize("what", ["stop.deferred()", "finetune.stopping.held()"])
def test_an_interruption_that_a_destructor_lost_comes_before_training_and_before_another_program(what: str) -> None:
    process = start(f"""
    class Lost:
        def __del__(self):
            say("ready")
            time.sleep(30)
    lost = Lost()
    del lost
    with {what}:
        say("goes on")
""")
    process.send_signal(signal.SIGTERM)
    out, _, code = ended(process)
    assert (out, code) == ("interrupted\n", 0)


def test_nohup_stays_in_force_and_ctrl_c_counts_in_the_background_of_a_script() -> None:
    def as_a_script_does() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = start(TRAIN, preexec_fn=as_a_script_does)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert ended(process)[2] == 130


def test_a_signal_between_two_programs_is_kept_for_the_second() -> None:
    program = """
import os, signal, sys
from finetune.stopping import held
with held():
    os.kill(os.getpid(), signal.SIGUSR1)
    os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
    words = [sys.executable, "-c", program, command(PREPARE)[-1]]
    done = subprocess.run(words, capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted\n", "", 85)


def test_a_signal_while_the_interpreter_ends_changes_nothing() -> None:
    process = start("""
    class Last:
        def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGTERM):
            kill(pid, number)
    sys.last = Last()
    with stop.deferred():
        say("ready")
        step()
""")
    process.send_signal(signal.SIGUSR1)
    assert ended(process) == ("", "", 85)


def test_a_forked_worker_is_ended_by_its_process_alone() -> None:
    """A signal to the group or to every process of a job must leave it its workers until the checkpoint is written."""
    body = """
    with stop.deferred():
        worker = os.fork()
        if not worker:
            say("ready")
            time.sleep(30)
            os._exit(0)
        step()
        say(str(os.waitpid(worker, os.WNOHANG)))
        os.kill(worker, signal.SIGTERM)
        say(str(os.waitpid(worker, 0)[1]))
"""
    for number in CODES:
        process = start(body, start_new_session=True)
        if number != signal.SIGTERM:
            (worker,) = psutil.Process(process.pid).children()
            worker.send_signal(number)
        os.killpg(process.pid, number)
        assert ended(process)[::2] == (f"(0, 0)\n{signal.SIGTERM.value}\n", CODES[number])


def test_the_checkpoint_is_written_although_ctrl_c_ended_tee_too(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    process = subprocess.Popen(command(TRAIN_AND_SAVE), stdout=writes, stderr=writes, cwd=tmp_path, env=environment())
    os.close(writes)
    wait_for(tmp_path / "ready")
    os.close(reads)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert (tmp_path / "saved").exists()


def test_a_closed_terminal_is_taken_as_sigterm(tmp_path: Path) -> None:
    master, terminal = pty.openpty()
    words = command(TRAIN_AND_SAVE)
    words[-1] = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n" + words[-1]
    process = subprocess.Popen(
        words,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        cwd=tmp_path,
        env=environment(),
    )
    os.close(terminal)
    wait_for(tmp_path / "ready")
    os.close(master)  # the kernel sends SIGHUP
    assert process.wait(20) == 0
    assert (tmp_path / "saved").exists()


def test_the_death_of_the_launcher_is_taken_as_sigterm() -> None:
    watch = """
    import psutil
    finetune.stopping._SECONDS_BETWEEN_LOOKS = 0.1
    stop.watch(psutil.Process(os.getppid()), 60)
"""
    program = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(30)"
    words = [sys.executable, "-c", program, command(watch + TRAIN)[-1]]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == "ready\n"
        (child,) = psutil.Process(launcher.pid).children()
        launcher.kill()
        assert "stopped after step 7" in launcher.stdout.readline()
        assert psutil.wait_procs([child], 5)[1] == []


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert path.exists()
