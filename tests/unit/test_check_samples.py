"""Token rows as text again: every token in one piece, supervision and special tokens where they are, nothing hidden."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune.check.samples import HEAD_TOKENS, TAIL_TOKENS, Piece, pieces, shown
from tests.real_tokenizers import mistral_tokenizer
from tests.support import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER.encode(text, add_special_tokens=False)
    return ids


def all_read(text: str) -> list[Piece]:
    ids = ids_of(text)
    return pieces(ids, [False] * len(ids), TOKENIZER)


TEXTS = st.lists(
    st.sampled_from(["light", " on", "é", "👩‍🚒", "שלום", "\ufffd", "\x00", "\r\n", "  ", "<|im_end|>", "日"])
)


@given(TEXTS, st.data())
def test_pieces_are_the_row_token_by_token(parts: list[str], data: Any) -> None:
    ids = ids_of("".join(parts))
    supervised = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    made = pieces(ids, supervised, TOKENIZER)
    assert [token for piece in made for token in piece.ids] == ids
    assert [piece.supervised for piece in made for _ in piece.ids] == supervised


@given(TEXTS)
def test_the_pieces_of_a_text_make_the_text(parts: list[str]) -> None:
    assert "".join(piece.text for piece in all_read("".join(parts))) == "".join(parts)


def test_the_bytes_of_a_character_make_one_piece() -> None:
    assert [(piece.text, len(piece.ids)) for piece in all_read("aé👩")] == [("a", 1), ("é", 2), ("👩", 4)]


def test_a_special_token_is_a_piece_of_its_own_also_after_broken_bytes() -> None:
    ids = [*ids_of("é")[:1], *ids_of("<|im_end|>b\ufffd<|im_end|>")]
    made = pieces(ids, [False] * len(ids), TOKENIZER)
    assert [(piece.text, piece.special) for piece in made] == [
        ("\ufffd", False),
        ("<|im_end|>", True),
        ("b", False),
        ("\ufffd", False),
        ("<|im_end|>", True),
    ]


def test_a_long_row_is_cut_in_the_middle_and_says_so() -> None:
    length = HEAD_TOKENS + TAIL_TOKENS + 7
    made = pieces(ids_of("a") * length, [False] * (length - 1) + [True], TOKENIZER)
    assert sum(len(piece.ids) for piece in made) == HEAD_TOKENS + TAIL_TOKENS
    assert [piece.left_out for piece in made if piece.left_out] == [7]
    assert made[-1].supervised


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("one two", "one two"),
        (" a  b \n", "·a··b·⏎\n"),
        ("\x1b[31m\x00\t\r\n", "␛[31m␀␉␍⏎\n"),
        ("a\u202eb\u2066c", "a<U+202E>b<U+2066>c"),
        ("\x85\x9b\u2028", "<U+0085><U+009B><U+2028>"),
        ("👩‍🚒 שלום", "👩‍🚒 שלום"),
    ],
)
def test_invisible_characters_are_shown(text: str, seen: str) -> None:
    assert shown([Piece(text, (), False)]) == [seen]


def test_spaces_are_seen_across_the_borders_of_tokens() -> None:
    assert shown([Piece("a ", (), False), Piece(" b", (), False), Piece(" c", (), False)]) == ["a·", "·b", " c"]


@pytest.mark.parametrize("version", ["v1", "v3", "tekken"])
def test_pieces_of_mistrals_tokenizers_keep_every_space(version: str) -> None:
    tokenizer = mistral_tokenizer(version)
    text = "Wie  geht's?\n   Gut, 👩‍🚒 danke.\tשלם é "
    ids = tokenizer.encode(text, add_special_tokens=False)
    eos = tokenizer.eos_token_id
    made = pieces([*ids, eos, *ids], [False] * len(ids) + [True] * (len(ids) + 1), tokenizer)
    decoded = tokenizer.decode([*ids, eos, *ids], clean_up_tokenization_spaces=False)
    assert "".join(piece.text for piece in made) == decoded
    assert text in decoded
    assert [piece.text for piece in made if piece.special] == [tokenizer.eos_token]
