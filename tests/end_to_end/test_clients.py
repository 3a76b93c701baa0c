"""Programs that are not transformers load what `finetune merge` and `finetune export` write, and say the same.

mlx-lm reads the merged folder, llama.cpp (as xllamacpp) the GGUF file. Both have their own code of a Mixtral.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.export import export
from finetune.merge import merge
from finetune.merge.copied_files import merged_config
from tests.support import save_tiny_mixtral, save_tiny_sentencepiece
from tests.unit.merge_adapters import save_adapter

THETA = 7777.0
"""Of the rotary embedding: no client's default, so that one that does not read it is wrong."""
TOKENS = 16
"""llama.cpp is off by about 0.001: further on, a near tie falls otherwise."""
WIDE: dict[str, Any] = {
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
    "vocab_size": 128,  # of the tokenizer
}


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral that an adapter of everything was merged into, in fp32."""
    folder = tmp_path_factory.mktemp("model")
    base = save_tiny_mixtral(folder / "base", **WIDE)
    save_tiny_sentencepiece(base)
    merge(save_adapter(base, folder / "adapter"), folder / "merged", show_progress=False)
    return folder / "merged"


@pytest.fixture(scope="module")
def prompt(merged: Path) -> list[int]:
    """Long enough for positions to matter."""
    ids: list[int] = AutoTokenizer.from_pretrained(merged)("turn on the kitchen light and set the timer " * 3).input_ids
    return ids


@pytest.fixture(scope="module")
def expected(merged: Path, prompt: list[int]) -> tuple[torch.Tensor, list[int]]:
    """transformers' logits [T, V] of the prompt, and its greedy answer."""
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    ids = torch.tensor([prompt])
    with torch.no_grad():
        answer = model.generate(ids, min_new_tokens=TOKENS, max_new_tokens=TOKENS, do_sample=False)
        return model(ids).logits[0], answer[0][len(prompt) :].tolist()


def mlx_logits(folder: Path, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of mlx-lm, in a process of its own."""
    return torch.tensor(_mlx(folder, ids, 0)["logits"])


def _mlx(folder: Path, ids: list[int], tokens: int) -> Any:
    script = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
folder, ids, tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model, _ = load_model(Path(folder))
model.set_dtype(mx.float32)
logits, answer = model(mx.array([ids]))[0].tolist(), []
for _ in range(tokens):
    answer.append(int(mx.argmax(model(mx.array([ids + answer]))[0, -1])))
print(json.dumps({"logits": logits, "answer": answer}))
"""
    return _run(script, str(folder), json.dumps(ids), str(tokens))


def _llama(file: Path, prompt: list[int], tokens: int) -> Any:
    script = """
import json, sys
import xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.warmup = sys.argv[1], 512, False
# In 16 bits, its default, near ties fall otherwise.
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
server = xllamacpp.Server(parameters)
asked = {"prompt": json.loads(sys.argv[2]), "max_tokens": int(sys.argv[3]), "temperature": 0.0}
asked |= {"ignore_eos": True, "logprobs": 5}
print(json.dumps(server.handle_completions(asked)))
"""
    return _run(script, str(file), json.dumps(prompt), str(tokens))


def _run(script: str, *words: str) -> Any:
    """The JSON in the last line that the script prints; no client may reach the network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", script, *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))


def test_mlx_computes_the_logits_and_the_answer_of_the_merged_model(
    merged: Path, prompt: list[int], expected: tuple[torch.Tensor, list[int]]
) -> None:
    logits, answer = expected
    found = _mlx(merged, prompt, TOKENS)
    assert (torch.tensor(found["logits"]) - logits).abs().max() < 1e-3 * logits.abs().max()
    assert found["answer"] == answer


def test_a_rotary_base_that_is_no_clients_default_is_read(
    merged: Path, prompt: list[int], expected: tuple[torch.Tensor, list[int]], tmp_path: Path
) -> None:
    config = json.loads((merged / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == THETA
    # As transformers writes it, the client takes another base, and says nothing.
    without = tmp_path / "without"
    without.mkdir()
    for file in merged.iterdir():
        (without / file.name).symlink_to(file)
    (without / "config.json").unlink()
    (without / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "rope_theta"}))
    assert (mlx_logits(without, prompt) - expected[0]).abs().max() > 0.1
    assert merged_config({k: v for k, v in config.items() if k != "rope_theta"}, None)["rope_theta"] == THETA


def test_llama_cpp_gives_the_answer_of_the_merged_model_from_gguf(
    merged: Path, prompt: list[int], expected: tuple[torch.Tensor, list[int]], tmp_path: Path
) -> None:
    export(merged, tmp_path / "model.gguf", "gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]
    logits, answer = expected
    steps = _llama(tmp_path / "model.gguf", prompt, TOKENS)["choices"][0]["logprobs"]["content"]
    assert [step["id"] for step in steps] == answer
    wanted = logits[-1].log_softmax(-1)
    for each in steps[0]["top_logprobs"]:
        assert each["logprob"] == pytest.approx(float(wanted[each["id"]]), abs=0.01)
