"""Two machines: namespaces of this one (network, processes, name, mounts) with a cable between them; needs root."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

NETWORK = "10.213.71"
_IN_IT = 'hostname "$0" && mount --bind "$HOSTS" /etc/hosts && exec "$@"'


@dataclass
class Machine:
    """One of them. Everything that `start` starts sees only its own processes."""

    number: int
    logs: Path
    _started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Also the host name that its processes see."""
        return f"ft{os.getpid()}-{self.number}"

    @property
    def interface(self) -> str:
        return f"ve{os.getpid()}-{self.number}"

    @property
    def address(self) -> str:
        return f"{NETWORK}.{self.number + 1}"

    def ip(self, *words: str) -> None:
        """`ip` on this machine."""
        _ip("-n", self.name, *words)

    def plug(self, up: bool) -> None:
        """Put its end of the cable in, or pull it."""
        self.ip("link", "set", self.interface, "up" if up else "down")

    def start(self, folder: Path, *words: str, **environment: str) -> "Command":
        """A command on this machine."""
        inside = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", _IN_IT, self.name]
        log = self.logs / f"{self.name}-{len(self._started)}.log"
        variables = {
            **os.environ,
            "HOSTS": str(self.logs / "hosts"),
            "GLOO_SOCKET_IFNAME": self.interface,
            **environment,
        }
        with log.open("wb") as output:
            command = ["ip", "netns", "exec", self.name, *inside, *words]
            started = subprocess.Popen(command, cwd=folder, env=variables, stdout=output, stderr=output)
        self._started.append(started)
        return Command(started, log)

    def end(self) -> None:
        for started in self._started:
            with suppress(ProcessLookupError):
                started.kill()
            started.wait()


@dataclass
class Command:
    """What runs on a machine: `unshare`, and below it the command itself as process 1."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def last_line(self) -> str:
        return self.output.rstrip().splitlines()[-1]

    def rank(self) -> psutil.Process:
        """Its one training process."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return next(child for child in below if "finetune.train" in child.cmdline() and "RANK" in child.environ())

    def kill_machine(self) -> None:
        """SIGKILL to every process of the machine at once, as the kernel does when process 1 ends."""
        first = psutil.Process(self.process.pid).children()[0]
        first.send_signal(signal.SIGKILL)

    def wait(self, seconds: float) -> tuple[int, float]:
        """Exit code, and after how many seconds."""
        since = time.monotonic()
        try:
            return self.process.wait(seconds), time.monotonic() - since
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end within {seconds} s:\n{self.output}") from None


@contextmanager
def two_machines(logs: Path) -> Iterator[Sequence[Machine]]:
    """Both, connected. PermissionError where namespaces may not be made."""
    machines = [Machine(number, logs) for number in (0, 1)]
    names = [f"{machine.address} {machine.name}\n" for machine in machines]
    (logs / "hosts").write_text("".join(["127.0.0.1 localhost\n", *names]))
    try:
        for machine in machines:
            _ip("netns", "add", machine.name)
        _ip("link", "add", machines[0].interface, "type", "veth", "peer", "name", machines[1].interface)
        for machine in machines:
            _ip("link", "set", machine.interface, "netns", machine.name)
            machine.ip("addr", "add", f"{machine.address}/24", "dev", machine.interface)
            machine.ip("link", "set", "lo", "up")
            machine.plug(up=True)
        yield machines
    finally:
        for machine in machines:
            machine.end()
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True, check=False)


def _ip(*words: str) -> None:
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise PermissionError("there is no program ip") from None
    if done.returncode != 0:
        raise PermissionError(done.stderr.strip())
