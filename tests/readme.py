"""The commands that the README shows."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def shell_commands(markdown: str) -> list[str]:
    """Commands of the ```sh blocks: comments off, continued lines joined."""
    blocks = re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", markdown, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = (" ".join(shlex.split(line, comments=True)) for line in lines)
    return [part.strip() for command in commands if command for part in command.split("&&")]


COMMANDS = shell_commands((ROOT / "README.md").read_text(encoding="utf-8"))
