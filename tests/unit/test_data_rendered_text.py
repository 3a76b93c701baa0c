"""`format: rendered`: marks are tokens, BOS and EOS are not doubled, and the loss is on what follows the mark."""

from pathlib import Path
from typing import Any

import pytest

from finetune.data.render import Marks, RenderedText, TokenizedText
from finetune.data.row_errors import RowError
from finetune.data.tokens import prepare
from finetune.data.types import Document
from finetune.errors import DataError
from finetune.recipe import DataSettings, DataSource
from tests.rendering import supervised
from tests.support import tiny_tokenizer

CHATML = "<|im_start|>user\nA river?<|im_end|>\n<|im_start|>assistant\nThe Tay.<|im_end|>\n"
TWO = CHATML + "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\nThe Ness.<|im_end|>\n"
ASSISTANT = Marks("<|im_start|>assistant\n", None)


def with_bos() -> Any:
    """Llama's kind of BOS and EOS, the first added by the tokenizer itself."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.add_bos_token = True
    return tokenizer


def tokens(tokenizer: Any, text: str, marks: Marks = ASSISTANT, loss_on: Any = "assistant") -> TokenizedText:
    rendered = RenderedText(tokenizer, loss_on, marks)
    result = rendered.tokenise([rendered.render(Document(text, rendered=True))])[0]
    if isinstance(result, RowError):
        raise result
    return result


def refusal(text: str, marks: Marks = ASSISTANT, tokenizer: Any = None) -> str:
    with pytest.raises(RowError) as caught:
        tokens(tokenizer or tiny_tokenizer(), text, marks)
    return str(caught.value.problem("f", 1))


def test_the_loss_is_on_every_answer_with_its_end_mark() -> None:
    tokenizer = tiny_tokenizer()
    row = tokens(tokenizer, TWO)
    assert supervised(tokenizer, row) == ["The Tay.<|im_end|>", "The Ness.<|im_end|>"]
    assert tokenizer.decode(row.input_ids) == TWO
    assert row.input_ids.tolist() == tokenizer(TWO, add_special_tokens=False)["input_ids"]
    assert supervised(tokenizer, tokens(tokenizer, TWO, loss_on="last_assistant")) == ["The Ness.<|im_end|>"]


def test_with_loss_on_all_every_token_but_the_first_is_learned() -> None:
    row = tokens(tiny_tokenizer(), CHATML, Marks(None, None), "all")
    assert row.supervised == row.tokens - 1


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("<s>[INST] a [/INST] b</s>", "<s>[INST] a [/INST] b</s>"),
        ("[INST] a [/INST] b", "<s>[INST] a [/INST] b</s>"),
        ("<s> [INST] a [/INST] b </s>", "<s> [INST] a [/INST] b </s>"),
        (" \n<s>[INST] a [/INST] b</s>\n", "<s>[INST] a [/INST] b</s>\n"),
        ("<s>[INST] a [/INST] b</s><s>[INST] c [/INST] d", "<s>[INST] a [/INST] b</s><s>[INST] c [/INST] d</s>"),
    ],
)
@pytest.mark.parametrize("loss_on", ["assistant", "all"])
def test_bos_and_eos_are_there_once(text: str, written: str, loss_on: str) -> None:
    tokenizer = with_bos()
    row = tokens(tokenizer, text, Marks("[/INST]" if loss_on == "assistant" else None, None), loss_on)
    assert tokenizer.decode(row.input_ids) == written
    learned = supervised(tokenizer, row)
    answers = [part.partition("</s>")[0] + "</s>" for part in written.split("[/INST]")[1:]]
    assert learned == (answers if loss_on == "assistant" else [written.removeprefix("<s>")])


def test_an_end_mark_of_ones_own_ends_the_answer_and_an_eos_after_it_is_not_learned() -> None:
    tokenizer = with_bos()
    row = tokens(tokenizer, CHATML, Marks(ASSISTANT.response_template, "<|im_end|>"))
    assert supervised(tokenizer, row) == ["The Tay.<|im_end|>"]
    assert tokenizer.decode(row.input_ids) == f"<s>{CHATML}</s>"


@pytest.mark.parametrize(
    ("text", "marks", "message"),
    [
        (
            "Plain words.",
            ASSISTANT,
            'does not hold the response_template "<|im_start|>assistant\\n"; got "Plain words."; remove the row, or '
            "correct response_template of its data set",
        ),
        (
            TWO.replace("Tay.<|im_end|>", "Tay.").replace("More?<|im_end|>", "More?"),
            ASSISTANT,
            'has an answer without "<|im_end|>" at its end; got "The Tay.\\n<|im_start|>user\\nMore?\\n<|im_start|>'
            "assistant\\nT...; write it at the end of every answer, or name the true one in response_end of the data "
            "set",
        ),
        (
            CHATML,
            Marks("assistant\n", "###"),
            'has an answer without "###" at its end; got "The Tay.<|im_end|>\\n"; write it at the end of every answer, '
            "or name the true one in response_end of the data set",
        ),
        (
            CHATML.replace("The Tay.", " "),
            ASSISTANT,
            "has an empty answer; got {}; fill it in or remove the row",
        ),
        (
            "[INST] a [/INST] kitchen</s>",
            Marks("[/INST] k", None),
            'a token straddles the end of response_template "[/INST] k", so generation would begin or stop '
            "differently; begin and end the mark where a token does: without white space that belongs to the answer",
        ),
        (
            "<|start_header_id|>user",
            ASSISTANT,
            "holds <|start_header_id|>, which this vocabulary lacks and would split into pieces; got "
            '"<|start_header_id|>user"; use the marks of this tokenizer, or add the token to model.added_tokens',
        ),
        ("<s><s>a", ASSISTANT, 'has <s> twice in a row; got "<s><s>a"; keep one of the two'),
        ("a</s> </s>\n", ASSISTANT, 'has </s> twice in a row; got "a</s> </s>\\n"; keep one of the two'),
    ],
)
def test_a_text_whose_marks_are_not_whole_is_refused(text: str, marks: Marks, message: str) -> None:
    own = with_bos() if "</s>" in text or "<s>" in text else tiny_tokenizer()
    said = refusal(text, marks, own)
    assert said.startswith(f"f:1: text: {message.partition('{}')[0]}")
    assert said.endswith(message.partition("{}")[2])


def test_s_and_its_end_are_not_marks_in_the_middle_of_html_but_at_the_ends_of_a_text() -> None:
    assert "which this vocabulary lacks" in refusal("<s>[INST] a [/INST] b")
    assert "which this vocabulary lacks" in refusal("[INST] a [/INST] b </s>")
    assert tokens(tiny_tokenizer(), CHATML.replace("Tay", "<s>Tay</s>")).tokens


def test_rendered_rows_need_no_template_and_are_mixed_with_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    rendered, chat = tmp_path / "rendered.jsonl", tmp_path / "chat.jsonl"
    rendered.write_text('{"text": "[INST] a [/INST] b"}\n')
    chat.write_text('{"prompt": "a", "completion": "b"}\n')
    tokenizer, template = tiny_tokenizer(), tiny_tokenizer().chat_template
    marked = DataSource(path=str(rendered), format="rendered", response_template="[/INST]")
    tokenizer.chat_template = None
    settings = DataSettings(train=marked, max_length=64, packing=True)
    [row] = prepare([marked], tokenizer, settings, seed=0).dataset
    assert tokenizer.decode([label for label in row["labels"] if label >= 0]) == " b<|im_end|>"
    both = [marked, DataSource(path=str(chat), format="prompt_completion")]
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        prepare(both, tokenizer, settings, seed=0)
    tokenizer.chat_template = template
    [row] = prepare(both, tokenizer, settings, seed=0).dataset
    assert sorted(row["row"]) == [f"{chat}:1", f"{rendered}:1"]
