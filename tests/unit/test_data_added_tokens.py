"""Tokens that the recipe adds: what becomes of the tokenizer, and what is refused with the line to write."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer

from finetune.base import recipe_tokenizer
from finetune.data import load_tokenizer
from finetune.data.render import IGNORED, Renderer
from finetune.data.types import Conversation, Message
from finetune.errors import DataError, FinetuneError, RecipeError, WeightsError
from finetune.recipe import load_recipe
from tests.real_tokenizers import mistral_tokenizer
from tests.rendering import labelled
from tests.support import save_tiny_mixtral, tiny_tokenizer
from tests.unit.added_tokens import KNOWN, MARKS, NEW, TURNS, recipe_for
from tests.unit.recipe_writing import RecipeFile, changed

ROOT = Path(__file__).resolve().parents[2]
CONVERSATION = Conversation(
    [
        Message(role="user", content="turn on the light"),
        Message(role="assistant", content="the kitchen light"),
        Message(role="user", content="ten minutes"),
        Message(role="assistant", content="set"),
    ]
)


@pytest.fixture
def turns(tmp_path: Path) -> str:
    """The path of a template with the marks."""
    path = tmp_path / "turns.jinja"
    path.write_text(TURNS, encoding="utf-8")
    return str(path)


def saved(folder: Path, template: str | None = None, **special_tokens: str | None) -> str:
    """The tiny tokenizer on disk with another template of its own and other special tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **special_tokens}))
    return str(folder)


def complaint(kind: type[FinetuneError], *arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        load_tokenizer(*arguments)
    return str(caught.value)


def test_each_added_token_is_one_special_token_behind_the_vocabulary(tmp_path: Path, turns: str) -> None:
    tokenizer = load_tokenizer(saved(tmp_path), None, turns, MARKS, MARKS[1])
    assert tokenizer.convert_tokens_to_ids(MARKS) == NEW
    assert len(tokenizer) == KNOWN + 2
    assert tokenizer.encode("light<|turn|>light") == [*tokenizer.encode("light"), NEW[0], *tokenizer.encode("light")]
    assert tokenizer.decode([NEW[0], 40, NEW[1]], skip_special_tokens=True) == tokenizer.decode([40])
    assert tokenizer.eos_token_id == NEW[1]


def test_a_saved_tokenizer_keeps_them(tmp_path: Path, turns: str) -> None:
    tokenizer = load_tokenizer(saved(tmp_path / "base"), None, turns, MARKS, MARKS[1])
    tokenizer.save_pretrained(tmp_path / "adapter")
    again = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert (again.get_vocab(), again.eos_token, again.pad_token) == (tokenizer.get_vocab(), MARKS[1], "<|pad|>")
    assert again.chat_template == TURNS
    # What was added once is of the vocabulary: its own training needs no added tokens.
    assert load_tokenizer(str(tmp_path / "adapter"), None, turns).get_vocab() == tokenizer.get_vocab()


def test_without_the_recipes_word_nothing_is_added(tmp_path: Path) -> None:
    assert load_tokenizer(saved(tmp_path), None, None).get_vocab() == tiny_tokenizer().get_vocab()


def test_the_answers_and_their_new_end_are_supervised_and_nothing_else(tmp_path: Path, turns: str) -> None:
    tokenizer = load_tokenizer(saved(tmp_path), None, turns, MARKS, MARKS[1])
    rendered = labelled(Renderer(tokenizer, "this template"), CONVERSATION)
    supervised = [label for label in rendered.labels if label != IGNORED]
    assert tokenizer.decode(supervised) == "the kitchen light<|over|>set<|over|>"
    assert [token for token in supervised if token >= KNOWN] == [NEW[1]] * 2
    assert list(rendered.input_ids).count(NEW[0]) == 4


@pytest.mark.parametrize("version", ["v1", "v3"])
def test_chatml_on_mistrals_own_tokenizers(version: str, tmp_path: Path) -> None:
    mistral_tokenizer(version).save_pretrained(tmp_path)
    assert 'write model.added_tokens: ["<|im_start|>", "<|im_end|>"] and model.eos_token: "<|im_end|>"' in complaint(
        DataError, str(tmp_path), None, "chatml"
    )
    tokenizer = load_tokenizer(str(tmp_path), None, "chatml", ["<|im_start|>", "<|im_end|>"], "<|im_end|>")
    rendered = labelled(Renderer(tokenizer, "this template"), CONVERSATION)
    supervised = [int(label) for label in rendered.labels if label != IGNORED]
    assert tokenizer.decode(supervised) == "the kitchen light<|im_end|>set<|im_end|>"
    assert list(rendered.input_ids).count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 4
    assert tokenizer.pad_token == "<unk>"


def test_a_token_of_the_vocabulary_is_not_added_again(tmp_path: Path) -> None:
    lines = complaint(RecipeError, saved(tmp_path), None, None, ["<|turn|>", "<|im_start|>", "turn"]).splitlines()
    turn = tiny_tokenizer().get_vocab()["turn"]
    assert lines == [
        "model.added_tokens[1]: the vocabulary has this token (id 1), with a row that the checkpoint trained; "
        "got <|im_start|>; remove it from the list: it need not be added",
        f"model.added_tokens[2]: the vocabulary has this token (id {turn}), with a row that the checkpoint trained; "
        "got turn; remove it from the list: it need not be added",
    ]


@pytest.mark.parametrize(
    ("eos", "line"),
    [
        (
            "<|over|>",
            "model.eos_token: not a token of the vocabulary; got <|over|>; "
            "write a special token of the vocabulary, or add it to model.added_tokens",
        ),
        (
            "turn",
            "model.eos_token: an ordinary token, which any text may contain; got turn; "
            "write a special token of the vocabulary",
        ),
    ],
)
def test_an_end_of_answers_that_cannot_be_one(tmp_path: Path, eos: str, line: str) -> None:
    assert complaint(RecipeError, saved(tmp_path), None, None, [], eos) == line


def test_marks_that_would_be_split_are_refused_with_the_lines_to_write(tmp_path: Path, turns: str) -> None:
    base = saved(tmp_path)
    pieces = [len(tiny_tokenizer().encode(mark)) for mark in MARKS]
    assert complaint(DataError, base, None, turns) == (
        f"data.chat_template: {turns} writes special tokens that this vocabulary lacks and would split into pieces; "
        f"got <|turn|> in {pieces[0]} pieces, <|over|> in {pieces[1]} pieces; "
        'write model.added_tokens: ["<|turn|>", "<|over|>"] and model.eos_token: "<|over|>", or name another template'
    )
    half = complaint(DataError, base, None, turns, ["<|turn|>"])
    assert f"got <|over|> in {pieces[1]} pieces; " in half
    assert 'write model.added_tokens: ["<|turn|>", "<|over|>"] and model.eos_token: "<|over|>"' in half


def test_marks_that_a_template_puts_together_are_seen_as_well(tmp_path: Path) -> None:
    source = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|im_end|>{% endfor %}{# <|comment|> #}"
    (tmp_path / "roles.jinja").write_text(source, encoding="utf-8")
    found = complaint(DataError, saved(tmp_path / "base"), None, str(tmp_path / "roles.jinja"))
    assert 'write model.added_tokens: ["<|user|>", "<|assistant|>"], or name another template' in found


def test_answers_that_end_with_another_token_than_the_eos_are_refused(tmp_path: Path, turns: str) -> None:
    assert complaint(DataError, saved(tmp_path), None, turns, MARKS) == (
        "model.eos_token: the chat template ends an answer with <|over|>, at which this checkpoint does not stop; "
        'got <|im_end|>; write model.eos_token: "<|over|>", or name another template in data.chat_template'
    )
    other = saved(tmp_path / "other", eos_token="<|endoftext|>")
    assert 'got <|endoftext|>; write model.eos_token: "<|im_end|>"' in complaint(DataError, other, None, "chatml")
    assert load_tokenizer(other, None, "chatml", [], "<|im_end|>").eos_token == "<|im_end|>"


def test_a_checkpoint_that_was_trained_on_marks_in_pieces_keeps_its_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    assert load_tokenizer(saved(tmp_path, template), None, None).chat_template == template


def test_a_tokenizer_that_is_longer_than_the_embedding_is_refused(tmp_path: Path) -> None:
    base = save_tiny_mixtral(tmp_path / "base", vocab_size=KNOWN)
    recipe = recipe_for(base, tmp_path / "turns.jinja")
    assert recipe_tokenizer(base, recipe)[1] == NEW
    tokenizer, _ = recipe_tokenizer(base, recipe)
    tokenizer.save_pretrained(base)  # as when only the tokenizer of another model was copied over
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"added_tokens": []})})
    with pytest.raises(WeightsError) as caught:
        recipe_tokenizer(base, plain)
    assert str(caught.value) == (
        f"{base}: the tokenizer has tokens outside the model's embedding of {KNOWN} rows; got id {NEW[1]}; "
        "use the checkpoint's own tokenizer, and name the new tokens in model.added_tokens"
    )


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ('["<|a|>", "<|a|>"]', 'model.added_tokens[1]: listed twice; got "<|a|>"; keep one of the two'),
        (
            '["<|a b|>"]',
            'model.added_tokens[0]: white space in a token; got "<|a b|>"; '
            "write it without: a tokenizer may strip or split white space",
        ),
        ('[""]', 'model.added_tokens[0]: out of range; got ""; write a list of names'),
        ('"<|a|>"', 'model.added_tokens: wrong type; got "<|a|>"; write a list of names'),
    ],
)
def test_a_list_that_is_none_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, found: str) -> None:
    text = changed(("  dtype: float32", f"  dtype: float32\n  added_tokens: {line}"))
    (said,) = RecipeFile(tmp_path, monkeypatch).problems(text)
    assert said.removeprefix("recipe.yaml:6: ").startswith(found)


def test_the_recipe_of_the_documentation_is_sound() -> None:
    text = (ROOT / "docs" / "added-tokens.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    sections = yaml.safe_load(block)
    overrides = [f"{name}.{key}={json.dumps(value)}" for name, keys in sections.items() for key, value in keys.items()]
    recipe = load_recipe(ROOT / "recipes" / "mixtral-8x7b" / "sft-qlora.yaml", overrides)
    assert recipe.model.added_tokens == ["<|im_start|>", "<|im_end|>"]
    assert (recipe.model.eos_token, recipe.data.chat_template) == ("<|im_end|>", "chatml")
