"""The table of published chat templates as lines for the terminal and for docs/chat-templates.md."""

from finetune.data.render.family_templates import FAMILY_TEMPLATES, PublishedTemplate

_COLUMNS = ("family", "models", "prompt opens a block", "split", "reasoning", "tool calls", "checked")


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
    if template.ends is None:
        return (f"`{name}`", template.models, *("not seen",) * 4, "")
    return (
        f"`{name}`",
        template.models,
        "yes" if template.closing else "no",
        ", ".join(template.splits) or "no",
        f"`{template.reasoning}`" if template.reasoning else "no field",
        (template.calls + (", several" if template.parallel else "")) or "unknown",
        "yes" if template.checked else "read",
    )


def _facts(template: PublishedTemplate) -> list[tuple[str, str]]:
    """Names and values; for a template that was not seen only that."""
    if template.ends is None:
        return [("read in", "not seen: finetune check shows what begins and ends its answers")]
    facts = [("read in", _source(template)), ("prompt ends in", _visible(template.prompt))]
    if template.header:
        facts.append(("answer begins with", _visible(template.header)))
    if template.closing:
        facts.append(("opened block ends in", _visible(template.closing)))
    answer, call = template.ends
    facts.append(("answer ends in", answer + (f", a call in {call}" if call not in ("", answer) else "")))
    facts.append(("loss_on", _loss_on(template)))
    facts.append(("reasoning", template.reasoning or "reads no field"))
    facts.append(("tool calls", _calls(template)))
    facts.append(("template_args", ", ".join(template.variables) or "none"))
    facts.append(("pad token", template.pad or "not looked up"))
    return [*facts, *([("to know", _visible(template.note))] if template.note else [])]


def _source(template: PublishedTemplate) -> str:
    sources = [template.source] if template.source else []
    if template.trl:
        sources.append(f"TRL: {template.trl}.jinja, compared by the tests")
    if template.mistral:
        sources.append(f"mistral-common: {template.mistral}, compared by the tests")
    return "; ".join(sources)


def _loss_on(template: PublishedTemplate) -> str:
    if not template.splits:
        return "any; a conversation is one example"
    return f"any; with assistant one example for each answer where a conversation has {' or '.join(template.splits)}"


def _calls(template: PublishedTemplate) -> str:
    if template.calls == "content only":
        return "not written: rows with calls are refused"
    if not template.calls:
        return "unknown"
    return template.calls + (", several in one message" if template.parallel else ", one in a message")


def _visible(text: str) -> str:
    """The text with its line breaks as backslash and n."""
    return text.replace("\n", "\\n")
