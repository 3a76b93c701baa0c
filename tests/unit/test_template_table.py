"""The table of the families' chat templates says what the published templates do, and the documentation holds it."""

import argparse
import functools
import json
import re
from importlib.resources import files
from pathlib import Path

import pytest
from jinja2 import Environment, meta, nodes
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion

from finetune.cli.families import add_parser, run
from finetune.data.render import Renderer
from finetune.data.render.family_lines import template_lines
from finetune.data.render.family_templates import FAMILY_TEMPLATES, PublishedTemplate
from finetune.data.row_errors import RowError
from finetune.data.types import Conversation, Message
from finetune.errors import WeightsError
from finetune.moe.families import FAMILIES
from tests.rendering import chat, tool_call, tool_schema
from tests.support import tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs/chat-templates.md"
GIVEN = {"messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token"}
GIVEN |= {"strftime_now", "raise_exception"}
TEMPLATES = files("trl") / "chat_templates"
EOS = {"glm4moe": "<|endoftext|>", "phi3_5": "<|endoftext|>"}
MARK = re.compile("<[|\uff5c][^<>|\uff5c\\s{}]+[|\uff5c]>|\\[/?[A-Z_]+\\]|</?s>")
SCHEMAS = [tool_schema("get_weather")]
ROWS = {row.trl or row.mistral: row for rows in FAMILY_TEMPLATES.values() for row in rows if row.trl or row.mistral}


def source_of(row: PublishedTemplate) -> str:
    """The template: TRL's file, or what mistral-common generates."""
    if row.trl:
        return (TEMPLATES / f"{row.trl}.jinja").read_text(encoding="utf-8")
    version, kind, *thinks = row.mistral.split()
    efforts = ("none", "high") if version == "v15" else None
    return generate_chat_template(
        spm=kind == "spm",
        tokenizer_version=TokenizerVersion(version),
        image_support=False,
        audio_support=False,
        thinking_support=bool(thinks),
        default_system_prompt=None,
        plain_thinking_support=False,
        use_special_token_variables=True,
        model_settings_fields=frozenset({"reasoning_effort"}) if efforts else None,
        reasoning_effort_values=efforts,
        reasoning_effort_default="none" if efforts else None,
    )


@functools.cache
def renderer_of(name: str) -> Renderer:
    """A renderer with the row's template, and a tiny tokenizer with the special tokens that it writes."""
    row, tokenizer = ROWS[name], tiny_tokenizer()
    source = source_of(row)
    assert row.ends is not None
    eos = EOS.get(name, row.ends[0])
    marks = {*MARK.findall(source), *row.ends, eos, "<s>"}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(marks)})
    tokenizer.eos_token, tokenizer.bos_token, tokenizer.chat_template = eos, "<s>", source
    return Renderer(tokenizer, name)


def conversation_with(what: str) -> Conversation:
    """Two questions with their answers, and one thing more."""
    given = chat(
        "Where?", "In Oslo.", "And when?", "At noon.", system="Be brief." if what == "a system message" else None
    )
    if what == "reasoning":
        for message in given.messages[1::2]:
            message["reasoning"] = f"They ask. {message['content']}"
    return Conversation(given.messages, SCHEMAS if what == "tools" else None)


def calling(row: PublishedTemplate, *cities: str) -> Conversation:
    """A question, and an answer that calls a tool for each city; with the tool's definition where it is written."""
    calls = [tool_call("get_weather", call_id=f"abcdefgh{place}", city=city) for place, city in enumerate(cities)]
    answer = Message(role="assistant", content="", tool_calls=calls)
    question = Message(role="user", content="How is it?")
    return Conversation([question, answer], SCHEMAS if row.lists_tools else None)


def read_variables(row: PublishedTemplate) -> set[str]:
    """The names that a template reads and does not only set itself."""
    tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source_of(row))
    undeclared = meta.find_undeclared_variables(tree)
    set_names = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    tests = [test.node for test in tree.find_all(nodes.Test) if test.name == "defined"]
    asked_for = {node.name for node in tests if isinstance(node, nodes.Name)}
    return ((asked_for & undeclared) | (undeclared - set_names)) - GIVEN


def test_every_supported_architecture_has_its_templates() -> None:
    assert FAMILY_TEMPLATES.keys() == FAMILIES.keys()
    assert {"qwen3", "deepseekv3", "glm4moe", "gptoss", "phi3_5", "llama3"} <= ROWS.keys()
    for rows in FAMILY_TEMPLATES.values():
        assert all(row.source or row.trl or row.mistral for row in rows if row.ends), "say where it was read"
        assert all(row.ends for row in rows if row.calls or row.source), "a template that was read has an end"


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_how_prompts_and_answers_begin_and_end(name: str) -> None:
    row, template = ROWS[name], renderer_of(name).chat
    assert row.ends is not None
    ends = [end.token for end in (template.text_end, template.call_end) if end]
    assert ends == list(row.ends[: len(ends)])
    assert (template.call_end is None) == (row.calls == "content only")
    prompt = template.text([Message(role="user", content="Where?")], generation=True)
    assert prompt.endswith(f"Where?{row.prompt}" if row.prompt.lstrip().startswith("[/INST]") else row.prompt)
    assert template.frame.header == row.header
    assert bool(template.opened) == bool(row.closing)
    assert not row.closing or template.closing == row.closing
    assert (template.reasoning_key or "") == row.reasoning


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_which_conversations_become_several_examples(name: str) -> None:
    row, renderer = ROWS[name], renderer_of(name)
    kinds = ["several answers", "a system message"]
    kinds += ["reasoning"] * bool(row.reasoning or row.closing)
    kinds += ["tools"] * (row.calls != "content only" and row.lists_tools)
    split = {kind for kind in kinds if len(renderer.examples(conversation_with(kind))) == 2}
    assert split == set(kinds if "several answers" in row.splits else row.splits)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_says_how_calls_are_written(name: str) -> None:
    row, renderer = ROWS[name], renderer_of(name)
    if row.calls == "content only":
        with pytest.raises(RowError):
            renderer.examples(calling(row, "Oslo"))
        return
    (example,) = renderer.examples(calling(row, "Oslo"))
    assert (json.dumps({"city": "Oslo"}) in example.text) == row.calls.startswith("JSON")
    assert renderer.chat.arguments_form == ("text" if row.calls == "JSON text" else "object")
    assert renderer.chat.parallel_calls == row.parallel
    if row.parallel:
        assert len(renderer.examples(calling(row, "Oslo", "Rome"))) == 1
    else:
        with pytest.raises(RowError):
            renderer.examples(calling(row, "Oslo", "Rome"))
    if not row.lists_tools:
        with pytest.raises(RowError, match="drops the tools"):
            renderer.examples(conversation_with("tools"))


@pytest.mark.parametrize("name", ROWS)
def test_a_row_names_the_variables_of_the_template(name: str) -> None:
    assert set(ROWS[name].variables) == read_variables(ROWS[name])


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command prints."""
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["families", *arguments])
    assert args.run(args) == 0
    return capsys.readouterr().out


def test_the_command_prints_one_architecture_with_its_templates(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "gpt_oss").splitlines()
    assert lines[0].split() == ["model_type", "gpt_oss"]
    assert '  answer begins with  "<|channel|>final<|message|>"' in lines
    assert '  answer ends in      "<|return|>", a call in "<|call|>"' in lines
    assert any(line.startswith("  loss_on") and "one example for each answer" in line for line in lines)
    assert "  template  not seen: finetune check shows what begins and ends its answers" in template_lines("jamba")
    assert printed(capsys).endswith("finetune families NAME prints one of them with its chat templates.\n")


def test_the_command_refuses_an_unknown_name() -> None:
    with pytest.raises(WeightsError, match="did you mean qwen3_moe"):
        run(argparse.Namespace(name="qwen3-moe", markdown=False))


def test_the_documentation_holds_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    table = printed(capsys, "--markdown")
    assert table in page, "replace what follows the heading Families by: finetune families --markdown"
