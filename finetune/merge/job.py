"""Collect and check everything about a merge before the first byte is written."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.adapters.adapter import Adapter, read_adapter
from finetune.adapters.deltas import plan, together
from finetune.adapters.lineage import Weighted, check_related
from finetune.adapters.record import RECORD_FILE
from finetune.adapters.whole_tensors import (
    ReplacedBase,
    check_tokenizer,
    fixed_tensors,
    token_rows,
    vocab_size,
    with_replaced,
)
from finetune.checkpoint import CheckpointReader, TensorSpec, fingerprint, forward_settings
from finetune.errors import Problem, WeightsError
from finetune.files import read_text
from finetune.merge import proof
from finetune.merge.base_weights import open_base
from finetune.merge.copied_files import merged_config, merged_generation, side_files
from finetune.merge.stream import Sources
from finetune.model_files import read_tokenizer
from finetune.moe.families import Family, family_of

DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Request:
    """What the user asked for; `base` replaces the recorded location only."""

    adapters: tuple[Path, ...]
    weights: tuple[float, ...]
    base: Path | None = None
    dtype: str | None = None  # one of DTYPES; None leaves every tensor in its own
    prompts: Path | None = None
    layouts: tuple[str, ...] = ()  # of the adapters' factors, by their place; empty where the files say
    into: str = "original"  # or "dequantized"


@dataclass(frozen=True)
class Job:
    """Everything known before the first byte is written."""

    adapters: tuple[Weighted, ...]
    opened: CheckpointReader  # the base as it is read, without anything of the adapters
    sources: Sources
    family: Family
    fingerprint: str  # of the base
    into: str  # "original" or "dequantized"
    config: dict[str, Any]  # of the merged model
    generation: dict[str, Any] | None  # `generation_config.json`; None where it is as it is copied
    specs: list[TensorSpec]
    files: list[Path]
    prompts: list[torch.Tensor]

    @property
    def base(self) -> CheckpointReader:
        """Where the base's tensors come from."""
        return self.sources.base

    @property
    def base_config(self) -> dict[str, Any]:
        """`config.json` of the base with the merged model's vocabulary."""
        return {**self.base.config, "vocab_size": self.config["vocab_size"]}

    def over(self, opened: CheckpointReader) -> CheckpointReader:
        """Another opening of the base, with the whole tensors that the adapters bring."""
        return self.base.over(opened) if isinstance(self.base, ReplacedBase) else opened

    def before(self, opened: CheckpointReader) -> CheckpointReader:
        """An opening of the base without anything of the adapters, in the shapes that these need."""
        return self.base.over(opened).before() if isinstance(self.base, ReplacedBase) else opened

    @property
    def whole_tensors(self) -> tuple[str, ...]:
        """Tensors that an adapter brings in place of the base's."""
        return tuple(sorted(self.base.whole)) if isinstance(self.base, ReplacedBase) else ()

    @property
    def untied(self) -> bool:
        """Whether embedding and head become two matrices, of one in the base."""
        return isinstance(self.base, ReplacedBase) and self.base.untied

    @property
    def nbytes(self) -> int:
        """Bytes of weights to be written."""
        return sum(spec.nbytes for spec in self.specs)

    @property
    def added_tokens(self) -> list[int]:
        """The tokens of which an adapter holds rows."""
        return sorted({token for rows in self.sources.token_rows.values() for token in rows.tokens})


def prepare(request: Request, check: Callable[[Path], object] = lambda _: None) -> Job:
    """Read every header and hold everything against everything else; WeightsError for what does not fit.

    `check` is given the base's folder before anything else is made of it.
    """
    adapters = _weighted(request)
    folder = base_folder(adapters[0].adapter, request.base)
    check(folder)
    plain = CheckpointReader(folder)
    family = family_of(str(plain.config.get("model_type")), str(folder / "config.json"))
    base_fingerprint = fingerprint(folder)
    check_related(folder, base_fingerprint, forward_settings(folder), adapters)
    opened = open_base(plain, family, adapters, request.into, base_fingerprint)
    reader = with_replaced(opened, adapters, family)
    changes = together(
        plan(reader, weighted.adapter, family, weighted.weight, n) for n, weighted in enumerate(adapters)
    )
    if request.layouts and not any(delta.experts > 1 for change in changes.values() for delta in change.deltas):
        what = "no adapter has LoRA on stacked experts, so there is no order to give"
        raise WeightsError(Problem("--layout", what, "leave it out", got=" ".join(request.layouts)))
    _check_replaced_once(adapters)
    replacing = next((weighted.adapter for weighted in adapters if weighted.adapter.rows), adapters[-1].adapter)
    rows = token_rows(reader, replacing, changes)
    biased = next((weighted.adapter for weighted in adapters if weighted.adapter.has_biases), adapters[-1].adapter)
    sources = Sources(reader, changes, fixed_tensors(reader, biased.folder, family), rows)
    files = side_files(folder, [weighted.adapter.folder for weighted in adapters])
    tokenizer = _tokenizer(files[0].parent, vocab_size(reader, rows), replacing)
    trained = files[0].parent != folder  # with a tokenizer that the adapter brings
    eos, pad = (tokenizer.eos_token_id, tokenizer.pad_token_id) if trained else (None, None)
    output_dtype = None if request.dtype is None else DTYPES[request.dtype]
    tokens = sorted({token for added in rows.values() for token in added.tokens})
    specs = sources.specs(output_dtype)
    return Job(
        adapters=adapters,
        opened=opened,
        sources=sources,
        family=family,
        fingerprint=base_fingerprint,
        into=request.into,
        config=merged_config(reader.config, output_dtype, vocab_size(reader, rows), eos, pad),
        generation=merged_generation(folder, files, tokenizer) if trained else None,
        specs=specs if output_dtype or not isinstance(reader, ReplacedBase) else reader.in_own_formats(specs),
        files=files,
        prompts=proof.prompt_ids(tokenizer, tokens, _prompt_texts(request.prompts)),
    )


def _weighted(request: Request) -> tuple[Weighted, ...]:
    if len(request.weights) != len(request.adapters):
        do = "give one weight for each adapter, in their order"
        got = f"{len(request.weights)} for {len(request.adapters)} adapters"
        raise WeightsError(Problem("--weights", "number of weights differs from that of the adapters", do, got))
    if wrong := [weight for weight in request.weights if not math.isfinite(weight) or weight == 0]:
        do = "give numbers other than 0, or leave the adapter out"
        raise WeightsError(Problem("--weights", "must be finite and not zero", do, f"{wrong[0]:g}"))
    if request.layouts and len(request.layouts) != len(request.adapters):
        do = "give one layout for each adapter, in their order"
        got = f"{len(request.layouts)} for {len(request.adapters)} adapters"
        raise WeightsError(Problem("--layout", "number of layouts differs from that of the adapters", do, got))
    layouts = request.layouts or (None,) * len(request.adapters)
    adapters = [read_adapter(Path(folder), layout) for folder, layout in zip(request.adapters, layouts, strict=True)]
    digests = [adapter.digest() for adapter in adapters]
    pairs = zip(adapters, digests, strict=True)
    twice = sorted(str(adapter.folder) for adapter, digest in pairs if digests.count(digest) > 1)
    if twice:
        do = "name it once, with the sum of the weights in --weights"
        raise WeightsError(Problem(twice[0], "the same adapter is given twice", do, ", ".join(twice)))
    return tuple(map(Weighted, adapters, request.weights, digests))


def _check_replaced_once(adapters: Sequence[Weighted]) -> None:
    """What replaces values of the base, instead of adding to them, can be neither added up nor weighted."""
    kinds: Mapping[str, Any] = {
        "rows of added tokens": lambda adapter: bool(adapter.rows),
        "moved correction biases of routers": lambda adapter: adapter.has_biases,
    }
    problems = []
    for name, holds in kinds.items():
        holding = [weighted for weighted in adapters if holds(weighted.adapter)]
        if len(holding) > 1:
            got = ", ".join(str(weighted.adapter.folder) for weighted in holding)
            problems.append(Problem("adapters", f"more than one has {name}", "merge one after the other", got))
        problems += [
            Problem(
                str(weighted.adapter.folder),
                f"has {name}, which cannot be weighted",
                "give it weight 1",
                f"{weighted.weight:g}",
            )
            for weighted in holding
            if weighted.weight != 1
        ]
    if problems:
        raise WeightsError(problems)


def _tokenizer(folder: Path, size: int, adapter: Adapter) -> Any:
    """The merged model's tokenizer; refused unless it fits the model and the adapter."""
    tokenizer = read_tokenizer(str(folder))
    check_tokenizer(tokenizer, str(folder), size, adapter)
    return tokenizer


def _prompt_texts(file: Path | None) -> list[str] | None:
    """The user's prompts, one a line; None for the fixed ones."""
    if file is None:
        return None
    try:
        texts = [line for line in read_text(file).splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(
            Problem(str(file), "cannot be read", "give a text file, one prompt a line", str(error))
        ) from error
    if not texts:
        raise WeightsError(Problem(str(file), "holds no prompt", "write one prompt a line"))
    return texts


def base_folder(adapter: Adapter, base: Path | None) -> Path:
    """Where the base checkpoint lies: `base`, or where the adapter's record says; WeightsError if that is not here."""
    if base is not None:
        return Path(base)
    location = adapter.base_location
    if location is None:
        do = "name the base checkpoint with --base"
        named = adapter.settings.get("base_model_name_or_path")
        if named and Path(str(named)).is_dir():
            do += f": its settings name {named}, without saying what was in it"
        raise WeightsError(Problem(str(adapter.folder), f"does not record its base ({RECORD_FILE})", do))
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:  # A name on the hub: only what was downloaded for training, never a network call.
        return Path(snapshot_download(location, revision=adapter.base_revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        do = "name the folder of the base checkpoint with --base"
        where = str(adapter.folder / RECORD_FILE)
        raise WeightsError(Problem(where, "the recorded base is not on this machine", do, got=location)) from error
