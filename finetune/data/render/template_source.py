"""What a chat template's source says without being run: which variables it reads, and what no template may contain."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Template, meta, nodes

from finetune.data.render.sandbox import ANOTHER_TEMPLATE, CHARACTERS, compile_template, environment, syntax_tree
from finetune.data.row_errors import shown
from finetune.errors import DataError, Problem, RecipeError
from finetune.recipe.error_messages import closest

LONGEST_SOURCE = 300_000
"""Characters of a template; published ones have up to 20,000."""

_GIVEN = frozenset(("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"))
"""What is given to a template beside special tokens and `data.template_args`."""

_SWITCH_WORDS = frozenset(("true", "false", "yes", "no", "on", "off"))
"""Words that are meant as true or false: YAML 1.2 reads yes, no, on and off as text."""

_ELSEWHERE: dict[type[nodes.Node], str] = {
    nodes.Include: "include",
    nodes.Import: "import",
    nodes.FromImport: "from",
    nodes.Extends: "extends",
}
_RANDOM = (nodes.Filter, "random"), (nodes.Name, "lipsum")
# `%99d` and `{:99}`
_WIDTH = re.compile(r"%[-+ #0]*(\d+)|\{[^{}]*:[^{}\"']*?(\d+)[^{}\"']*\}")
_PLACE = "data.chat_template"


def compile_templates(sources: Sequence[str], name: str) -> list[Template]:
    """The templates, ready to be run by `sandbox.write`; `DataError` for what is none, with all else seen in it."""
    if unusable := [problem for source in sources for problem in _unusable(source, name)]:
        raise DataError([*dict.fromkeys(unusable), *source_problems(sources, name)])
    return [compile_template(source, name) for source in sources]


def source_problems(sources: Sequence[str], name: str) -> list[Problem]:
    """What may not stand in a template, although it can be run with it."""
    short = [source for source in sources if len(source) <= LONGEST_SOURCE]
    return list(dict.fromkeys(problem for source in short for problem in _forbidden(source, name)))


@lru_cache
def _unusable(source: str, name: str) -> tuple[Problem, ...]:
    """Why a text is no chat template; `DataError` if it cannot be read."""
    if len(source) > LONGEST_SOURCE:
        what = f"{name} has {len(source):,} characters, more than {LONGEST_SOURCE:,}: that is no chat template"
        return (Problem(_PLACE, what, ANOTHER_TEMPLATE, shown(source.strip())),)
    tree = syntax_tree(source, name)
    what = f"{name} has a number above {CHARACTERS:,}: a text of such a length would fill the memory"
    large = [(node.lineno, node.value) for node in tree.find_all(nodes.Const) if _is_large(node.value)]
    if large:  # Jinja computes with constants while it compiles
        return tuple(Problem(_PLACE, what, ANOTHER_TEMPLATE, f"{shown(value)} (line {line})") for line, value in large)
    tree = _tree(source, name)
    what, do = f"{name} takes a part of itself from another file", "put that text into the template itself"
    elsewhere = [(node.lineno, _ELSEWHERE[type(node)]) for node in tree.find_all(tuple(_ELSEWHERE))]
    problems = [Problem(_PLACE, what, do, f"{{% {kind} %}} (line {line})") for line, kind in elsewhere]
    if "messages" not in meta.find_undeclared_variables(tree):
        what = f"{name} reads no messages: that is no chat template"
        problems.append(Problem(_PLACE, what, ANOTHER_TEMPLATE, shown(source.strip())))
    return tuple(problems)


@lru_cache
def variables_of(source: str, name: str) -> tuple[str, ...]:
    """The variables that `data.template_args` can give a template.

    It reads them without having set them on every way there. One that it sets on some way is its own, unless it asks
    whether it was given: it `is defined`, or each value that it is set to is made of its own.
    """
    tree = _tree(source, name)
    own = set(_set_anew(tree)) - set(_asked_for(tree))
    read = meta.find_undeclared_variables(tree) - own
    return tuple(sorted(variable for variable in read if not _is_reserved(variable)))


def check_template_args(variables: Sequence[str], args: Mapping[str, Any], name: str) -> None:
    """Raise `RecipeError` for every variable of `data.template_args` that is none of those which the template reads.

    `variables` are the template's (`variables_of`); what only the program may set is never among them.
    """
    problems = [problem for key in args if (problem := _arg_problem(key, args[key], variables, name)) is not None]
    if problems:
        raise RecipeError(problems)


def _arg_problem(key: str, value: Any, variables: Sequence[str], name: str) -> Problem | None:
    where, got = f"data.template_args.{key}", shown(value)
    if _is_reserved(key):
        return Problem(where, "the program itself gives this variable to every chat template", "remove it", got)
    if key in variables:
        if isinstance(value, str) and value.lower() in _SWITCH_WORDS:
            do = "write true or false, without quotes"
            return Problem(where, "is text, which a template takes for true", do, got)
        return None
    if close := closest(key, variables):
        do = f"did you mean {close}?"
    elif variables:
        do = f"remove it, or write one that it reads: {', '.join(variables)}"
    else:
        do = f"remove it: {name} reads no variable beside the messages"
    return Problem(where, f"{name} does not read this variable", do, got)


def _is_reserved(variable: str) -> bool:
    return variable in _GIVEN or variable.endswith(("_token", "_tokens")) or variable in environment().globals


@lru_cache
def _tree(source: str, name: str) -> nodes.Template:
    compile_template(source, name)  # finds what parsing does not: filters and tests that do not exist
    return syntax_tree(source, name)


def _set_anew(tree: nodes.Template) -> Iterator[str]:
    """The variables that a template sets, as a loop does, too, to what is not made of their own value."""
    of_itself = {
        id(setting.target)
        for setting in tree.find_all(nodes.Assign)
        if any(_is_name(setting.target, read.name) for read in _names(setting.node))
    }
    return (node.name for node in _names(tree) if node.ctx == "store" and id(node) not in of_itself)


def _asked_for(tree: nodes.Template) -> Iterator[str]:
    """The variables of which a template asks whether they are defined; a macro may ask that of its arguments."""
    arguments = {node.name for node in _names(tree) if node.ctx == "param"}
    for asking in tree.find_all(nodes.Test):
        if asking.name in ("defined", "undefined") and isinstance(asking.node, nodes.Name):
            yield from {asking.node.name} - arguments


def _names(node: nodes.Node) -> list[nodes.Name]:
    """Every variable inside a node, itself included."""
    return [*([node] if isinstance(node, nodes.Name) else []), *node.find_all(nodes.Name)]


@lru_cache
def _forbidden(source: str, name: str) -> tuple[Problem, ...]:
    parts = syntax_tree(source, name).find_all(nodes.Node)
    found = [(what, f"{seen} (line {node.lineno})") for node in parts for what, seen in _seen(node)]
    return tuple(Problem(_PLACE, f"{name} {what}", ANOTHER_TEMPLATE, got) for what, got in found)


def _seen(node: nodes.Node) -> Iterator[tuple[str, object]]:
    """What is wrong with a part of a template, and what it says."""
    if isinstance(node, nodes.Filter | nodes.Name) and (type(node), node.name) in _RANDOM:
        yield "draws at random, so training and inference would differ", node.name
    inside = _attribute(node)
    if isinstance(inside, str) and inside.startswith("__"):
        yield "asks for Python's insides, which the sandbox of chat templates forbids", inside


def _is_large(value: object) -> bool:
    """Whether a constant is a number, or the format of a number, of more characters than any text may have."""
    if isinstance(value, int):
        return value > CHARACTERS
    widths = _WIDTH.findall(value) if isinstance(value, str) else []
    return any(int(width[:20]) > CHARACTERS for pair in widths for width in pair if width)


def _is_name(node: nodes.Node, name: str) -> bool:
    return isinstance(node, nodes.Name) and node.name == name


def _attribute(node: nodes.Node) -> object:
    """What a node reads of an object by a name in the source: `x.name`, `x["name"]`, `x | attr("name")`."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem):
        return getattr(node.arg, "value", None)
    if isinstance(node, nodes.Filter) and node.name == "attr" and node.args:
        return getattr(node.args[0], "value", None)
    return None
