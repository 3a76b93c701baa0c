"""The table of published chat templates as lines for the terminal and for docs/chat-templates.md."""

import json

from finetune.data.render.family_templates import FAMILY_TEMPLATES, PublishedTemplate

_COLUMNS = ("family", "models", "prompt opens a block", "split", "reasoning", "tool calls", "template")


def template_lines(model_type: str) -> list[str]:
    """What the published templates of a family do, one block for each template."""
    lines: list[str] = []
    for template in FAMILY_TEMPLATES[model_type]:
        lines += [*([""] if lines else []), f"chat template of {template.models}"]
        facts = _facts(template)
        width = max(len(name) for name, _ in facts)
        lines += [f"  {name.ljust(width)}  {fact}" for name, fact in facts]
    return lines


def templates_page() -> str:
    """The table in Markdown: an overview, and the lines of every family."""
    rows = [(name, template) for name, templates in FAMILY_TEMPLATES.items() for template in templates]
    lines = ["| " + " | ".join(_COLUMNS) + " |", "| " + " | ".join("---" for _ in _COLUMNS) + " |"]
    lines += ["| " + " | ".join(_overview(*row)) + " |" for row in rows]
    for name in FAMILY_TEMPLATES:
        lines += ["", f"### {name}", "", "```text", *template_lines(name), "```"]
    return "\n".join(lines) + "\n"


def _overview(name: str, template: PublishedTemplate) -> tuple[str, ...]:
    if not template.calls:
        return f"`{name}`", template.models, *("unknown",) * 4, "no"
    return (
        f"`{name}`",
        template.models,
        "yes" if template.closing else "no",
        ", ".join(template.splits) or "no",
        f"`{template.reasoning}`" if template.reasoning else "no field",
        template.calls + (", several" if template.parallel else ""),
        "compared" if template.trl or template.mistral else "read",
    )


def _facts(template: PublishedTemplate) -> list[tuple[str, str]]:
    """Names and values of what is known."""
    if template.ends is None:
        return [("template", "not seen: finetune check shows what begins and ends its answers")]
    answer, call = template.ends
    ends = _shown(answer) + (f", a call in {_shown(call)}" if call not in ("", answer) else "")
    facts = [("template", _source(template)), ("prompt ends in", _shown(template.prompt))]
    facts += [("answer begins with", _shown(template.header))] * bool(template.header)
    facts += [("opened block ends in", _shown(template.closing))] * bool(template.closing)
    facts.append(("answer ends in", ends))
    if template.calls:  # the template itself was seen
        facts.append(("loss_on", _loss_on(template)))
        facts.append(("reasoning", f"read from {template.reasoning}" if template.reasoning else "reads no field"))
        facts.append(("tool calls", _calls(template)))
    facts += [("template_args", ", ".join(template.variables))] * bool(template.variables)
    facts += [("pad token", template.pad)] * bool(template.pad)
    return [*facts, *([("to know", template.note)] * bool(template.note))]


def _source(template: PublishedTemplate) -> str:
    """Where the template was read, and whether the tests compare the row with it."""
    sources = [template.source] if template.source else []
    if template.trl:
        sources.append(f"TRL: {template.trl}.jinja, compared by the tests")
    if template.mistral:
        sources.append(f"mistral-common: {template.mistral}, compared by the tests")
    return "; ".join(sources)


def _loss_on(template: PublishedTemplate) -> str:
    if not template.splits:
        return "any: a conversation is one example"
    one_each = f"assistant: where a conversation has {' or '.join(template.splits)}, one example for each answer"
    return f"{one_each} (all: refused); completion: likewise after the last user message; last_assistant: one example"


def _calls(template: PublishedTemplate) -> str:
    if template.calls == "content only":
        return "not written: rows with calls are refused"
    number = "several in one message" if template.parallel else "one in a message"
    dropped = "" if template.lists_tools else "; definitions of tools are not written: rows with them are refused"
    return f"{template.calls}, {number}{dropped}"


def _shown(text: str) -> str:
    """The text in quotes, a line break as backslash and n."""
    return json.dumps(text, ensure_ascii=False)
