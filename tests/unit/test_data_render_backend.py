"""A tokenizer taken apart and put together again is the same tokenizer."""

import json
from typing import Any

import pytest

from finetune.data.render.encoder import bare_copy, state_of
from tests.real_tokenizers import mistral_tokenizer
from tests.support import tiny_tokenizer

TEXT = "Hello <s>[INST] x[/INST]\r\n\u00e9 \U0001f600 1234</s>  y<|im_end|>\x00 \u202e"


@pytest.fixture(params=["v1", "v3", "tekken", "tiny"])
def backend(request: pytest.FixtureRequest) -> Any:
    name = request.param
    return (tiny_tokenizer() if name == "tiny" else mistral_tokenizer(name)).backend_tokenizer


def test_a_copy_reads_text_the_same_and_has_settings_of_its_own(backend: Any) -> None:
    copy = bare_copy(backend)
    expected = backend.encode(TEXT, add_special_tokens=False)
    backend.enable_truncation(2)
    backend.enable_padding(length=50)
    encoding = copy.encode(TEXT)  # with the special tokens of a post-processor, if it had one
    assert (encoding.ids, encoding.offsets) == (expected.ids, expected.offsets)
    assert copy.decode(encoding.ids, skip_special_tokens=False) == backend.decode(
        expected.ids, skip_special_tokens=False
    )
    assert copy.get_added_tokens_decoder() == backend.get_added_tokens_decoder()
    backend.no_truncation()
    backend.no_padding()


def test_the_state_is_what_the_json_says(backend: Any) -> None:
    written, state = json.loads(backend.to_str()), state_of(backend)
    assert state["model"].items() <= written["model"].items()
    assert {key: written[key] for key in ("normalizer", "pre_tokenizer", "added_tokens")} == {
        key: state[key] for key in ("normalizer", "pre_tokenizer", "added_tokens")
    }
