"""`finetune template`: what it prints of a template, of a row in each format, and its errors, one line each."""

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import trl

from finetune.check.template_summary import summarise
from finetune.cli.main import main
from finetune.data.render import Renderer
from finetune.data.tokenizer import template_tokens
from finetune.recipe.row_formats import ROW_FORMATS
from tests.support import tiny_tokenizer

TRL = Path(trl.__file__).parent / "chat_templates"
ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "data" / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def printed(model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command; its output, or its error lines."""
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(*words: str, code: int = 0, of: str = model) -> str:
        assert main(["template", of, *words]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return run


def write_row(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def unwrapped(output: str) -> str:
    """The output with each field on one line."""
    return output.replace("\n               ", " ")


def turns(user: str, assistant: str = "Yes.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def test_built_in_conversations_show_what_frames_an_answer_and_what_is_supervised(printed: Any) -> None:
    output = printed()
    for line in (
        "opens      <|im_start|>assistant⏎ (not supervised: the generation prompt",
        "ends       <|im_end|> (supervised)",
        "after      ⏎ (not supervised)",
    ):
        assert f"    {line}\n" in output
    assert "<|im_start|>user⏎\nWhich is the largest?<|im_end|>⏎\n" in output
    assert output.count("[[Jupiter.<|im_end|>]]⏎\n") >= 1
    refused = output.partition("\nrefused\n")[2]
    assert "a call     the tokenizer's own chat template drops or changes a tool call;" in refused


def test_another_template_and_another_loss(printed: Any) -> None:
    output = printed("--as", "alpaca", "--loss-on", "last_assistant")
    assert "the chat template alpaca" in output
    assert "Mercury.<|im_end|>" in output
    assert "[[Mercury." not in output
    assert "[[Two: Phobos and Deimos.<|im_end|>]]" in output
    everything = printed("--loss-on", "all")
    assert "    ends       <|im_end|>\n" in everything
    assert "user⏎\nWhich planet is closest to the sun?<|im_end|>⏎\n<|im_start|>assistant⏎\nMercury." in everything


def test_a_template_with_tools_shows_calls_and_says_what_it_refuses(printed: Any) -> None:
    output = printed("--as", "chatml")
    assert "--- a call: " in output
    assert (
        '[[<tool_call>⏎\n{"name": "get_weather", "arguments": {"city": "Bergen"}}⏎\n</tool_call><|im_end|>]]' in output
    )
    refused = unwrapped(output.partition("\nrefused\n")[2])
    assert refused == (
        "    reasoning  the chat template chatml drops the reasoning of this answer; got "
        '"The order is Mercury, Venus, Earth."; remove it from the row, or name another one in data.chat_template\n'
    )


def test_a_template_that_rewrites_earlier_answers_shows_one_example_for_each(printed: Any) -> None:
    output = printed("--as", str(TRL / "qwen3.jinja"))
    said = unwrapped(output)
    assert "\n    header     <think>⏎⏎</think>⏎⏎ (supervised: the model writes it before the answer)\n" in said
    assert "\n    examples   three turns: 3, because the template rewrites earlier answers; a call: " in said
    assert "\n    variables  not set: enable_thinking\n" in said
    assert "\n    reasoning  given to the template as reasoning_content\n" in said
    second = output.partition("--- three turns, example 2 of 3: ")[2].partition("\n---")[0]
    assert "assistant⏎\nMercury.<|im_end|>⏎\n" in second
    assert second.endswith("assistant⏎\n[[<think>⏎\n⏎\n</think>⏎\n⏎\nJupiter.<|im_end|>]]⏎")
    assert "[[<think>⏎\nThe order is Mercury, Venus, Earth.⏎\n</think>⏎\n⏎\nMercury.<|im_end|>]]" in output


def test_a_variable_decides_where_the_answer_begins(printed: Any) -> None:
    opened = printed("--as", str(TRL / "nemotron_3_nano.jinja"), "--row", f"{EXAMPLES / 'messages.jsonl'}:1")
    assert "    opens      <|im_start|>assistant⏎<think>⏎ (not supervised: the generation" in opened
    assert "assistant⏎\n<think>⏎\n[[⏎\n</think>⏎\nMercury.<|im_end|>]]⏎\n" in opened
    assert "data.template_args: {enable_thinking: false} opens none" in unwrapped(opened)
    closed = printed(
        *("--as", str(TRL / "nemotron_3_nano.jinja"), "--row", f"{EXAMPLES / 'messages.jsonl'}:1"),
        *("--set", "enable_thinking=false"),
    )
    assert "    opens      <|im_start|>assistant⏎<think></think> (not supervised: the" in closed
    assert "<think></think>[[Mercury.<|im_end|>]]⏎\n" in closed
    assert "variables  enable_thinking = false; not set: system_message" in unwrapped(closed)


def test_a_variable_that_the_template_does_not_read_is_refused(printed: Any) -> None:
    said = printed("--as", str(TRL / "qwen3.jinja"), "--set", "enable_thinkng=false", "xyz=1", code=2)
    what = "the chat template does not read this variable"
    assert said.splitlines() == [
        f"data.template_args.enable_thinkng: {what}; got false; did you mean enable_thinking?",
        f"data.template_args.xyz: {what}; got 1; remove it, or write one that it reads: enable_thinking",
    ]


def test_the_advice_for_missing_tokens_can_be_followed(printed: Any, tmp_path: Path) -> None:
    path = tmp_path / "turns.jinja"
    path.write_text(
        "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}<|over|>{% endfor %}"
        "{% if add_generation_prompt %}<|turn|>assistant: {% endif %}"
    )
    said = printed("--as", str(path), code=1)
    assert 'write model.added_tokens: ["<|turn|>", "<|over|>"] and model.eos_token: "<|over|>"' in said
    tokens = ("--added-tokens", "<|turn|>", "<|over|>", "--eos-token", "<|over|>")
    output = printed("--as", str(path), *tokens)
    assert "<|turn|>assistant:·[[Mercury.<|over|>]]<|turn|>" in output


def test_colour_on_a_terminal_and_brackets_elsewhere(printed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ("--row", f"{EXAMPLES / 'messages.jsonl'}:1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = printed(*row)
    assert "\x1b[32mMercury.\x1b[0m\x1b[32m\x1b[1m<|im_end|>\x1b[0m" in coloured
    assert "[[" not in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    assert "[[Mercury.<|im_end|>]]" in printed(*row)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("glm4moe", {"ends": "<|user|>; a call: <|observation|> (supervised)"}),
        ("phi3_5", {"opens": "<|assistant|>⏎ (not ", "ends": "<|end|> (supervised)", "after": "⏎<|im_end|> (not "}),
        ("gemma3", {"opens": "<start_of_turn>model⏎ (not ", "ends": "<end_of_turn> (supervised)"}),
        ("muse_glimmer", {"header": "·to=user<|message|> (supervised", "day": f"{date.today()}: the template writes"}),
    ],
)
def test_summaries_of_published_templates(template: str, expected: dict[str, str]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (TRL / f"{template}.jinja").read_text(encoding="utf-8")
    tokenizer.add_tokens(template_tokens(tokenizer), special_tokens=True)
    summary = summarise(Renderer(tokenizer, template), tokenizer)
    shown = dict([*summary.fields(), *summary.details()])
    assert {name: shown[name][: len(text)] for name, text in expected.items()} == expected


@pytest.mark.parametrize("name", [name for name in ROW_FORMATS if name != "rendered"])
def test_a_row_of_each_format_is_recognised(name: str, printed: Any) -> None:
    output = printed("--as", "chatml", "--row", f"{EXAMPLES / name}.jsonl:1")
    assert f"{name}.jsonl:1" in output
    assert "<|im_end|>]]" in output


def test_marks_of_a_rendered_row_are_tokens(printed: Any, tmp_path: Path) -> None:
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>"
    row = f"{write_row(tmp_path / 'rows.jsonl', {'text': text})}:1"
    output = printed("--row", row, "--format", "rendered")
    assert "template   none: the row is plain text, and the loss is on all of it" in output
    assert "assistant⏎\nHo<|im_end|>]]" in output
    assert "text: contains the control token <|im_start|>" in printed("--row", row, code=1)


def test_both_answers_of_a_pair_are_shown_and_the_prompt_is_not_supervised(printed: Any) -> None:
    output = printed("--row", f"{EXAMPLES / 'preference.jsonl'}:1")
    assert "preference.jsonl:1 chosen: " in output
    assert "preference.jsonl:1 rejected: " in output
    assert output.count("[[") - 1 == 2  # and once in the legend
    assert "kto.jsonl:2 undesirable: " in printed("--row", f"{EXAMPLES / 'kto.jsonl'}:2")


def test_a_row_that_begins_further_down_a_json_file(printed: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([turns("first"), turns("second")], indent=1), encoding="utf-8")
    line = path.read_text().split("\n").index(" {", 2) + 1
    assert "second<|im_end|>" in printed("--row", f"{path}:{line}")
    said = printed("--row", f"{path}:{line + 1}", code=1)
    assert (
        said
        == f"{path}:{line + 1}: the file has no such line; got the last row is at {line}; name a line up to {line}\n"
    )
    said = printed("--row", f"{path}:3", code=1)
    assert said == f"{path}:3: no row begins at this line; got rows at 2 and {line}; name line {line}\n"


def test_control_characters_of_a_row_do_not_reach_the_terminal(printed: Any, tmp_path: Path) -> None:
    row = write_row(tmp_path / "rows.jsonl", turns("\x1b]0;title\x07\x1b[31m red", "a\x9b31m\u202eb"))
    output = printed("--row", f"{row}:1")
    assert "␛]0;title␇␛[31m red" in output
    assert "a<U+009B>31m<U+202E>b" in output
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(output)
    row = write_row(tmp_path / "a\x1b[31m.jsonl", turns("light", "\x9b31m\u202e<|im_end|>"))
    said = printed("--row", f"{row}:1", code=1)
    assert "a\\u001b[31m.jsonl:1: messages[1].content: " in said
    assert '"\\u009b31m\\u202e<|im_end|>"' in said
    assert said[:-1].isprintable()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("rows.jsonl", "rows.jsonl: not a row of a file; write FILE:LINE, such as data/examples/messages.jsonl:1"),
        ("rows.jsonl:0", "rows.jsonl:0: not a row of a file; write FILE:LINE, such as data/examples/messages.jsonl:1"),
        ("rows.jsonl:9", "rows.jsonl:9: the file has no such line; got the last row is at 3; name a line up to 3"),
        ("rows.jsonl:2", "rows.jsonl:2: no row begins at this line; got rows at 1 and 3; name line 3"),
        ("*.jsonl:1", "*.jsonl:1: this names 2 files; name one of them"),
        ("none.jsonl:1", "none.jsonl: no such data file; got working directory "),
        (
            "other.jsonl:1",
            "other.jsonl: the rows fit no format; got keys ['a']; name it with --format, or map the columns",
        ),
        ("rows.jsonl:3", "rows.jsonl:3: messages[1].content: contains the control token <|im_end|>"),
    ],
)
def test_a_row_that_cannot_be_shown_is_one_line(
    row: str, message: str, printed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bad = turns("light", "on<|im_end|>")
    Path("rows.jsonl").write_text(f"{json.dumps(turns('light'))}\n\n{json.dumps(bad)}\n")
    write_row(Path("other.jsonl"), {"a": 1})
    said = printed("--row", row, code=1)
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_a_problem_of_an_answer_is_told_at_its_column(printed: Any, tmp_path: Path) -> None:
    row = write_row(tmp_path / "rows.jsonl", {"prompt": "Rome?", "completion": "no<|im_end|>", "label": False})
    assert f"{row}:1: completion: contains the control token" in printed("--row", f"{row}:1", code=1)
    row = write_row(tmp_path / "rows.jsonl", {"prompt": "Rome?", "chosen": "yes", "rejected": "no<|im_end|>"})
    assert f"{row}:1: rejected: contains the control token" in printed("--row", f"{row}:1", code=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--as", "chatlm"], "data.chat_template: no such template; got 'chatlm' (FileNotFoundError); name a shipped"),
        (["--as", "broken.jinja"], "data.chat_template: the chat template cannot be read; got "),
        (
            ["--as", "refusing.jinja"],
            "data.chat_template: the chat template refusing.jinja refuses the conversation; got no",
        ),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(
    words: list[str], message: str, printed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.jinja").write_text("{% for m in messages %}")
    Path("refusing.jinja").write_text("{{ raise_exception('no') }}{{ messages }}")
    said = printed(*words, code=1)
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_a_missing_or_damaged_tokenizer_is_one_line(printed: Any, tmp_path: Path) -> None:
    said = printed(of=str(tmp_path), code=1)
    assert said.startswith(f"{tmp_path}: no tokenizer could be loaded; got ")
    assert said.count("\n") == 1
    tiny_tokenizer().save_pretrained(tmp_path)
    for damaged in ("{}", "{", '{"added_tokens": [], "model": 3}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        said = printed(of=str(tmp_path), code=1)
        assert said.startswith(f"{tmp_path}: no tokenizer could be loaded; got ")
        assert said.count("\n") == 1
    said = printed(of="missing", code=1)
    assert said == "MODEL: no such folder; got missing; give a checkpoint folder or a hub id owner/name\n"


@pytest.mark.parametrize("text", ["thinking", "=true", "effort=", "effort=null"])
def test_a_variable_is_a_name_and_a_value(text: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["template", model, "--set", text])
    assert f"write NAME=VALUE, a value being text, a number, true or false; got {text}" in capsys.readouterr().err


def test_a_trained_model_is_shown_with_the_variables_of_its_training(tmp_path: Path, printed: Any) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (TRL / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "finetune.json").write_text('{"template_args": {"enable_thinking": false}}', encoding="utf-8")
    assert "enable_thinking = false" in unwrapped(printed(of=str(tmp_path)))
    assert "enable_thinking = true" in unwrapped(printed("--set", "enable_thinking=true", of=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llama3_training", "the template's {% generation %} marks give the same mask"),
        ("qwen3_training", "not used: the template's {% generation %} marks supervise"),
    ],
)
def test_a_template_with_marks_of_its_own_is_compared_with_them(
    tmp_path: Path, printed: Any, name: str, said: str
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]}
    )
    tokenizer.chat_template = (TRL / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer.save_pretrained(tmp_path)
    assert f"marks      {said}" in unwrapped(printed(of=str(tmp_path)))
