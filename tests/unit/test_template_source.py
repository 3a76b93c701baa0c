"""What a template's source says: the variables that a recipe may give it, and what no template may contain."""

from importlib.resources import files

import pytest

from finetune.data.render import SHIPPED, read_template, template_source
from finetune.data.render.template_source import check_template_args, compile_templates, source_problems, variables_of
from finetune.errors import DataError, RecipeError

MESSAGES = "{% for message in messages %}{{ message.content }}{% endfor %}"


def published(name: str) -> str:
    """A template of a published model, from the installed trl."""
    return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")


def refusals(source: str, **args: bool | int | float | str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        check_template_args(variables_of(source, "X"), args, "X")
    return str(caught.value).split("\n")


@pytest.mark.parametrize(
    ("name", "variables"),
    [
        ("qwen3", ["enable_thinking"]),
        ("glm4moe", ["enable_thinking"]),
        ("nemotron_3_nano", ["enable_thinking", "system_message", "truncate_history_thinking"]),
        ("gptoss", ["builtin_tools", "model_identity", "reasoning_effort"]),
        ("llama3_1", ["builtin_tools", "custom_tools", "date_string", "tools_in_user_message"]),
        ("deepseekv3", []),
        ("qwen2_5", []),
    ],
)
def test_the_variables_of_a_published_template_are_those_that_it_reads(name: str, variables: list[str]) -> None:
    assert variables_of(published(name), name) == tuple(variables)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("llama3_1", {"date_string": "26 Jul 2024", "tools_in_user_message": False}),
        ("qwen3", {"enable_thinking": False}),
        ("gptoss", {"reasoning_effort": "low", "model_identity": "You are Ada."}),
        ("nemotron_3_nano", {"enable_thinking": True, "truncate_history_thinking": False}),
        ("qwen2_5", {}),
    ],
)
def test_a_variable_that_the_template_reads_is_taken(name: str, args: dict[str, bool | str]) -> None:
    check_template_args(variables_of(published(name), name), args, name)


def test_a_variable_that_the_template_does_not_read_is_refused_and_all_of_them_at_once() -> None:
    assert refusals(published("gptoss"), reasoning_efort="low", enable_thinking=False) == [
        'data.template_args.reasoning_efort: X does not read this variable; got "low"; did you mean reasoning_effort?',
        "data.template_args.enable_thinking: X does not read this variable; got false; remove it, or write one that it "
        "reads: builtin_tools, model_identity, reasoning_effort",
    ]
    assert refusals(published("qwen2_5"), enable_thinking=False) == [
        "data.template_args.enable_thinking: X does not read this variable; got false; "
        "remove it: X reads no variable beside the messages"
    ]


@pytest.mark.parametrize(
    "name", ["messages", "tools", "add_generation_prompt", "bos_token", "strftime_now", "raise_exception", "namespace"]
)
def test_what_the_program_itself_gives_is_refused(name: str) -> None:
    assert refusals(MESSAGES + f"{{{{ {name} }}}}", **{name: "x"}) == [
        f'data.template_args.{name}: the program itself gives this variable to every chat template; got "x"; remove it'
    ]


@pytest.mark.parametrize(
    ("source", "taken"),
    [
        ("{% if mine is defined and mine %}x{% endif %}", True),
        ("{% if mine is not defined %}{% set mine = 1 %}{% endif %}{{ mine }}", True),
        ("{% set mine = mine or 'low' %}{{ mine }}", True),
        ("{{ mine | default('low') }}", True),
        ("{% set mine = mine | default('low') %}{{ mine }}", True),
        ("{% if tools %}{% set mine = 1 %}{% endif %}{{ mine | default('low') }}", False),
        ("{% macro write() %}{{ mine }}{% endmacro %}{{ write() }}", True),
        ("{% macro write(mine) %}{{ mine }}{% endmacro %}{{ write(1) }}", False),
        ("{% for mine in messages %}{{ mine }}{% endfor %}", False),
        ("{% set mine = 1 %}{{ mine }}", False),
        ("{% if tools %}{% set mine = 1 %}{% endif %}{{ mine }}", False),
        ("{{ messages[0].mine }}{# mine #}mine{{ 'mine' }}", False),
    ],
)
def test_a_variable_is_what_a_template_reads_from_outside(source: str, taken: bool) -> None:
    assert variables_of(MESSAGES + source, "X") == (("mine",) if taken else ())


def test_what_published_templates_do_is_not_refused() -> None:
    sources = map(published, ("gptoss", "llama3_1", "gemma4_v5", "lfm2_2_5", "nemotron_3_nano", "phi3_5_training"))
    for source in [*sources, *map(read_template, SHIPPED)]:
        assert source_problems([source], "X") == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ x }}" * 1_500_000,
            "X has 10,500,000 characters, more than 300,000: that is no chat template; "
            f'got "{("{{ x }}" * 9)[:59]}...; name another one in data.chat_template',
        ),
        (
            '{"bos_token": "<s>"}\n',
            "X reads no messages: that is no chat template; "
            r'got "{\"bos_token\": \"<s>\"}"; name another one in data.chat_template',
        ),
        ("", 'X reads no messages: that is no chat template; got ""; name another one in data.chat_template'),
        (
            MESSAGES + "\n{% include 'tools.jinja' %}",
            "X takes a part of itself from another file; got {% include %} (line 2); "
            "put that text into the template itself",
        ),
        (
            "{% import 'tools.jinja' as tools %}" + MESSAGES,
            "X takes a part of itself from another file; got {% import %} (line 1); "
            "put that text into the template itself",
        ),
        (
            "\n{% if messages %}",
            "X cannot be read; got Unexpected end of template. Jinja was looking for the following tags: 'elif' or "
            "'else' or 'endif'. The innermost block that needs to be closed is 'if'. (line 2); "
            "fix it, or name another one in data.chat_template",
        ),
        (
            "\n\n{{ messages | nothing }}",
            "X cannot be read; got No filter named 'nothing'. (line 3); "
            "fix it, or name another one in data.chat_template",
        ),
        (
            "{{ messages" + "[" * 5000 + "0" + "]" * 5000 + " }}",
            "X cannot be read; got maximum recursion depth exceeded",
        ),
        (
            "{% for message in messages %}" * 25 + "{% endfor %}" * 25,
            "X cannot be read; got too many statically nested blocks",
        ),
    ],
)
def test_what_can_be_seen_in_the_source_is_refused_before_it_is_run(source: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        compile_templates([source], "X")
    assert str(caught.value).startswith("data.chat_template: " + message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("{{ range(99000000000) }}", "99000000000"),
        ("{{ 'a'.ljust(99000000000) }}", "99000000000"),
        ("{{ 'a' | center(99000000000) }}", "99000000000"),
        ("{{ '%99000000000d' % 1 }}", '"%99000000000d"'),
        ("{{ '%-099000000000d' | format(1) }}", '"%-099000000000d"'),
        ("{{ '{0:<99000000000}'.format(1) }}", '"{0:<99000000000}"'),
    ],
)
def test_a_text_that_would_fill_the_memory_at_once_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch, source: str, number: str
) -> None:
    """Jinja computes with constants while it compiles."""
    monkeypatch.setattr(template_source, "compile_template", lambda source, name: pytest.fail("compiled"))
    with pytest.raises(DataError) as caught:
        compile_templates([MESSAGES + source], "X")
    assert str(caught.value) == (
        "data.chat_template: X has a number above 16,000,000: a text of such a length would fill the memory; "
        f"got {number} (line 1); name another one in data.chat_template"
    )


def test_numbers_in_a_template_are_not_widths() -> None:
    text = """{{ '{"date": 20240101, "id": "99000000000"}' }}{{ '0123456789' }}{{ '5% of 20240101%' }} 99000000000"""
    compile_templates([MESSAGES + text], "X")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ ''.__class__ }}",
            "X asks for Python's insides, which the sandbox of chat templates forbids; got __class__ (line 1)",
        ),
        (
            "{{ ''['__class__'] }}",
            "X asks for Python's insides, which the sandbox of chat templates forbids; got __class__ (line 1)",
        ),
        (
            "{{ '' | attr('__class__') }}",
            "X asks for Python's insides, which the sandbox of chat templates forbids; got __class__ (line 1)",
        ),
        (
            "\n{{ range(10) | random }}",
            "X draws at random, so training and inference would differ; got random (line 2)",
        ),
        ("{{ lipsum(n=1) }}", "X draws at random, so training and inference would differ; got lipsum (line 1)"),
    ],
)
def test_what_no_template_may_do_is_found_in_its_source(source: str, message: str) -> None:
    compile_templates([MESSAGES + source], "X")
    assert list(map(str, source_problems([MESSAGES + source] * 2, "X"))) == [
        f"data.chat_template: {message}; name another one in data.chat_template"
    ]


def test_everything_in_a_source_is_said_at_once() -> None:
    with pytest.raises(DataError) as caught:
        compile_templates(["{% include 'x' %}{{ ''.__class__ }}{{ [1] | random }}"] * 2, "X")
    assert [problem.got for problem in caught.value.problems] == [
        "{% include %} (line 1)",
        "\"{% include 'x' %}{{ ''.__class__ }}{{ [1] | random }}\"",
        "__class__ (line 1)",
        "random (line 1)",
    ]
