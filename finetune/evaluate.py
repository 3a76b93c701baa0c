"""Held-out exact match by greedy generation, and router load on the same rows.

finetune evaluate out/merged --data data/quickstart/eval.jsonl --output runs/quickstart/evaluation.json
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from finetune.adapters.adapter import CONFIG_FILE, read_adapter
from finetune.adapters.lineage import TrainedTemplate, Weighted, check_related, trained_template
from finetune.adapters.locate import adapter_folder
from finetune.adapters.record import RECORD_FILE
from finetune.checkpoint import CheckpointReader, fingerprint, forward_settings, verify_sums
from finetune.data import Conversation, load_tokenizer, read_conversations, set_template_day
from finetune.data.render import ChatTemplate, StoppedError, System
from finetune.data.row_errors import Problems, RowError
from finetune.data.tokenizer import end_ids
from finetune.errors import DataError, Problem, WeightsError
from finetune.files import write_json
from finetune.merge.job import base_folder
from finetune.model_files import load_config, read_config, reading
from finetune.moe.balance import load_share, token_sums
from finetune.moe.families import Family, MoeLayout, family_of
from finetune.moe.nf4_loading import QUANT_METHOD
from finetune.moe.preflight import check_loadable
from finetune.moe.router import capture, find_routers
from finetune.recipe import ModelSettings

SPARE_TOKENS = 8  # generated beyond the longest reference answer, to notice answers that do not stop
NumberedRow = tuple[int, dict[str, Any], Conversation]


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
    """The result. `template_args`: the variables with which prompts were rendered; `exact_match` in percent by group
    (`all` is every row); `load`: each expert's share of its layer's top-k choices on the prompt tokens (rows sum to 1);
    None for a dense model."""

    model: str
    data: str
    rows: int
    template_args: Mapping[str, Any]
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
    dtype: str | None = None,
    batch_size: int = 16,
    system: System = "error",
    template_args: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Generate greedily for every row's prompt and compare with its last assistant message.

    `model_path`: a full checkpoint, computed in `dtype` (float32 by default); or an adapter folder, a run,
    `RUN/checkpoint-N` or `RUN@best`: the base as in training, quantised or not, with the adapter, in the `dtype` of
    the training by default.
    `system` and `template_args` are `data.system` and `data.template_args` of the recipe: prompts are rendered as they
    were in training. The variables are those that a merged model records; of another model they must be given.
    """
    folder = adapter_folder(model_path)
    is_adapter = (folder / CONFIG_FILE).is_file()
    family, load = (_adapter if is_adapter else _checkpoint)(folder, dtype)
    rows = read_conversations(str(data), row_format)
    _check_no_calls(rows, str(data))
    verify_sums(folder)
    trained = trained_template(folder) or TrainedTemplate(None, {})
    args = _template_args(trained.args, template_args)
    tokenizer = load_tokenizer(str(folder), None, None, template_args=args)
    set_template_day(tokenizer, trained.day)
    tokenizer.padding_side = "left"
    model = load()
    template = ChatTemplate(tokenizer, "the model's chat template", system)
    tasks = _tasks(template, rows, str(data))
    written = tokenizer([task.written for task in tasks], add_special_tokens=False)["input_ids"]
    longest, prompts = max(map(len, written)) + SPARE_TOKENS, [task.prompt for task in tasks]
    answers = list(_generate(model, tokenizer, prompts, longest, batch_size))
    results = [
        Row(line, str(row.get("split", "rows")), task.prompt, task.reference, template.answer_in(answer))
        for (line, row, _), task, answer in zip(rows, tasks, answers, strict=True)
    ]
    shares = None if family.moe is None else _load(model, family.moe, tokenizer, prompts, batch_size)
    return Evaluation(str(model_path), str(data), len(results), args, exact_match(results), shares, results)


def _check_no_calls(rows: list[NumberedRow], path: str) -> None:
    """Raise DataError for rows whose reference has no text."""
    calls = [
        Problem(f"{path}:{line}", "the last message calls a tool, and exact match compares texts", "leave the row out")
        for line, _, conversation in rows
        if "tool_calls" in conversation.messages[-1]
    ]
    if calls:
        raise DataError(calls)


def _template_args(trained: Mapping[str, Any], given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The template's variables; WeightsError for others than the model was trained with."""
    if trained and given and dict(trained) != dict(given):
        what = f"the model was trained with {json.dumps(trained)}"
        raise WeightsError(Problem("--template-args", what, "leave it out", got=json.dumps(given)))
    return given or trained


Opened = tuple[Family, Callable[[], Any]]
"""The architecture of what is evaluated, and what loads it."""


def _checkpoint(folder: Path, dtype: str | None) -> Opened:
    """A full model; WeightsError where there is none."""
    if not (folder / "config.json").is_file():
        do = "give a folder with config.json, an adapter, or a run"
        raise WeightsError(Problem(str(folder), "no checkpoint here", do))
    config = read_config(folder)
    family = family_of(str(config.get("model_type")), str(folder / "config.json"))
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict) and quantized.get("quant_method") == QUANT_METHOD:
        what, do = "the checkpoint is already quantised", "give the 16-bit checkpoint it was made from"
        raise WeightsError(Problem(str(folder / "config.json"), what, do, got=QUANT_METHOD))
    return family, partial(_load_model, folder, family, dtype or "float32")


def _adapter(folder: Path, dtype: str | None) -> Opened:
    """The base that an adapter records, with the adapter; WeightsError where it does not say how it was trained."""
    from finetune.adapters.initial import read_initial_adapter
    from finetune.base import Base
    from finetune.model import load_trained

    adapter = read_adapter(folder)
    if adapter.record.recipe is None or adapter.record.base is None:
        what = f"the adapter does not say what it was trained on: it has no {RECORD_FILE} of this program"
        raise WeightsError(Problem(str(folder), what, "merge it first: finetune merge"))
    initial = read_initial_adapter(folder)
    with reading(folder / RECORD_FILE, "does not hold a recipe's section model"):
        settings = ModelSettings.model_validate(adapter.record.recipe["model"])
    settings = settings.model_copy(update={"dtype": dtype or settings.dtype})
    where = base_folder(adapter, None)
    weighted = Weighted(adapter, 1.0, adapter.digest())
    check_related(where, fingerprint(where), forward_settings(where), (weighted,))
    config = load_config(where)
    family = family_of(str(config.model_type), str(where / "config.json"))
    base = Base(where, family, config, None, tuple(sorted(adapter.added_tokens.values())), initial.base)
    return family, partial(load_trained, base, settings, initial)


def _load_model(folder: Path, family: Family, dtype: str) -> Any:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    check_loadable(CheckpointReader(folder), family.transformers_class(), load_in_4bit=False)
    with reading(folder, "transformers cannot load it", "give a complete checkpoint"):
        model = family.transformers_class().from_pretrained(
            folder,
            config=load_config(folder),
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            device_map={"": device},
            trust_remote_code=False,
            local_files_only=True,
        )
        return model.eval()


class _Task(NamedTuple):
    """A model's input, the answer that it should give, and that with its header words and its reasoning."""

    prompt: str
    reference: str
    written: str


def _tasks(template: ChatTemplate, rows: list[NumberedRow], path: str) -> list[_Task]:
    """Of each row: all turns before the last answer with the generation prompt, and that answer."""
    tasks, problems = [], Problems()
    for line, _, conversation in rows:
        try:
            tasks.append(_task(template, conversation))
        except StoppedError as error:
            problems.add(path, line, error.of_row)
            break
        except RowError as error:
            problems.add(path, line, error)
    problems.raise_if_any()
    return tasks


def _task(template: ChatTemplate, conversation: Conversation) -> _Task:
    given = template.conversation(conversation)
    prompt, answer = template.prompt(conversation), given.messages[-1]
    text = template.text(given.messages, given.tools)
    if text.startswith(prompt):
        written = text[len(prompt) :]
    else:  # The prompt opens a block of reasoning that a finished text does not have.
        written = answer.get("reasoning", "") + template.closing + answer["content"]
    return _Task(prompt, answer["content"], written)


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
    """What the model writes behind each prompt, special tokens included, up to the first that ends an answer."""
    ends = end_ids(tokenizer)
    model.generation_config = GenerationConfig()  # what the settings below leave open is taken from here
    for batch in _batches(tokenizer, prompts, batch_size, model.device, "Generating"):
        ids = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            # Not the checkpoint's own settings: a repetition penalty, for example, would change the metric.
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=ends,
            ),
        )
        for row in ids[:, batch["input_ids"].shape[1] :].tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            yield tokenizer.decode(row[:end])


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
