"""A chat template runs with bounds on time, output and memory, and leaves no timer behind."""

import os
import signal
import time
from typing import Any

import pytest

from finetune.data.render import StoppedError, sandbox
from finetune.data.render.operand_sizes import GROWING_FILTERS
from finetune.data.row_errors import RowError
from finetune.errors import DataError
from finetune.upstream import private
from tests.support import CHATML

THREE_LOOPS = "{% for a in items %}" * 3 + "{% endfor %}" * 3
DOUBLED = "{% for a in range(60) %}{% set kept.text = kept.text ~ kept.text %}{% endfor %}"
SLOW = "X did not finish within 0.25 s; correct its loops, or name another one in data.chat_template"
LONG = "X wrote more than 16,000,000 characters; correct its loops, or name another one in data.chat_template"
TOO_LARGE = "X makes a text or a number of more than 16,000,000 by {}; name another one in data.chat_template"


def written(source: str, **variables: Any) -> str:
    template = sandbox.compile_template(source, "X")
    pieces: list[str] = []
    sandbox.write(template, {**template.globals, "messages": [{"role": "user"}], **variables}, pieces, "X")
    return "".join(pieces)


def refusal(source: str, **variables: Any) -> str:
    with pytest.raises(RowError) as caught:
        written(source, **variables)
    return str(caught.value.problem("rows.jsonl", 3)).removeprefix("rows.jsonl:3: messages: ")


def stopped(source: str, **variables: Any) -> str:
    with pytest.raises(StoppedError) as caught:
        written(source, **variables)
    assert str(caught.value.of_row.problem("rows.jsonl", 3)).startswith("rows.jsonl:3: X ")
    return str(caught.value).removeprefix("data.chat_template: ")


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
        "{% set items = range(99999) | list %}" + THREE_LOOPS,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set items = range(99999) | list %}{% for a in items %}{{ items | map('string') | join | length }}"
        "{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_stopped(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.25)
    started = time.monotonic()
    assert stopped(source) == SLOW
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for a in range(99999) %}" + "x" * 1000 + "{% endfor %}", LONG),
        ("{% for a in range(99999) %}{{ text }}{% endfor %}", LONG),
        ("{{ 'a' * 10**9 }}", TOO_LARGE.format("**")),
        ("{{ 'a' * 1000000 * 1000000 }}", TOO_LARGE.format("*")),
        ("{{ 16000001 * text }}", TOO_LARGE.format("*")),
        ("{{ [0] * 16000001 }}", TOO_LARGE.format("*")),
        ("{{ 9 ** 9 ** 9 }}", TOO_LARGE.format("**")),
        ("{{ 10 ** 10 ** 8 }}", TOO_LARGE.format("**")),
        ("{{ 10000000 ** 99999 }}", TOO_LARGE.format("**")),
        ("{{ (10 ** 7) * (10 ** 7) }}", TOO_LARGE.format("*")),
        ("{% set x = text * 4000 %}{{ x.replace('x', x) }}", TOO_LARGE.format("replace")),
        ("{% set x = text * 4000 %}{{ x | replace('x', x) }}", TOO_LARGE.format("the filter replace")),
        ("{% set x = text * 4000 %}{{ x.translate({120: x}) }}", TOO_LARGE.format("translate")),
        ("{{ text.join([text] * 99999) }}", TOO_LARGE.format("join")),
        ("{{ ([text] * 99999) | join }}", TOO_LARGE.format("the filter join")),
        ("{{ ([text] * 99999) | map('upper') | join }}", TOO_LARGE.format("the filter join")),
        ("{{ text.center(1000000000) }}", TOO_LARGE.format("center")),
        ("{{ text | attr('ljust')(1000000000) }}", TOO_LARGE.format("ljust")),
        ("{{ [text] | map('center', 1000000000) | list }}", TOO_LARGE.format("the filter center")),
        ("{{ '\t'.expandtabs(1000000000) }}", TOO_LARGE.format("expandtabs")),
        ("{{ (5).to_bytes(1000000000, 'little') }}", TOO_LARGE.format("to_bytes")),
        ("{{ text.encode() * 99999 }}", TOO_LARGE.format("*")),
        ("{{ '%1000000000d' % 1 }}", TOO_LARGE.format("%")),
        ("{{ '%*d' % (1000000000, 1) }}", TOO_LARGE.format("%")),
        ("{{ ('%(a)s' * 99999) | format(a=text) }}", TOO_LARGE.format("the filter format")),
        ("{{ '{:1000000000}'.format(1) }}", TOO_LARGE.format("format")),
        ("{{ '{:{}}'.format(1, 1000000000) }}", TOO_LARGE.format("format")),
        ("{{ ('{0}' * 99999).format(text) }}", TOO_LARGE.format("format")),
        ("{{ ('{a}' * 99999).format_map({'a': text}) }}", TOO_LARGE.format("format")),
        ("{{ text | indent(1000000000, true) }}", TOO_LARGE.format("the filter indent")),
        ("{{ (text ~ ' a') | wordwrap(1, wrapstring=text * 99) }}", TOO_LARGE.format("the filter wordwrap")),
        ("{{ [text] | batch(1000000000, 0) | list }}", TOO_LARGE.format("the filter batch")),
        ("{{ [text] | tojson(indent=1000000000) }}", TOO_LARGE.format("the filter tojson")),
    ],
)
def test_a_template_that_makes_too_much_is_stopped(source: str, message: str) -> None:
    assert stopped(source, text="x" * 1000) == message


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "X calls itself without end; correct its macros, or name another one in data.chat_template",
        ),
        (
            "{{ (''['__cla' ~ 'ss__']).mro() }}",
            "X does what the sandbox of chat templates forbids; got access to attribute '__class__' of 'str' object is "
            "unsafe.; name another one in data.chat_template",
        ),
        (
            "{{ messages.append(1) }}",
            "X does what the sandbox of chat templates forbids; got access to attribute 'append' of 'list' object is "
            "unsafe.; name another one in data.chat_template",
        ),
        (
            "{{ where.x }}",
            "X needs a variable that it is not given; got 'where' is undefined; "
            "give where in data.template_args, or name another one in data.chat_template",
        ),
        (
            "{{ messages[0].where.x }}",
            "X refuses the conversation; got 'dict object' has no attribute 'where'; "
            "change the row, or name another one in data.chat_template",
        ),
        (
            "{{ raise_exception('Only user\n and\tassistant!') }}",
            "X refuses the conversation; got Only user and assistant!; "
            "change the row, or name another one in data.chat_template",
        ),
    ],
)
def test_a_template_that_fails_is_refused(source: str, message: str) -> None:
    assert refusal(source) == message


def test_a_text_that_doubles_in_each_round_is_stopped_by_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MEMORY", 2**24)
    message = stopped("{% set kept = namespace(text='a' * 999) %}" + DOUBLED + "{{ kept.text }}")
    assert message == "X took more than 16 MiB of memory; correct its loops, or name another one in data.chat_template"


def test_no_memory_is_said_to_be_that() -> None:
    def no_memory() -> None:
        raise MemoryError

    do = "correct its loops, or name another one in data.chat_template"
    assert refusal("{{ fail() }}", fail=no_memory) == f"X needs more memory than there is; {do}"


def test_usual_texts_are_made() -> None:
    """What the bounds look at works as in Jinja, for long rows as well."""
    source = "{{ text.replace('\n', '\n    ') | length }} {{ 'a'.center(3) }} {{ '%-3s|' % 'a' }}"
    source += " {{ ['a', 'b'] | join('-') }} {{ ['a', 'b'] | map('upper') | join }} {{ '{:>3}'.format('a') }}"
    source += " {{ ','.join(['a', 'b']) }}"
    source += " {{ [1] | tojson(indent=2) | length }} {{ 'a\nb' | indent(2) | length }} {{ 'ab' | replace('a', 'b') }}"
    source += " {{ '{a}'.format(a=text) | length }} {{ '%s' % text | length }}"
    long = "line\n" * 1_000_000
    assert written(source, text=long) == "9000000  a  a  | a-b AB   a a,b 7 5 bb 5000000 5000000"


def test_usual_products_are_computed() -> None:
    source = "{{ '-' * 3 }} {{ 3 * '-' }} {{ [1] * 2 }} {{ 2 * 3 }}"
    source += " {{ 1.5 * 2 }} {{ 2 ** 10 }} {{ 2 ** -1 }} {{ (-1) ** 99 }}"
    assert written(source) == "--- --- [1, 1] 6 3.0 1024 0.5 -1"
    assert refusal("{{ 0 ** -1 }}").startswith("X refuses the conversation; got 0.0 cannot be raised")


def test_a_template_that_is_computed_while_it_is_read_is_refused_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "SECONDS", 0.25)
    with pytest.raises(DataError) as caught:
        sandbox.compile_template("{{ [1]" + " | map('string') | list" * 60_000 + " }}", "X")
    assert str(caught.value).startswith("data.chat_template: X ")


def test_no_timer_is_left_and_a_late_signal_is_harmless() -> None:
    assert written(CHATML, messages=[{"role": "user", "content": "hi"}]) == "<|im_start|>user\nhi<|im_end|>\n"
    refusal("{{ raise_exception('no') }}")
    assert signal.getitimer(signal.ITIMER_PROF) == (0, 0)
    os.kill(os.getpid(), signal.SIGPROF)


def test_the_sandbox_is_that_of_transformers_with_bounds() -> None:
    theirs = private("transformers.utils.chat_template_utils:_compile_jinja_template")("").environment
    ours = sandbox.environment()
    unwrapped = {name: ours.filters[name].__wrapped__ for name in GROWING_FILTERS}
    assert ({**ours.filters, **unwrapped}, ours.globals) == (theirs.filters, theirs.globals)
    assert list(ours.extensions) == list(theirs.extensions)
    plain = (str, bool, int, type(None), type)
    settings = {name: value for name, value in vars(theirs).items() if isinstance(value, plain)}
    assert settings["trim_blocks"] is True
    assert {name: vars(ours)[name] for name in settings} == settings
    assert theirs.from_string("{{ 'a' * 3 }}").render() == "aaa"
    assert not theirs.intercepted_binops
