"""Where each turn begins in a rendered conversation, and the proof that generation's prompt ends there: one rendering.

The prompt before turn i is the template's output for the turns before it. Rendering every such prefix
costs as much again for each answer. It can be avoided where the template, run on the whole conversation, is seen to
write all of that output before it looks at turn i in any way, and to look then only in order to begin the next round of
its one main loop: on the prefix it must have done the same up to there, left the loop, and written its fixed ending.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jinja2 import Template, nodes

from finetune.data.types import Message

_TURNS, _PROMPTING = "messages", "add_generation_prompt"
_ELSEWHERE: tuple[type[nodes.Node], ...] = (
    *(nodes.Macro, nodes.Block, nodes.Extends, nodes.Include, nodes.Import, nodes.FromImport),
)
_SO_FAR = ("index", "index0", "first", "previtem")


class Turns:
    """The messages as a template sees them; notes how much was written when each was first looked at."""

    def __init__(self, messages: Sequence[Message], written: list[str]) -> None:
        self._messages = messages
        self._written = written
        self._loops = 0
        # For each turn looked at so far: how many pieces had been written, and by which loop (0: not by a loop).
        self._looks: list[tuple[int, int]] = []

    def __iter__(self) -> Iterator[Message]:
        self._loops += 1
        loop = self._loops
        for index, message in enumerate(self._messages):
            self._look(index, loop)
            yield message

    def __getitem__(self, index: int | slice) -> Any:
        last = len(self._messages) - 1
        if isinstance(index, slice) or index < 0:
            self._look(last, 0)  # depends on how many there are
        elif index <= last:
            self._look(index, 0)
        return self._messages[index]

    def starts(self) -> list[int | None]:
        """Characters written before each turn; None where something else than the last loop looked at it first."""
        ends = [0]
        for piece in self._written:
            ends.append(ends[-1] + len(piece))
        return [ends[pieces] if loop and loop == self._loops else None for pieces, loop in self._looks]

    def _look(self, index: int, loop: int) -> None:
        # To look at a turn is to see that those before it are there.
        for _ in range(len(self._looks), index + 1):
            self._looks.append((len(self._written), loop))


def ending(template: Template, source: str) -> str | None:
    """The text that the template always writes after its main loop to make the model answer; None if it is not fixed.

    None, too, where the template may look at its messages in a way that `Turns` does not see.
    """
    tree = template.environment.parse(source)
    over = [loop for loop in tree.find_all(nodes.For) if _is_name(loop.iter, _TURNS)]
    seen = {id(loop.iter) for loop in over} | {id(item.node) for item in tree.find_all(nodes.Getitem)}
    if any(id(name) not in seen for name in tree.find_all(nodes.Name) if name.name == _TURNS):
        return None
    places = [place for place, node in enumerate(tree.body) if any(node is loop for loop in over)]
    if not places or any(tree.find(kind) for kind in _ELSEWHERE):
        return None
    main = tree.body[places[-1]]
    assert isinstance(main, nodes.For)
    if (
        main.else_
        or main.recursive
        or main.test
        or any(node is loop for node in main.find_all(nodes.For) for loop in over)
    ):
        return None
    prompting = sum(name.name == _PROMPTING for name in tree.find_all(nodes.Name))
    return None if _looks_ahead(main.body) else _fixed(tree.body[places[-1] + 1 :], prompting)


def _looks_ahead(body: Iterable[nodes.Node]) -> bool:
    """Whether anything asks `loop` for more than what was so far: `loop.last` fetches the next turn to know."""
    for node in body:
        if isinstance(node, nodes.Getattr) and _is_name(node.node, "loop"):
            if node.attr not in _SO_FAR:
                return True
        elif _is_name(node, "loop"):
            return True
        elif isinstance(node, nodes.For):  # its body has a `loop` of its own
            if _looks_ahead([node.iter, *node.else_]):
                return True
        elif _looks_ahead(node.iter_child_nodes()):
            return True
    return False


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _fixed(tail: Sequence[nodes.Node], prompting: int) -> str | None:
    """The text of `tail` with the generation prompt asked for, if it holds all `prompting` uses of that."""
    text = ""
    for node in tail:
        if isinstance(node, nodes.If) and isinstance(node.test, nodes.Name) and node.test.name == _PROMPTING:
            if node.elif_ or node.else_:
                return None
            prompting -= 1
            inner = _fixed(node.body, 0)
        else:
            inner = _constant(node)
        if inner is None:
            return None
        text += inner
    return text if prompting == 0 else None


def _constant(node: nodes.Node) -> str | None:
    if not isinstance(node, nodes.Output):
        return None
    texts = []
    for part in node.nodes:
        value = part.data if isinstance(part, nodes.TemplateData) else getattr(part, "value", None)
        if not isinstance(value, str):
            return None
        texts.append(value)
    return "".join(texts)
