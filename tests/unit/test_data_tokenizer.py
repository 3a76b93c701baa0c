"""Loading a tokenizer: a pad token that is not the EOS, no token added, the template that the recipe names."""

import json
from pathlib import Path

import pytest

from finetune.data.render import SHIPPED, read_template
from finetune.data.tokenizer import check_unended_answers, load_tokenizer
from finetune.errors import DataError, WeightsError
from finetune.recipe.section_checks import SHIPPED_TEMPLATES
from tests.support import CHATML, tiny_tokenizer


def saved(folder: Path, **special_tokens: str | None) -> str:
    """The tiny tokenizer on disk with other special tokens."""
    tiny_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, **special_tokens}))
    return str(folder)


def test_a_pad_token_of_its_own_is_kept(tmp_path: Path) -> None:
    assert load_tokenizer(saved(tmp_path), None, None).pad_token == "<|pad|>"


@pytest.mark.parametrize("pad", [None, "<|im_end|>"])
def test_where_pad_would_be_the_eos_the_unknown_token_pads(tmp_path: Path, pad: str | None) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, pad_token=pad, unk_token="<|endoftext|>"), None, None)
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert len(tokenizer) == len(tiny_tokenizer()), "no token may be added"


@pytest.mark.parametrize("unk", [None, "<|im_end|>"])
def test_where_nothing_can_pad_the_tokenizer_is_refused(tmp_path: Path, unk: str | None) -> None:
    with pytest.raises(WeightsError) as caught:
        load_tokenizer(saved(tmp_path, pad_token="<|im_end|>", unk_token=unk), None, None)
    assert str(caught.value) == (
        f"{tmp_path}: the tokenizer has no pad token other than its EOS and the special tokens of the chat template; "
        f"got pad '<|im_end|>', unk {unk!r}, eos '<|im_end|>'; "
        "set pad_token in its tokenizer_config.json to a token of the vocabulary that no text contains"
    )


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError,
        match=r"the tokenizer has no EOS token; write model.eos_token, or set eos_token in its tokenizer_config",
    ):
        load_tokenizer(saved(tmp_path, eos_token=None), None, None)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no tokenizer could be loaded; got .*; give the folder of a checkpoint"):
        load_tokenizer(str(tmp_path), None, None)


def test_its_own_template_is_kept_unless_another_is_named(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    assert load_tokenizer(folder, None, None).chat_template == CHATML
    assert load_tokenizer(folder, None, "alpaca").chat_template == read_template("alpaca")


def test_a_template_can_be_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert read_template(str(tmp_path / "mine.jinja")) == "{{ messages }}"


def test_a_template_that_is_neither_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        read_template("chatlm")
    assert str(caught.value) == (
        "data.chat_template: no such template; got 'chatlm' (FileNotFoundError); "
        f"name a shipped template ({', '.join(SHIPPED)}) or the path of a .jinja file"
    )


def test_the_shipped_templates_are_these() -> None:
    mistral = ("", "-v11", "-v13", "-v15", "-v3", "-v3-tekken", "-v7", "-v7-tekken")
    assert list(SHIPPED) == ["alpaca", "chatml", *(f"mistral{version}" for version in mistral)]
    assert sorted(SHIPPED_TEMPLATES) == list(SHIPPED), "the recipe's own list"


NEXT_MARK = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + WORDS + m.content }}{% endfor %}<|im_start|>"


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("''", 'write model.eos_token: "<|im_start|>", or name another template in data.chat_template'),
        ("('' if m.role == 'user' else '<think></think>')", "name another template in data.chat_template"),
    ],
)
def test_an_eos_is_advised_only_where_the_template_works_with_it(words: str, advice: str) -> None:
    tokenizer = tiny_tokenizer()
    prompt = "{% if add_generation_prompt %}{{ 'assistant\\n' }}{% endif %}"
    tokenizer.chat_template = NEXT_MARK.replace("WORDS", words) + prompt
    with pytest.raises(DataError) as caught:
        check_unended_answers(tokenizer)
    first, *others = caught.value.problems
    assert (first.where, first.got, first.do) == ("model.eos_token", "<|im_end|>", advice)
    assert tokenizer.eos_token == "<|im_end|>"
    if "think" not in words:
        assert others == []
    else:
        assert "changes the answer or writes its own words into it" in str(others[-1])
