"""Held-out exact match by greedy generation, and router load on the same rows.

finetune evaluate out/merged --data data/quickstart/eval.jsonl --output runs/quickstart/evaluation.json
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from finetune.adapters.lineage import trained_on_day
from finetune.checkpoint import verify_sums
from finetune.data import Conversation, load_tokenizer, read_conversations, set_template_day
from finetune.data.render import ChatTemplate, System
from finetune.data.row_errors import Problems, RowError
from finetune.errors import DataError, Problem, WeightsError
from finetune.files import write_json
from finetune.moe.balance import load_share, token_sums
from finetune.moe.families import Family, MoeLayout, family_of
from finetune.moe.router import capture, find_routers

SPARE_TOKENS = 8  # generated beyond the longest reference answer, to notice answers that do not stop


@dataclass(frozen=True)
class Row:
    """One held-out row: its line, the group it is reported in (key `split`, if any), prompt, reference and answer."""

    line: int
    split: str
    prompt: str
    reference: str
    answer: str

    @property
    def exact(self) -> bool:
        """Whether the answer equals the reference, ignoring surrounding white space."""
        return self.answer.strip() == self.reference.strip()


@dataclass(frozen=True)
class Evaluation:
    """The result. `exact_match` in percent by group (`all` is every row); `load`: each
    expert's share of its layer's top-k choices on the prompt tokens (rows sum to 1); None for a dense model."""

    model: str
    data: str
    rows: int
    exact_match: dict[str, float]
    load: list[list[float]] | None
    answers: list[Row]

    def write(self, path: Path) -> None:
        """Write as JSON, in one step."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(self))


def evaluate(
    model_path: Path,
    data: Path,
    row_format: str,
    dtype: str = "float32",
    batch_size: int = 16,
    system: System = "error",
) -> Evaluation:
    """Generate greedily for every row's prompt and compare with its last assistant message.

    `system` is the recipe's `data.system`: prompts are rendered as they were in training.
    """
    if not (model_path / "config.json").is_file():
        raise WeightsError(Problem(str(model_path), "no checkpoint here", "give a folder with config.json"))
    config = json.loads((model_path / "config.json").read_text(encoding="utf-8"))
    family = family_of(str(config.get("model_type")), str(model_path / "config.json"))
    rows = read_conversations(str(data), row_format)
    calls = [
        Problem(f"{data}:{line}", "the last message calls a tool, and exact match compares texts", "leave the row out")
        for line, _, conversation in rows
        if "tool_calls" in conversation.messages[-1]
    ]
    if calls:
        raise DataError(calls)
    verify_sums(model_path)
    tokenizer = load_tokenizer(str(model_path), None, None)
    set_template_day(tokenizer, trained_on_day(model_path))
    tokenizer.padding_side = "left"
    model = _load_model(model_path, family, dtype)
    references = [conversation.messages[-1]["content"] for _, _, conversation in rows]
    longest = max(len(ids) for ids in tokenizer(references, add_special_tokens=False)["input_ids"]) + SPARE_TOKENS
    prompts = _prompts(tokenizer, rows, str(data), system)
    answers = list(_generate(model, tokenizer, prompts, longest, batch_size))
    results = [
        Row(line, str(row.get("split", "rows")), prompt, reference, answer)
        for (line, row, _), prompt, reference, answer in zip(rows, prompts, references, answers, strict=True)
    ]
    load = None if family.moe is None else _load(model, family.moe, tokenizer, prompts, batch_size)
    return Evaluation(str(model_path), str(data), len(results), exact_match(results), load, results)


def _load_model(folder: Path, family: Family, dtype: str) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (
        family.transformers_class()
        .from_pretrained(folder, dtype=getattr(torch, dtype), use_safetensors=True, device_map={"": device})
        .eval()
    )


def _prompts(
    tokenizer: Any, rows: list[tuple[int, dict[str, Any], Conversation]], path: str, system: System
) -> list[str]:
    """The model's inputs: all turns before the last answer, with the generation prompt."""
    template = ChatTemplate(tokenizer, "the model's chat template", system)
    prompts, problems = [], Problems()
    for line, _, conversation in rows:
        try:
            prompts.append(template.prompt(conversation))
        except RowError as error:
            problems.add(path, line, error)
    problems.raise_if_any()
    return prompts


def exact_match(rows: list[Row]) -> dict[str, float]:
    """Percent of exact answers, in all and by group."""
    groups = defaultdict(list)
    for row in rows:
        groups["all"].append(row.exact)
        if row.split != "all":
            groups[row.split].append(row.exact)
    return {group: 100 * sum(exact) / len(exact) for group, exact in groups.items()}


def _batches(tokenizer: Any, prompts: list[str], batch_size: int, device: torch.device, what: str) -> Iterator[Any]:
    for start in tqdm(range(0, len(prompts), batch_size), desc=what):
        batch = prompts[start : start + batch_size]
        yield tokenizer(batch, add_special_tokens=False, padding=True, return_tensors="pt").to(device)


@torch.no_grad()
def _generate(model: Any, tokenizer: Any, prompts: list[str], max_new_tokens: int, batch_size: int) -> Iterator[str]:
    for batch in _batches(tokenizer, prompts, batch_size, model.device, "Generating"):
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            # Not the checkpoint's own settings: a repetition penalty, for example, would change the metric.
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            ),
        )
        yield from tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def _load(model: Any, moe: MoeLayout, tokenizer: Any, prompts: list[str], batch_size: int) -> list[list[float]]:
    routers = find_routers(model, moe.router_module)
    total: Any = 0
    for batch in _batches(tokenizer, prompts, batch_size, model.device, "Router load"):
        with capture(routers) as record:
            model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        total = total + token_sums(record, batch["attention_mask"].reshape(-1)).count_LE
    shares: list[list[float]] = load_share(total).tolist()
    return shares


def load_table(load: list[list[float]]) -> str:
    """Load by layer and expert in percent, one layer a line; balanced is 100 / experts."""
    lines = ["layer " + "".join(f"{f'expert {e}':>10}" for e in range(len(load[0])))]
    lines += [f"{index:>5} " + "".join(f"{100 * share:>9.1f}%" for share in row) for index, row in enumerate(load)]
    return "\n".join(lines)
