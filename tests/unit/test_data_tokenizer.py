"""Loading a tokenizer: its pad token, where generation stops, no token added, the template that the recipe names."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.data.render import SHIPPED, read_template, template_args
from finetune.data.tokenizer import end_ids, end_tokens, load_tokenizer
from finetune.errors import DataError, RecipeError, WeightsError
from finetune.generation_config import generation_settings
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


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        ({"pad_token": "<|im_end|>"}, "<|im_end|>"),
        ({"pad_token": "<|im_start|>"}, "<|im_start|>"),
        ({"pad_token": None}, "<|im_end|>"),
        ({"pad_token": None, "unk_token": "<|endoftext|>"}, "<|endoftext|>"),
    ],
    ids=["the EOS", "of the template", "none", "none, and an unknown token"],
)
def test_every_tokenizer_can_fill_up_batches(tmp_path: Path, special: dict[str, str | None], pad: str) -> None:
    tokenizer = load_tokenizer(saved(tmp_path, **special), None, None)
    assert tokenizer.pad_token == pad
    assert len(tokenizer) == len(tiny_tokenizer()), "no token may be added"


@pytest.mark.parametrize("pad", ["<|endoftext|>", "<|im_end|>", "<|fill|>"])
def test_the_recipe_may_name_the_pad_token(tmp_path: Path, pad: str) -> None:
    tokenizer = load_tokenizer(saved(tmp_path / "base"), None, None, ["<|fill|>"], None, pad)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (pad, "<|im_end|>")
    tokenizer.save_pretrained(tmp_path / "adapter")
    again = load_tokenizer(str(tmp_path / "adapter"), None, None)
    assert (again.pad_token, again.get_vocab()) == (pad, tokenizer.get_vocab())


@pytest.mark.parametrize(
    ("pad", "line"),
    [
        (
            "<|fill|>",
            "model.pad_token: not a token of the vocabulary; got <|fill|>; "
            "write a special token of the vocabulary, or add it to model.added_tokens; the EOS may be used, too",
        ),
        (
            "turn",
            "model.pad_token: an ordinary token, which any text may contain; got turn; "
            "write a special token of the vocabulary; the EOS may be used, too",
        ),
    ],
)
def test_a_pad_token_that_cannot_be_one(tmp_path: Path, pad: str, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_tokenizer(saved(tmp_path), None, None, [], None, pad)
    assert str(caught.value) == line


@pytest.mark.parametrize(
    ("generation", "config", "stops"),
    [
        (None, None, ()),
        ({"eos_token_id": [2, 0, 999]}, {"eos_token_id": 1}, ("<|endoftext|>",)),
        ({"eos_token_id": 0}, None, ("<|endoftext|>",)),
        ({"temperature": 0.5}, {"eos_token_id": [0, 1]}, ("<|endoftext|>", "<|im_start|>")),
        (None, {"text_config": {"eos_token_id": [1]}}, ("<|im_start|>",)),
    ],
)
def test_the_tokens_at_which_the_checkpoint_stops_are_known(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any] | None, stops: tuple[str, ...]
) -> None:
    folder = saved(tmp_path)
    for name, settings in (("generation_config.json", generation), ("config.json", config)):
        if settings is not None:
            (tmp_path / name).write_text(json.dumps({**settings, "model_type": "mixtral"}))
    assert end_tokens(load_tokenizer(folder, None, None)) == ("<|im_end|>", *stops)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            '{"eos_token_id": ["</s>"]}',
            ': eos_token_id: is neither a token\'s id nor a list of them; got ["</s>"]; '
            "write the ids at which generation stops",
        ),
        (
            "{",
            ": cannot be read as JSON; got Expecting property name enclosed in double quotes: line 1 column 2 "
            "(char 1); fetch or copy the file again",
        ),
    ],
)
def test_a_generation_config_that_cannot_be_read(tmp_path: Path, text: str, line: str) -> None:
    folder = saved(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(WeightsError) as caught:
        load_tokenizer(folder, None, None)
    assert str(caught.value) == f"{tmp_path}/generation_config.json{line}"


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


OTHER_END = "{% for m in messages %}{{ m.role + '\\n' + CONTENT + '<|endoftext|>' }}{% endfor %}"
OTHER_END += "{% if add_generation_prompt %}assistant\n{% endif %}"


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ("m.content", 'write model.eos_token: "<|endoftext|>", or name another template in data.chat_template'),
        ("m.content + ', dear'", "name another template in data.chat_template"),
    ],
)
def test_an_eos_is_advised_only_where_the_template_works_with_it(tmp_path: Path, content: str, advice: str) -> None:
    (tmp_path / "mine.jinja").write_text(OTHER_END.replace("CONTENT", content), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        load_tokenizer(saved(tmp_path), None, str(tmp_path / "mine.jinja"))
    first, *others = map(str, caught.value.problems)
    assert first == (
        "model.eos_token: the chat template ends an answer with <|endoftext|>, at which this checkpoint does not stop; "
        f"got <|im_end|>; {advice}"
    )
    assert len(others) == ("dear" in content), "all problems of the template at once"
    assert all("changes the answer or writes its own words into it" in other for other in others)


@pytest.mark.parametrize("stops", [None, [0]])
def test_the_checkpoints_own_template_may_end_answers_with_another_token(
    tmp_path: Path, stops: list[int] | None
) -> None:
    folder = saved(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(OTHER_END.replace("CONTENT", "m.content"), encoding="utf-8")
    if stops is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    tokenizer = load_tokenizer(folder, None, None)
    assert end_tokens(tokenizer) == ("<|im_end|>", "<|endoftext|>")
    assert generation_settings(tmp_path, end_ids(tokenizer))["eos_token_id"] == [2, 0]


def test_a_named_template_may_end_answers_where_the_checkpoint_stops(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text(OTHER_END.replace("CONTENT", "m.content"), encoding="utf-8")
    folder = saved(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert load_tokenizer(folder, None, str(tmp_path / "mine.jinja")).eos_token == "<|im_end|>"


def test_rows_that_are_rendered_already_need_no_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(saved(tmp_path), None, None)
    tokenizer.chat_template = None
    assert end_tokens(tokenizer) == ("<|im_end|>",)
    assert end_ids(tokenizer, [None, "<|endoftext|>\n", "### End"]) == [2, 0], "their own marks, of one token each"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"eos_token_id": 2, "_from_model_config": True}, {"eos_token_id": 2, "_from_model_config": True}),
        ({"eos_token_id": [2], "top_p": 0.5}, {"eos_token_id": [2], "top_p": 0.5}),
        ({"eos_token_id": 9, "_from_model_config": True}, {"eos_token_id": [2, 9]}),
        ({}, {"eos_token_id": 2}),
    ],
)
def test_generation_settings_stop_there_too(tmp_path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(before))
    assert generation_settings(tmp_path, [2]) == after
    assert generation_settings(tmp_path, [2], 3)["pad_token_id"] == 3


def test_a_variable_that_the_template_does_not_read_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML + "{% if quick %}fast{% endif %}", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_tokenizer(folder, None, None, template_args={"quik": False, "messages": 1})
    assert [problem.where for problem in caught.value.problems] == [
        "data.template_args.quik",
        "data.template_args.messages",
    ]
    assert template_args(load_tokenizer(folder, None, None, template_args={"quick": True})) == {"quick": True}
