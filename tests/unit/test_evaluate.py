"""Held-out evaluation: what counts as exact, and the routers' load."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.cli.main import main
from finetune.data import Conversation, Message, load_tokenizer
from finetune.data.render import ChatTemplate, read_template
from finetune.errors import DataError, WeightsError
from finetune.evaluate import NumberedRow, Row, _generate, _tasks, evaluate, exact_match, load_table
from tests.rendering import chat, weather
from tests.support import CHATML, save_tiny_mistral, save_tiny_mixtral, tiny_tokenizer


def row(split: str, reference: str, answer: str) -> Row:
    return Row(line=1, split=split, prompt="", reference=reference, answer=answer)


def test_exact_is_equal_up_to_white_space_around_it_and_counted_by_group() -> None:
    rows = [row("a", "{}", " {}\n"), row("a", "{}", "{ }"), row("b", "{}", "{}"), row("b", "{}", "{}, and more")]
    assert exact_match([*rows, row("a", "x", "x")]) == pytest.approx({"all": 60.0, "a": 200 / 3, "b": 50.0})


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three rows of different lengths, so that the batch is padded."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": "light " * (1 + 4 * n), "completion": "on", "split": f"s{n}"} for n in range(3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


def test_a_batch_of_prompts_is_answered_as_each_alone(tmp_path: Path, held_out: Path) -> None:
    folder = save_tiny_mixtral(tmp_path)
    together, alone = (evaluate(folder, held_out, "prompt_completion", batch_size=size) for size in (3, 1))
    assert [answer.answer for answer in together.answers] == [answer.answer for answer in alone.answers]
    assert together.exact_match == dict.fromkeys(("all", "s0", "s1", "s2"), 0.0)
    assert together.load is not None
    assert alone.load is not None
    torch.testing.assert_close(torch.tensor(together.load), torch.tensor(alone.load))
    assert all(sum(shares) == pytest.approx(1.0) for shares in together.load)


def test_prompts_say_the_date_of_the_adapters_training(tmp_path: Path, held_out: Path) -> None:
    folder, tokenizer = save_tiny_mistral(tmp_path / "model"), tiny_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(folder)
    days = [{"template_day": "2024-02-01"}, {"template_day": "2025-03-01"}, {"sha256": "of an older version"}]
    (folder / "merge-report.json").write_text(json.dumps({"adapters": days}))
    answers = evaluate(folder, held_out, "prompt_completion").answers
    assert {answer.prompt[:11] for answer in answers} == {"01 Mar 2025"}


def save_writing(folder: Path, tokens: list[int], template: str | None = None) -> Path:
    """A model that writes, behind each of these tokens, the next one."""
    save_tiny_mistral(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for place, (token, following) in enumerate(pairwise(tokens)):
            model.model.embed_tokens.weight[token] = torch.eye(64)[place]
            model.lm_head.weight[following] += torch.eye(64)[place]
    model.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def one_row(folder: Path, answer: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "say it", "completion": answer}) + "\n")
    return path


def test_a_model_that_gives_the_reference_scores_100(tmp_path: Path) -> None:
    line_break, token = (tiny_tokenizer().encode(text)[0] for text in ("\n", "x"))
    folder = save_writing(tmp_path / "model", [line_break, token, 2])
    result = evaluate(folder, one_row(tmp_path, "x"), "prompt_completion")
    assert (result.answers[0].answer, result.exact_match["all"], result.load) == ("x", 100.0, None)


HEADER = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A:<|im_start|>{{ m.content }}<|endoftext|>"
    "{% else %}Q:{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


@pytest.mark.parametrize(("template", "first"), [(HEADER, ":"), (None, "\n")])
def test_words_before_the_answer_and_ends_other_than_the_eos_are_no_part_of_it(
    tmp_path: Path, template: str | None, first: str
) -> None:
    """The end is the template's own, or one that the generation config lists."""
    colon, token = (tiny_tokenizer().encode(text)[0] for text in (first, "x"))
    header = [1] if template else []
    folder = save_writing(tmp_path / "model", [colon, *header, token, 0, token], template)
    (folder / "generation_config.json").write_text(json.dumps({} if template else {"eos_token_id": [2, 0]}))
    result = evaluate(folder, one_row(tmp_path, "x"), "prompt_completion")
    assert (result.answers[0].answer, result.exact_match["all"]) == ("x", 100.0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    written = _generate(model, load_tokenizer(str(folder), None, None), [result.answers[0].prompt], 8, 1)
    assert list(written) == ["<|im_start|>" * len(header) + "x"], "it stops there"


@pytest.mark.parametrize("opened", [False, True], ids=["the model opens the block", "the prompt does"])
def test_there_is_room_for_reasoning_before_the_answer(opened: bool) -> None:
    tokenizer = tiny_tokenizer()
    prompt = "{% if add_generation_prompt %}assistant:" + "<think>" * opened + "{% endif %}"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{% if m.reasoning_content and not OPENED %}<think>"
        "{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>{% endfor %}"
    ).replace("OPENED", str(opened)) + prompt
    answer = Message(role="assistant", content="<think>because it is so</think>x")
    given = Conversation([Message(role="user", content="say it"), answer])
    [task] = _tasks(ChatTemplate(tokenizer, "this template"), [(1, {}, given)], "rows.jsonl")
    assert task.prompt.endswith("assistant:" + "<think>" * opened)
    assert "because it is so" in task.written
    assert task.written.removesuffix("<|im_end|>").endswith("</think>x")
    assert task.reference == "x"


SWITCH = "{% if enable_thinking is defined and not enable_thinking %}quick {% endif %}"


def test_prompts_have_the_variables_of_the_training(
    tmp_path: Path, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny_mistral(tmp_path / "model")
    (folder / "chat_template.jinja").write_text(SWITCH + CHATML, encoding="utf-8")
    words = ["evaluate", str(folder), "--data", str(held_out), "--format", "prompt_completion"]
    words += ["--output", str(tmp_path / "out.json"), "--template-args"]
    assert main([*words, "enable_thinking=false"]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["template_args"] == {"enable_thinking": False}
    assert {answer["prompt"][:6] for answer in written["answers"]} == {"quick "}
    report = {"adapters": [{"template_args": {"enable_thinking": True}}, {"template_args": {"enable_thinking": False}}]}
    (folder / "merge-report.json").write_text(json.dumps(report))
    recorded = evaluate(folder, held_out, "prompt_completion")
    assert {answer.prompt[:6] for answer in recorded.answers} == {"quick "}
    assert main([*words, "enable_thinking=true"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        '--template-args: the model was trained with {"enable_thinking": false}; got {"enable_thinking": true}; '
        "leave it out"
    )
    for wrong in ("enable_thinking", "=1", "x=null"):
        with pytest.raises(SystemExit):
            main([*words, wrong])
        assert f"write NAME=VALUE, a value being text, a number, true or false; got {wrong}" in capsys.readouterr().err


def test_prompts_are_rendered_as_in_training_tools_and_system_policy_included(tmp_path: Path) -> None:
    folder = save_tiny_mistral(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = read_template("mistral")
    tokenizer.save_pretrained(folder)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": chat("hi", "x", system="Be brief.").messages}) + "\n")
    with pytest.raises(DataError, match=r"jsonl:1: messages\[0\].role: the model's chat template has no system role"):
        evaluate(folder, tmp_path / "rows.jsonl", "messages")
    result = evaluate(folder, tmp_path / "rows.jsonl", "messages", system="merge_into_first_user")
    assert result.answers[0].prompt == " [INST] Be brief.\n\nhi [/INST]"
    tokenizer.chat_template = read_template("chatml")
    tokenizer.save_pretrained(folder)
    asked = weather()
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": asked.messages, "tools": asked.tools}) + "\n")
    prompt = evaluate(folder, tmp_path / "rows.jsonl", "messages").answers[0].prompt
    assert '"name": "get_weather", "description"' in prompt
    assert prompt.endswith("<tool_response>\n22 degrees\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path, held_out: Path) -> None:
    with pytest.raises(WeightsError, match=r"no checkpoint here; give a folder with config.json"):
        evaluate(tmp_path, held_out, "prompt_completion")


def test_rows_that_end_with_a_tool_call_are_refused_by_their_line(tmp_path: Path) -> None:
    examples = Path(__file__).parents[2] / "data" / "examples" / "messages.jsonl"
    row = json.loads(examples.read_text(encoding="utf-8").splitlines()[-1])
    row["messages"] = row["messages"][:2]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    model = save_tiny_mistral(tmp_path / "model")
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: the last message calls a tool, and exact match compares texts"
    ):
        evaluate(model, tmp_path / "rows.jsonl", "messages")


def test_a_row_that_the_template_does_not_get_past_is_named_by_its_line() -> None:
    tokenizer = tiny_tokenizer()
    endless = "{% for a in range(99999) %}" + "x" * 999 + "{% endfor %}"
    tokenizer.chat_template = CHATML + "{% if 'endless' in messages[0].content %}" + endless + "{% endif %}"
    questions = enumerate(("a", "endless", "c", "endless"), 1)
    rows: list[NumberedRow] = [(line, {}, chat(question, "b")) for line, question in questions]
    with pytest.raises(DataError) as caught:
        _tasks(ChatTemplate(tokenizer, "this template"), rows, "rows.jsonl")
    assert str(caught.value) == (
        "rows.jsonl:2: this template wrote more than 16,000,000 characters; "
        "remove the row, or correct its loops, or name another one in data.chat_template"
    )


def test_the_load_table_has_a_line_a_layer() -> None:
    assert load_table([[0.25, 0.75], [0.5, 0.5]]).splitlines()[1:] == [
        "    0      25.0%     75.0%",
        "    1      50.0%     50.0%",
    ]


def test_a_path_that_the_system_refuses_is_one_line_and_comes_before_the_work(
    tmp_path: Path, held_out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    words = ["evaluate", str(save_tiny_mixtral(tmp_path / "model")), "--data", str(held_out), "--output"]
    assert main([*words, str(tmp_path / "file" / "out" / "x.json")]) == 1
    printed = capsys.readouterr()
    assert "exact match" not in printed.out
    assert "cannot be accessed (Not a directory); check that its folder exists and can be" in printed.err
    with pytest.raises(SystemExit):
        main([*words, "x.json", "--batch-size", "0"])
    assert "must be an integer of at least 1; got 0" in capsys.readouterr().err


def test_a_checkpoint_in_the_nf4_of_4_bit_loading_is_refused(tmp_path: Path, held_out: Path) -> None:
    folder = save_tiny_mixtral(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "moe_nf4"}}))
    with pytest.raises(WeightsError, match=r"the checkpoint is already quantised; got moe_nf4; give the 16-bit check"):
        evaluate(folder, held_out, "prompt_completion")
