"""Training steps of DPO and SFT on the same documents: the real trainers, fed with the same tokens in the same places.

The model is a small Mixtral whose time goes where a large one's goes: 60 % of a step into the experts, 6 % into the
head. A step of its 700 places takes half a second, long beside what a trainer does around it.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PrinterCallback

from finetune.adapters.initial import read_initial_adapter
from finetune.base import read_base
from finetune.methods import dpo, sft
from finetune.methods.common import TrainerSetup
from finetune.model import adapt, load_base, save_adapter, snapshot_adapter
from finetune.moe.audit import storage_of
from finetune.recipe import Recipe
from finetune.run import Dashboards, RunFolder
from tests.support import save_tiny_mixtral

WORDS = ("turn", "the", "light", "on", "in", "kitchen", "and", "set", "a", "timer", "for", "ten", "minutes", "please")
NEVER = 10**6  # a line is logged after so many steps


@dataclass(frozen=True)
class PairShape:
    """The model, and a micro-batch of `pairs` pairs; lengths in words, of about three tokens each."""

    hidden: int = 256
    intermediate: int = 512
    experts: int = 8
    layers: int = 4
    vocabulary: int = 4096
    rank: int = 8
    pairs: int = 4
    prompt: tuple[int, int] = (8, 24)
    answer: tuple[int, int] = (4, 14)

    @property
    def label(self) -> str:
        """`H256 E8 L4 V4096 B4`."""
        return f"H{self.hidden} E{self.experts} L{self.layers} V{self.vocabulary} B{self.pairs}"


SMALL = PairShape(hidden=128, intermediate=256, layers=2, vocabulary=1024, pairs=2)


@dataclass(frozen=True)
class Workplace:
    """A checkpoint and its rows, as pairs and as the conversations of both answers, in `folder`."""

    folder: Path
    shape: PairShape
    base: Path
    pairs: Path
    rows: Path
    initial_adapter: Path  # an adapter that changes the model, as an SFT run leaves it

    @classmethod
    def make(cls, folder: Path, shape: PairShape) -> "Workplace":
        """Random weights; as many pairs as one micro-batch has."""
        base = save_tiny_mixtral(
            folder / "base",
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_local_experts=shape.experts,
            num_hidden_layers=shape.layers,
            vocab_size=shape.vocabulary,
            initializer_range=0.05,
        )
        pairs = _draw_pairs(shape)
        _write(folder / "pairs.jsonl", pairs)
        answers = [{"prompt": pair["prompt"], "completion": pair[name]} for name in _ANSWERS for pair in pairs]
        _write(folder / "rows.jsonl", answers)
        made = cls(folder, shape, base, folder / "pairs.jsonl", folder / "rows.jsonl", folder / "initial")
        made._save_initial_adapter()
        return made

    def recipe(self, method: Mapping[str, Any], packing: bool = False, from_adapter: bool = False) -> Recipe:
        """LoRA on attention, experts and routers, the balance term on, four bits, float32."""
        dpo = method["kind"] == "dpo"
        source = {"path": str(self.pairs if dpo else self.rows), "format": "preference" if dpo else "prompt_completion"}
        size = self.shape.pairs if dpo else 2 * self.shape.pairs
        base = {"name_or_path": str(self.base), "load_in_4bit": True, "dtype": "float32"}
        return Recipe.model_validate(
            {
                "output_dir": str(self.folder / f"run-{packing}-{from_adapter}"),
                "model": base | {"adapter": str(self.initial_adapter) if from_adapter else None},
                "lora": {
                    "targets": ["attention", "experts", "router"],
                    "r": self.shape.rank,
                    "lora_alpha": 2.0 * self.shape.rank,
                },
                "router": {"router_aux_loss_coef": 0.02},
                "method": dict(method),
                "data": {"train": source, "max_length": 512, "packing": packing},
                "training": {
                    "max_steps": NEVER,
                    "learning_rate": 1e-5,
                    "lr_scheduler_type": "constant",
                    "global_batch_size": size,
                    "per_device_train_batch_size": size,
                    "gradient_checkpointing": "none",
                    "logging_steps": NEVER,
                },
                "logging": {"report_to": "none"},
            }
        )

    def _save_initial_adapter(self) -> None:
        recipe = self.recipe(SFT)
        base = read_base(recipe)
        model = adapt(load_base(base, recipe.model), base, recipe)
        generator = torch.Generator().manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
        save_adapter(snapshot_adapter(model, base.family), self.initial_adapter, recipe, base)
        base.tokenizer.save_pretrained(self.initial_adapter)


_ANSWERS = ("chosen", "rejected")
SFT: dict[str, Any] = {"kind": "sft"}
PRECOMPUTED: dict[str, Any] = {"kind": "dpo", "beta": 0.1, "prompt_sharing": "off"}
LIVE = PRECOMPUTED | {"reference": "live"}


def _draw_pairs(shape: PairShape) -> list[dict[str, str]]:
    random = Random(0)

    def draw(least: int, most: int) -> str:
        return " ".join(random.choices(WORDS, k=random.randint(least, most)))

    return [
        {"prompt": draw(*shape.prompt), "chosen": draw(*shape.answer), "rejected": draw(*shape.answer) + " no"}
        for _ in range(shape.pairs)
    ]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@dataclass
class TrainingArm:
    """A trainer and its step: collate, forward, loss, backward, clip, optimizer, the figures of the step."""

    trainer: Any
    logs: bool = False
    features: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        trainer = self.trainer
        trainer.remove_callback(PrinterCallback)
        trainer.create_optimizer_and_scheduler(NEVER)
        trainer.current_gradient_accumulation_steps = 1
        trainer.args.logging_steps = 1 if self.logs else NEVER
        trainer.model.train()
        self.features = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]

    def batch(self) -> dict[str, Any]:
        """All rows as one micro-batch."""
        batch: dict[str, Any] = self.trainer.data_collator(self.features)
        return batch

    def step(self) -> torch.Tensor:
        """One optimizer step as the trainer's loop takes it; the loss."""
        trainer = self.trainer
        (inputs,), items = trainer.get_batch_samples(iter([self.batch()]), 1, trainer.args.device)
        loss: torch.Tensor = trainer.training_step(trainer.model, inputs, items)
        trainer._clip_grad_norm(trainer.model)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        trainer.end_step()
        if self.logs:
            trainer.log({"loss": loss.item()})
        return loss

    def resident_bytes(self) -> int:
        """Memory held between steps: weights, factors, the optimizer's state, the reference's factors."""
        held = sum(storage_of(parameter)[2] for parameter in self.trainer.model.parameters())
        reference = getattr(self.trainer, "reference", None)
        states = [each for state in self.trainer.optimizer.state.values() for each in state.values()]
        states += [start for _, start in reference._start] if reference is not None else []
        return held + sum(each.numel() * each.element_size() for each in states if isinstance(each, torch.Tensor))


def training_arm(recipe: Recipe, logs: bool = False) -> TrainingArm:
    """The trainer as `finetune.train` builds it."""
    torch.manual_seed(recipe.seed)
    base = read_base(recipe)
    method: Any = dpo if recipe.method.kind == "dpo" else sft
    rows = method.prepare_rows(recipe, base)
    initial = None if recipe.model.adapter is None else read_initial_adapter(Path(recipe.model.adapter))
    model = adapt(load_base(base, recipe.model), base, recipe, initial_adapter=initial)
    dashboards = Dashboards((), {"report_to": [], "disable_tqdm": True}, ())
    run = RunFolder(Path(recipe.output_dir))
    return TrainingArm(method.make_trainer(TrainerSetup(recipe, run, base, model, rows, initial, dashboards)), logs)
