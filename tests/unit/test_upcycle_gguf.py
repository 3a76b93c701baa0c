"""A GGUF file gives the model it was made from: weights, config, tokenizer; what it cannot give is refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from finetune.errors import WeightsError
from finetune.upcycle import Options, upcycle
from tests.support import CHATML, tiny_tokenizer

WIDE = Options(num_experts=4, top_k=2, dtype="F32")
TEXT = "Turn on the kitchen light,  set 12 timers\n\nfor 1999 minutes: naïve 日本 "
Change = Callable[[gguf.GGUFWriter], None]


def tiny_llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 30000.0},
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def gguf_tensors(model: Any) -> dict[str, torch.Tensor]:
    state = {key: value.detach() for key, value in model.state_dict().items()}
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    tensors = {f"{table.get_name(key.removesuffix('.weight'))}.weight": value for key, value in state.items()}
    if model.config.tie_word_embeddings:
        del tensors["output.weight"]
    for layer in range(model.config.num_hidden_layers):
        for name, heads in (("attn_q", model.config.num_attention_heads), ("attn_k", model.config.num_key_value_heads)):
            tensors[f"blk.{layer}.{name}.weight"] = permuted(tensors[f"blk.{layer}.{name}.weight"], heads)
    return tensors


def write_settings(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)


def write_tokenizer(writer: gguf.GGUFWriter, pre: str, add_bos: bool) -> None:
    tokenizer = tiny_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=lambda token: ids[token])
    special = {entry["content"] for entry in described["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if token in special else TokenType.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in described["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(3)
    writer.add_add_bos_token(add_bos)
    writer.add_chat_template(CHATML)


def write_gguf(
    file: Path,
    model: Any,
    quantisation: GGMLQuantizationType = GGMLQuantizationType.F32,
    pre: str = "gpt-2",
    add_bos: bool = False,
    architecture: str = "llama",
    change: Change | None = None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """`model` as llama.cpp's converter writes it; vectors stay fp32 as there."""
    writer = gguf.GGUFWriter(file, architecture, endianess=endianess)
    write_settings(writer, model.config)
    write_tokenizer(writer, pre, add_bos)
    for name, tensor in gguf_tensors(model).items():
        kind = quantisation if tensor.dim() == 2 else GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor.contiguous().numpy(), kind), raw_dtype=kind)
    if change is not None:
        change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(0, 512, (2, 48), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        result: torch.Tensor = model(ids).logits
    return result


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_equal_those_of_the_model_the_file_came_from(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(tied)
    upcycle(write_gguf(tmp_path / "tiny.gguf", model), tmp_path / "moe", WIDE)
    wanted = logits(model)
    assert wanted.std() > 0.1
    assert (wanted - logits(loaded(tmp_path / "moe"))).abs().max() < 1e-4


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.BF16])
def test_quantised_tensors_are_read_as_gguf_dequantises_them(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    model = tiny_llama()
    upcycle(write_gguf(tmp_path / "tiny.gguf", model, kind), tmp_path / "moe", WIDE)
    for weight in model.parameters():
        if weight.dim() == 2:
            rounded = gguf.quants.dequantize(gguf.quants.quantize(weight.detach().numpy(), kind), kind)
            weight.data = torch.from_numpy(np.array(rounded, dtype=np.float32))
    assert (logits(model) - logits(loaded(tmp_path / "moe"))).abs().max() < 1e-4


def test_a_tensor_larger_than_the_reading_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune.upcycle.gguf_source.ROWS_ELEMENTS", 64 * 7)  # seven rows at a time
    model = tiny_llama()
    upcycle(write_gguf(tmp_path / "tiny.gguf", model), tmp_path / "moe", WIDE)
    assert (logits(model) - logits(loaded(tmp_path / "moe"))).abs().max() < 1e-4


def test_config_is_that_of_the_metadata(tmp_path: Path) -> None:
    upcycle(write_gguf(tmp_path / "tiny.gguf", tiny_llama()), tmp_path / "moe", Options(num_experts=4, top_k=2))
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert config["rms_norm_eps"] == 1e-6  # and not the nearest fp32 number, 9.999999974752427e-07
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 30000.0
    assert (config["max_position_embeddings"], config["head_dim"], config["vocab_size"]) == (512, 16, 512)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (1, 2, 3)


def test_tokenizer_template_and_stop_tokens_survive(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), change=lambda writer: writer.add_eot_token_id(0))
    upcycle(file, tmp_path / "moe", WIDE)
    tokenizer, original = AutoTokenizer.from_pretrained(tmp_path / "moe"), tiny_tokenizer()
    assert tokenizer.chat_template == CHATML
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|im_start|>", "<|im_end|>", "<|pad|>")
    chat = original.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False)
    assert tokenizer(chat).input_ids == original(chat).input_ids
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert json.loads((tmp_path / "moe" / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    assert (
        json.loads((tmp_path / "moe" / "tokenizer_config.json").read_text())
        .keys()
        .isdisjoint({"is_local", "local_files_only", "name_or_path"})
    )


def test_bos_comes_first_when_the_file_says_so(tmp_path: Path) -> None:
    upcycle(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), add_bos=True), tmp_path / "moe", WIDE)
    assert AutoTokenizer.from_pretrained(tmp_path / "moe")("light").input_ids[0] == 1


def test_smollm_text_is_cut_before_each_digit(tmp_path: Path) -> None:
    """Two spaces before a number are one piece there; GPT-2's cut leaves the second with the digits."""
    upcycle(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), pre="smollm"), tmp_path / "moe", WIDE)
    cut = AutoTokenizer.from_pretrained(tmp_path / "moe").backend_tokenizer.pre_tokenizer
    assert [piece for piece, _ in cut.pre_tokenize_str("at  12 am")] == ["at", "ĠĠ", "1", "2", "Ġam"]


def test_a_sentencepiece_vocabulary_merges_as_sentencepiece_does(tmp_path: Path) -> None:
    """A space is put before the text even where one stands already, runs of spaces merge, BOS is first by default."""
    pieces = {"\u2581": -6.0, "a": -5.0, "b": -4.0, "\u2581\u2581": -1.0, "\u2581a": -2.0, "ab": -3.0}
    raw = [f"<0x{byte:02X}>" for byte in range(256)]

    def spell(writer: gguf.GGUFWriter) -> None:
        for key in [key for key in writer.kv_data[0] if key.startswith("tokenizer.ggml.")]:
            del writer.kv_data[0][key]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(["<unk>", "<s>", "</s>", *raw, *pieces])
        writer.add_token_scores([0.0] * 259 + list(pieces.values()))
        kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL]
        writer.add_token_types([*kinds, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * len(pieces)])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)

    upcycle(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), change=spell), tmp_path / "moe", WIDE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer.tokenize("ab") == ["\u2581a", "b"]
    assert tokenizer.tokenize(" ab") == ["\u2581\u2581", "ab"]
    assert tokenizer("b\n").input_ids == [1, 259, 261, 3 + ord("\n")]
    for text in ("ab ba", "  a", "b \u00e9\n"):
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_linear_rope_scaling_is_read(tmp_path: Path) -> None:
    def scale(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)

    upcycle(write_gguf(tmp_path / "tiny.gguf", tiny_llama(), change=scale), tmp_path / "moe", WIDE)
    rope = json.loads((tmp_path / "moe" / "config.json").read_text())["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 30000.0, "factor": 4.0}


def without(key: str) -> Change:
    """Leave one key out."""
    return lambda writer: writer.kv_data[0].pop(key) and None


def repeat_a_token(number: int) -> Change:
    """Give token `number` the spelling of the one before it."""

    def change(writer: gguf.GGUFWriter) -> None:
        tokens = writer.kv_data[0]["tokenizer.ggml.tokens"].value
        tokens[number] = tokens[number - 1]

    return change


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "qwen2"}, "architecture cannot be upcycled; got qwen2"),
    "experts": ({"change": lambda w: w.add_expert_count(8)}, "already is a mixture of experts; got 8 experts"),
    "unknown setting": (
        {"change": lambda w: w.add_logit_scale(2.0)},
        "settings that are not understood; got logit_scale",
    ),
    "rope scaling": (
        {"change": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN)},
        "rope.scaling.type: cannot be read from GGUF; got yarn; use the Hugging Face folder",
    ),
    "rope table": (
        {"change": lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32))},
        "has tensors that Mixtral cannot hold; got rope_freqs.weight",
    ),
    "bias": (
        {"change": lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32))},
        "has tensors that Mixtral cannot hold; got model.layers.0.self_attn.q_proj.bias",
    ),
    "head size": (
        {"change": lambda w: w.add_value_length(32)},
        "llama.attention.value_length: differs from the head size",
    ),
    "heads by layer": (
        {"change": lambda w: w.kv_data[0].pop("llama.attention.head_count") and w.add_head_count([4, 2])},
        "has settings that differ by layer; got attention.head_count",
    ),
    "missing setting": (
        {"change": without("llama.feed_forward_length")},
        "lacks or garbles a setting; got 'feed_forward_length'",
    ),
    "format": (
        {"change": lambda w: w.add_tensor("output_norm.bias", np.ones(64, np.int8))},
        "model.norm.bias: is in a format that gguf cannot read; got I8",
    ),
    "byte order": ({"endianess": gguf.GGUFEndian.BIG}, "has the other byte order"),
    "tokenizer": (
        {"change": lambda w: w.kv_data[0].pop("tokenizer.ggml.model") and w.add_tokenizer_model("bert")},
        "tokenizer.ggml.model: tokenizer is not supported; got bert",
    ),
    "repeated token": (
        {"change": repeat_a_token(4)},
        "vocabulary: did not survive the conversion of the tokenizer",
    ),
    "merge without its token": (
        {"change": repeat_a_token(-1)},
        "tokenizer cannot be built; got Error while initializing",
    ),
    "parts": ({"change": lambda w: w.add_uint16("split.count", 3)}, "is one part of several; got 3 parts"),
    "pre-tokenizer": ({"pre": "unheard-of"}, "tokenizer.ggml.pre: pre-tokenizer is not supported; got unheard-of"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_faithfully_is_refused(tmp_path: Path, name: str) -> None:
    arguments, said = REFUSED[name]
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama(), **arguments)
    with pytest.raises(WeightsError) as caught:
        upcycle(file, tmp_path / "out", WIDE)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    for share in (0.001, 0.05, 0.9):
        cut = tmp_path / f"{share}.gguf"
        cut.write_bytes(file.read_bytes()[: max(8, int(file.stat().st_size * share))])
        with pytest.raises(WeightsError, match="is not a readable GGUF file"):
            upcycle(cut, tmp_path / "out", WIDE)


def test_without_the_gguf_package_the_message_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_llama())
    monkeypatch.setitem(sys.modules, "gguf", None)  # makes `import gguf` fail as if it were not installed
    with pytest.raises(WeightsError, match=r"needs the gguf package; pip install moe-finetune\[gguf\]"):
        upcycle(file, tmp_path / "out", WIDE)
