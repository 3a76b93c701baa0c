"""A chat template that no run could use is refused by its name, with the piece of text, all its problems at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data import prepare
from finetune.data.render import Renderer, read_template, sandbox, set_template_args
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation
from finetune.errors import DataError, RecipeError
from finetune.recipe import DataSettings
from finetune.recipe.settings import LossOn
from tests.rendering import chat, weather
from tests.support import tiny_tokenizer

CHATML = read_template("chatml")
SIMPLE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\nWORDS<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ANOTHER = "name another one in data.chat_template"
CHANGES = "X changes the answer or writes its own words into it"
LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
DIFFER = "so training and inference would differ"


def words(expression: str) -> str:
    """A ChatML whose turns say this."""
    return SIMPLE.replace("WORDS", expression)


def only_for(role: str, code: str) -> str:
    """A ChatML that does something where a message has a role."""
    return words(f"{{% if m.role == '{role}' %}}{code}{{% endif %}}{{{{ m.content }}}}")


def renderer(template: str, loss_on: LossOn = "assistant", **args: Any) -> Renderer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    set_template_args(tokenizer, args)
    return Renderer(tokenizer, "X", loss_on)


def problems(template: str, **args: Any) -> list[str]:
    """What is said of a template before any row is read."""
    with pytest.raises((DataError, RecipeError)) as caught:
        renderer(template, **args)
    return str(caught.value).split("\n")


def row_problem(template: str, row: Conversation, **args: Any) -> str:
    """What is said of a row under a template that is good for others."""
    with pytest.raises(RowError) as caught:
        renderer(template, **args).examples(row)
    return str(caught.value.problem("rows.jsonl", 3))


def test_the_chatml_of_these_tests_is_sound() -> None:
    assert renderer(words("{{ m.content }}")).examples(chat("a", "b", "c", "d", system="s"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (words("{{ m.content | upper }}"), f'{CHANGES}; got "IT IS FOUR!" for "It is four!"; {ANOTHER}'),
        (words("{{ m.content | escape }}!"), f'{CHANGES}; got "It is four!!"; {ANOTHER}'),
        (words("{{ m.content | replace(' ', '') }}"), f'{CHANGES}; got "Itisfour!" for "It is four!"; {ANOTHER}'),
        (words("{{ m.content[:5] }}"), f'{CHANGES}; got "It is" for "It is four!"; {ANOTHER}'),
        (
            words("{{ m.content | list | reverse | join }}"),
            f'{CHANGES}; got "!ruof si tI" for "It is four!"; {ANOTHER}',
        ),
        (words("{{ m.content }}") + "{{ strftime_now('%H:%M') }}", f'X writes the time of day, {DIFFER}; got "%H:%M"'),
        (
            "At {{ strftime_now('%d %b %H:%M:%S') }}: " + CHATML,
            f'X writes the time of day, {DIFFER}; got "%d %b %H:%M:%S"',
        ),
        (words("{{ m.content }}") + "{% include 'more.jinja' %}", "X takes a part of itself from another file; got"),
        ("{{ range(10) | random }}" + CHATML, f"X draws at random, {DIFFER}; got random (line 1); {ANOTHER}"),
        (
            words("{{ m.content }}{{ m.items }}"),
            'X writes where an object lies in memory, which is another place in each process; got "<built-in method',
        ),
        (
            words("{{ m.content }}{{ m.__class__ }}"),
            "X asks for Python's insides, which the sandbox of chat templates forbids; got __class__ (line 2)",
        ),
        ("{{ raise_exception('not today') }}" + CHATML, f"X refuses the conversation; got not today; {ANOTHER}"),
        (
            words("{{ m.content }}{{ author.name }}"),
            "X needs a variable that it is not given; got 'author' is undefined; "
            f"give author in data.template_args, or {ANOTHER}",
        ),
        (words("{{ m.content }}{{ m.author.name }}"), "X refuses the conversation; got 'dict object' has no attribute"),
        ("{% for m in messages %}", "X cannot be read; got Unexpected end of template."),
        ("no template at all", 'X reads no messages: that is no chat template; got "no template at all"'),
        ("{{ messages }}" * 10**6, "X has 14,000,000 characters, more than 300,000: that is no chat template; got "),
        (CHATML + "{{ 'a' * 10**9 }}", f"X makes a text or a number of more than 16,000,000 by **; {ANOTHER}"),
        (
            CHATML + "{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}",
            f"X wrote more than 16,000,000 characters; correct its loops, or {ANOTHER}",
        ),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}" + CHATML + "{{ f() }}",
            "X calls itself without end; correct its macros",
        ),
    ],
)
def test_a_bad_template_is_refused_before_any_row(template: str, message: str) -> None:
    first, *_ = problems(template)
    assert first.startswith(f"data.chat_template: {message}")


def test_a_template_that_does_not_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.25)
    assert problems(CHATML + LOOPS) == [
        f"data.chat_template: X did not finish within 0.25 s; correct its loops, or {ANOTHER}"
    ]


def test_a_template_that_writes_the_day_is_sound() -> None:
    assert renderer(CHATML + "{# #}").examples(chat("a", "b"))
    assert renderer("On {{ strftime_now('%d %b %Y') }}: " + CHATML).examples(chat("a", "b"))


def test_all_problems_of_a_template_are_said_at_once() -> None:
    template = words("{{ m.content | upper }} {{ strftime_now('%H:%M') }} {{ m.__class__ }}").replace("<|im_end|>", "")
    said = problems(template)
    assert [line.removeprefix("data.chat_template: X ").partition(";")[0] for line in said] == [
        "asks for Python's insides, which the sandbox of chat templates forbids",
        f"writes the time of day, {DIFFER}",
        "does not end an answer with the EOS token <|im_end|>",
        "changes the answer or writes its own words into it",
    ]


def test_what_only_some_rows_run_into_names_the_row() -> None:
    change = f"change the row, or {ANOTHER}"
    template = only_for("tool", "{{ raise_exception('no tools here') }}")
    assert row_problem(template, weather()) == (
        f"rows.jsonl:3: messages: X refuses the conversation; got no tools here; {change}"
    )
    template = only_for("tool", "{{ strftime_now('%d %b') }}{{ strftime_now('%X') }}")
    assert row_problem(template, weather()) == (
        f'rows.jsonl:3: messages: X writes the time of day, {DIFFER}; got "%X"; '
        f"give the time in data.template_args where it reads such a variable, or {ANOTHER}"
    )
    template = only_for("system", "{{ raise_exception('no system here') }}")
    assert row_problem(template, chat("a", "b", system="Be brief.")) == (
        'rows.jsonl:3: messages[0].role: X has no system role; got "Be brief."; set data.system to '
        f"merge_into_first_user (--system of evaluate), remove the message, or {ANOTHER}"
    )
    assert row_problem(only_for("tool", "{{ m.content.a.b }}"), weather()) == (
        f"rows.jsonl:3: messages: X refuses the conversation; got 'str object' has no attribute 'a'; {change}"
    )


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (LOOPS, "X did not finish within 0.25 s"),
        ("{% for a in range(99999) %}" + "x" * 999 + "{% endfor %}", "X wrote more than 16,000,000 characters"),
    ],
)
def test_a_row_that_a_template_does_not_get_past_stops_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    """Whatever is said of bad rows: each further one would take as long."""
    monkeypatch.setattr(sandbox, "SECONDS", 0.25)
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "completion": answer} for answer in ("b", "", "endless", "c", "endless")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {
        "train": {"path": str(file), "format": "prompt_completion"},
        "max_length": 64,
        "on_bad_row": "drop",
        "max_bad_share": 1.0,
    }
    settings, tokenizer = DataSettings.model_validate(data), tiny_tokenizer()
    tokenizer.chat_template = words(f"{{{{ m.content }}}}{{% if m.content == 'endless' %}}{code}{{% endif %}}")
    with pytest.raises(DataError) as caught:
        prepare(settings.sources("train"), tokenizer, settings, seed=0)
    name = message.replace("X", "the tokenizer's own chat template")
    assert str(caught.value).splitlines()[1:] == [
        f"{file}:3: {name}; remove the row, or correct its loops, or {ANOTHER}"
    ]
    assert str(caught.value).startswith(f"{file}:2: completion: "), "the bad rows before it"


@pytest.mark.parametrize(
    ("template", "content", "message"),
    [
        ("{{ m.content | escape }}", "a < b & c", f'messages[1]: {CHANGES}; got "a &lt; b &amp; c" for "a < b & c"'),
        ("{{ m.content | replace('\\n\\n', '\\n') }}", "a\n\nb", f'messages[1]: {CHANGES}; got "a\\nb" for "a\\n\\nb"'),
        ("{{ m.content.split('---') | last }}", "a --- b", f'messages[1]: {CHANGES}; got " b"'),
        (
            "{{ m.content | title if 'yes' in m.content else m.content }}",
            "yes sir",
            f'messages[1]: {CHANGES}; got "Yes Sir"',
        ),
        ("{{ m.content | truncate(12) }}", "a b c " * 9, f"messages[1]: {CHANGES}; got"),
        ("{{ m.content | wordwrap(20) }}", "a b c " * 9, f"messages[1]: {CHANGES}; got"),
    ],
)
def test_a_text_that_only_some_rows_have_and_the_template_changes(template: str, content: str, message: str) -> None:
    assert row_problem(words(template), chat("q", content)).startswith(f"rows.jsonl:3: {message}")


def test_variables_that_the_template_does_not_read_are_refused() -> None:
    template = CHATML + "{% if enable_thinking is defined and enable_thinking %}{# #}{% endif %}"
    assert renderer(template, enable_thinking=True).examples(chat("a", "b"))
    assert problems(template, enable_thinkin=True, bos_token="x") == [
        "data.template_args.enable_thinkin: X does not read this variable; got true; did you mean enable_thinking?",
        "data.template_args.bos_token: the program itself gives this variable to every chat template; "
        'got "x"; remove it',
    ]
