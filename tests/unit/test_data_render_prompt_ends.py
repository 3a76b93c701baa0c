"""Where prompts end: proven without rendering or tokenising them again, and only where that is right."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from finetune.data.render import SHIPPED, ChatTemplate, Renderer, read_template
from finetune.data.render.control_tokens import control_tokens
from finetune.data.render.encoder import Alphabet, Encoder, PieceLengths
from finetune.data.row_errors import RowError
from tests.real_tokenizers import mistral_renderer, mistral_tokenizer
from tests.rendering import chat, labelled, supervised, weather
from tests.support import tiny_tokenizer

START = "{% for message in messages %}"
TURN = "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' }}"
END = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

MACRO = "{% macro roles() %}{% for m in messages %}{{ m.role }}{% endfor %}{% endmacro %}"
COUNT = "{% set ns = namespace(n=0) %}"
# Each looks at more than the turns so far, in its own way, and writes something else for it.
LOOKING_AHEAD = {
    "loop.last": START + "{% if loop.last %}!{% endif %}" + TURN + END,
    "loop.last behind": START + TURN + "{% if not loop.last %}\n{% endif %}" + END,
    "nextitem": START + "{% if loop.nextitem %}!{% endif %}" + TURN + END,
    "length": START + "{{ loop.length }}" + TURN + END,
    "revindex": START + "{{ loop.revindex }}" + TURN + END,
    "filter": "{{ messages | length }}" + START + TURN + END,
    "negative": "{{ messages[-1].role }}" + START + TURN + END,
    "slice": "{{ 'more' if messages[1:] }}" + START + TURN + END,
    "next": START + "{% if messages[loop.index0 + 1] %}!{% endif %}" + TURN + END,
    "renamed": "{% set turns = messages %}{% for message in turns %}{% if loop.last %}!{% endif %}" + TURN + END,
    "twice": START + "{{ message.role }}" + "{% endfor %}" + START + TURN + END,
    "nested": START + "{% for m in messages %}{{ m.role }}{% endfor %}" + TURN + END,
    "nested once": START + "{% if loop.first %}{% for m in messages %}{{ m.role }}{% endfor %}{% endif %}" + TURN + END,
    "macro": MACRO + START + "{% if loop.first %}{{ roles() }}{% endif %}" + TURN + END,
    "prompting inside": START + "{% if add_generation_prompt %}!{% endif %}" + TURN + END,
    "ending by state": COUNT + START + TURN + "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "else": START + TURN + "{% else %}nothing" + END,
    "break": START + "{% if loop.index0 == 3 %}{% break %}{% endif %}" + TURN + END,
    "loop handed on": START + "{% set it = loop %}{% if it.last %}!{% endif %}" + TURN + END,
}
SO_FAR = {
    "plain": START + TURN + END,
    "first": "{% if messages[0].role == 'system' %}s{% endif %}"
    + START
    + "{{ loop.index }}{{ loop.first }}"
    + TURN
    + END,
    "previous": START + "{{ loop.previtem.role if loop.previtem }}" + TURN + END,
    "no prompt": START + TURN + "{% endfor %}",
    "behind": START + TURN + END + "...",
    **{name: read_template(name) for name in SHIPPED},
}


def template(source: str) -> ChatTemplate:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = source
    return ChatTemplate(tokenizer, "X")


@pytest.mark.parametrize("source", {**LOOKING_AHEAD, **SO_FAR}.values(), ids={**LOOKING_AHEAD, **SO_FAR}.keys())
def test_prompts_found_in_one_rendering_are_those_that_are_rendered(source: str) -> None:
    chat_template = template(source)
    conversations = [chat("a", "b"), chat("a", "b", "c", "d", "e", "f"), weather()]
    for conversation in conversations:
        messages, tools = conversation.messages, conversation.tools
        indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        try:
            text, prompts = chat_template.text_and_prompts(messages, tools, indices)
        except RowError:
            assert tools, "a template without tools"
            continue
        assert text == chat_template.text(messages, tools)
        for index, prompt in zip(indices, prompts, strict=True):
            rendered = chat_template.text(messages[:index], tools, generation=True)
            assert rendered == (prompt.text if prompt.end is None else text[: prompt.end])


@pytest.mark.parametrize("source", SO_FAR.values(), ids=SO_FAR.keys())
def test_one_rendering_is_enough_for_a_template_that_looks_at_what_was_said_so_far(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_template = template(source)
    monkeypatch.setattr(chat_template, "text", None)  # what renders a prompt
    assert len(chat_template.text_and_prompts(chat("a", "b", "c", "d").messages, None, [1, 3])[1]) == 2


def test_what_the_template_writes_is_what_apply_chat_template_writes() -> None:
    for source in ({**LOOKING_AHEAD, **SO_FAR}).values():
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = source
        messages: list[Any] = chat("a", "b", "c", "d").messages
        for generation in (False, True):
            wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
            assert ChatTemplate(tokenizer, "X").text(messages, None, generation) == wanted


def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, control_tokens(tokenizer))


def merges_only(prefix: str | None) -> Any:
    """Mistral v1's pieces with the older normalizer (a space before every part, or nowhere) in place of Metaspace."""
    tokenizer = mistral_tokenizer("v1")
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    replace = normalizers.Replace(" ", "\u2581")
    backend.normalizer = replace if prefix is None else normalizers.Sequence([normalizers.Prepend("\u2581"), replace])
    backend.pre_tokenizer = None
    other = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    other.chat_template = tokenizer.chat_template
    return other


OLDER = (lambda: merges_only(None), lambda: merges_only("every"))
TEXT = "<s> [INST] caf\u00e9 \U0001f469\u200d\U0001f467 \x00 in the  kitchen [/INST] The light</s> [INST] x [/INST]  y"


@pytest.mark.parametrize("build", [lambda: mistral_tokenizer("v1"), lambda: mistral_tokenizer("v3"), *OLDER])
@pytest.mark.parametrize("text", [TEXT, TEXT[3:], TEXT[4:]])
def test_where_pieces_end_is_known_from_their_lengths(build: Callable[[], Any], text: str) -> None:
    tokenizer = build()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    lengths = PieceLengths.of(state)
    assert lengths is not None
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(offsets["input_ids"], np.int32)
    ends = lengths.ends(text, ids).tolist()
    assert len(ends) == len(ids)
    assert lengths.ends(text + "!", ids).tolist() == []
    own = encoder(tokenizer)
    for place in range(1, len(text)):
        (border,) = own.borders(text, ids, [place])
        prefix = tokenizer(text[:place], add_special_tokens=False)["input_ids"]
        assert border == (len(prefix) if prefix == ids[: len(prefix)].tolist() and place in ends else None)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s["model"].update(ignore_merges=True), "a whole word is looked up first"),
        (lambda s: s["model"].update(dropout=0.1), "merges are left out at random"),
        (lambda s: s["model"].update(byte_fallback=False), "characters may be unknown"),
        (lambda s: s["model"].update(end_of_word_suffix="</w>"), "pieces are longer than their text"),
        (lambda s: s["model"]["vocab"].pop("<0x0A>"), "a byte has no piece"),
        (lambda s: s.update(normalizer={"type": "NFKC"}), "text is changed"),
        (lambda s: s["pre_tokenizer"].update(split=True), "text is cut into words"),
        (lambda s: s["pre_tokenizer"].update(prepend_scheme="always"), "spaces are put in between"),
    ],
)
def test_lengths_are_used_only_where_the_tokenizers_own_file_says_that_they_hold(change: Any, why: str) -> None:
    state = json.loads(mistral_tokenizer("v1").backend_tokenizer.to_str())
    change(state)
    assert PieceLengths.of(state) is None, why


def test_a_special_token_that_takes_the_space_beside_it_proves_nothing() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True, rstrip=True)], special_tokens=True)
    own = encoder(tokenizer)
    own.learn("<|im_start|>assistant\n", "x")
    text = "<|im_start|>assistant\nhi<|im_end|>"
    assert own.borders(text, own.ids([text])[0], [len("<|im_start|>assistant\n")]) == [None]
    renderer = Renderer(tokenizer, "chatml")  # then the prompts themselves are tokenised
    assert supervised(tokenizer, labelled(renderer, chat("a", "b"))) == ["b<|im_end|>"]


def test_a_special_token_inside_a_longer_one_is_not_counted_for_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("[<|im_start|>]", special=True, normalized=False)], special_tokens=True)
    own = encoder(tokenizer)
    own.learn("<|im_start|>assistant\n", "x")
    text = "[<|im_start|>]<|im_start|>assistant\nhi<|im_end|><|im_start|>assistant\n"
    assert own.borders(text, own.ids([text])[0], [text.index("hi")]) == [None]


def test_rows_that_nothing_proves_are_tokenised_again_and_labelled_all_the_same() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = read_template("alpaca")
    renderer = Renderer(tokenizer, "alpaca")
    renderings = [renderer.render(chat("a", "b", "c", "d")), renderer.render(chat("the light", " on"))]
    first, second = renderer.tokenise(renderings)
    assert not isinstance(first, RowError)
    assert tokenizer.decode([x for x in first.labels.tolist() if x != -100]) == "b<|im_end|>d<|im_end|>"
    assert not isinstance(second, RowError)


def test_a_turn_of_100_000_characters_keeps_its_border() -> None:
    long = "emoji \U0001f469\u200d\U0001f467, CRLF\r\n, NUL \x00, \u05e9\u05dc\u05d5\u05dd\u200f " * 3200
    assert len(long) > 100_000
    for version in ("v1", "v3"):
        rendered = labelled(mistral_renderer(version), chat(long, long))
        tokenizer = mistral_tokenizer(version)
        said = long.rstrip(" ") if version == "v3" else long
        assert supervised(tokenizer, rendered) == [said + "</s>"]


def lossy(*missing: int) -> Any:
    """The tiny tokenizer without the tokens of these bytes (byte-level: 0x00-0x20 stand at U+0100-U+0120)."""
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    for byte in missing:
        sign = chr(256 + byte) if byte <= 0x20 else chr(byte)
        del state["model"]["vocab"][sign]
    backend = Tokenizer.from_str(json.dumps(state))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = read_template("chatml")
    return tokenizer


def test_a_character_that_the_tokenizer_would_drop_is_refused() -> None:
    tokenizer = lossy(0x04, 0xF1)
    assert tokenizer.decode(tokenizer("a\x04b")["input_ids"]) == "ab", "dropped without a word"
    renderer = Renderer(tokenizer, "chatml")
    assert renderer.render(chat("caf\u00e9 \x05", "\U0001f600"))
    with pytest.raises(RowError) as caught:
        renderer.render(chat("a", "one\x04two"))
    assert str(caught.value.problem("f", 1)) == (
        "f:1: contains U+0004, for which the tokenizer has no token: it would be dropped; got "
        '"start|>assistant\\\\none\\\\x04two<|im_end|>\\\\n"; remove the character'
    )
    with pytest.raises(RowError, match=r"contains U\+46000, for which"):
        renderer.render(chat("a", "\U00046000"))
    for complete in (tiny_tokenizer(), lossy(0xC0, 0xFF)):  # no UTF-8 text has these bytes
        assert Alphabet(json.loads(complete.backend_tokenizer.to_str())).dropped == b""


def test_a_character_that_the_tokenizer_reads_as_a_space_is_refused() -> None:
    with pytest.raises(RowError, match=r"contains U\+2581, which the tokenizer reads as a space"):
        mistral_renderer("v1").render(chat("a", "\u2581\u2582\u2583"))
    assert Alphabet(json.loads(merges_only(None).backend_tokenizer.to_str())).space == "\u2581"
