"""Checks between settings. Each check reads the raw values and skips those that were already reported."""

from finetune.recipe.lora_targets import only_in_mixtures, reaches_a_router, wrong_target
from finetune.recipe.schema import settings
from finetune.recipe.section_checks import check_data, check_method, key_path, read, real
from finetune.recipe.source import Source, show
from finetune.recipe.training_checks import check_training
from finetune.recipe.yaml import Path


def check_all(source: Source) -> None:
    """Run every check; problems are collected in `source`."""
    for check in (
        _added_tokens,
        _targets,
        _experts_settings,
        _experts_choice,
        _dropout,
        _balance,
        _length,
        _batch,
        check_training,
        check_data,
        check_method,
        _dashboards,
    ):
        check(source)


def _added_tokens(source: Source) -> None:
    tokens = source.get(key_path("model.added_tokens"))
    if not isinstance(tokens, list):
        return
    for index, token in enumerate(tokens):
        where = (*key_path("model.added_tokens"), index)
        if not isinstance(token, str) or source.is_broken(where):
            continue
        if any(character.isspace() for character in token):
            do = "write it without: a tokenizer may strip or split white space"
            source.report(where, "white space in a token", do, got=show(token))
        elif token in tokens[:index]:
            source.report(where, "listed twice", "keep one of the two", got=show(token))


def _target_names(source: Source) -> list[str] | None:
    """The targets as typed, even if one of them was reported: the other checks still apply."""
    names = source.get(key_path("lora.targets"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return [str(name) for name in names]


def _targets(source: Source) -> None:
    names = _target_names(source)
    if names is None:
        return
    if not names:
        do = "write what to adapt, such as [attention, experts]"
        source.report(key_path("lora.targets"), "nothing to train", do, got="[]")
    for index, name in enumerate(names):
        where = (*key_path("lora.targets"), index)
        instead = wrong_target(name)
        if instead is not None:
            source.report(where, "not a target", instead, got=show(name))
        elif name in names[:index]:
            source.report(where, "listed twice", "keep one of the two", got=show(name))


def _experts_settings(source: Source) -> None:
    names = _target_names(source)
    if not names or "experts" in names:
        return
    for key in ("lora.expert_r", "lora.expert_lora_alpha"):
        value = source.get(key_path(key))
        if value is not None:
            do = "add experts to lora.targets or remove this key"
            source.report(key_path(key), "no experts are adapted", do, got=show(value))


def _experts_choice(source: Source) -> None:
    if source.is_broken(key_path("lora.experts")):
        return
    names, share = _target_names(source), source.get(key_path("lora.experts_share"))
    choice = ("lora.experts_share", "lora.experts_score", "lora.experts_tokens")
    given = [key for key in choice if source.get(key_path(key)) not in (None, settings()[key].default)]
    if read(source, "lora.experts", str) == "auto":
        if names and "experts" not in names:
            do = f"add experts to lora.targets or remove {' and '.join(['this key', *given])}"
            source.report(key_path("lora.experts"), "no experts are adapted", do, got="auto")
        elif share is None:
            do = "add lora.experts_share: the share of each layer's score that the adapted experts must reach (0 to 1)"
            source.report(key_path("lora.experts_share"), "required with lora.experts: auto", do)
        return
    auto = "lora.experts: auto" if share is not None else "lora.experts: auto with lora.experts_share"
    for key in given:
        what, do = "has no effect: every expert is adapted", f"write {auto}, or remove this key"
        source.report(key_path(key), what, do, got=show(source.get(key_path(key))))


def _dropout(source: Source) -> None:
    dropout = real(source, "lora.lora_dropout")
    targets = _target_names(source) or []
    if dropout and "router" in targets:
        what = "the router's adapter has no dropout: it is added to the weight, not to the output"
        do = "write 0" if set(targets) == {"router"} else "write 0, or take router out of lora.targets"
        source.report(key_path("lora.lora_dropout"), what, do, got=show(dropout))


def _balance(source: Source) -> None:
    names = _target_names(source)
    if not names:
        return
    parts = only_in_mixtures(names)
    if parts and source.get(("router",)) is None and not source.is_broken(("router",)):
        what = f"section is missing, and lora.targets names {' and '.join(parts)}"
        do = "add router.router_aux_loss_coef: a number of at least 0 (0 trains without the balance term)"
        do += f"; for a dense model remove {' and '.join(parts)} from lora.targets"
        source.report(("router",), what, do)
    for key, term in (("router_aux_loss_coef", "balance term"), ("router_z_loss_coef", "z-loss")):
        coefficient = real(source, f"router.{key}")
        if coefficient and not reaches_a_router(names):
            what = f"the {term} has no effect: the router is frozen and nothing before a router is trained"
            do = "write 0, or add router, attention or experts to lora.targets"
            source.report(key_path(f"router.{key}"), what, do, got=show(coefficient))


def _length(source: Source) -> None:
    keys = ("training.max_steps", "training.num_train_epochs")
    if not isinstance(source.get(("training",)), dict) or any(source.is_broken(key_path(key)) for key in keys):
        return
    steps, epochs = (source.get(key_path(key)) for key in keys)
    if steps is None and epochs is None:
        do = "write exactly one of max_steps and num_train_epochs"
        source.report(("training",), "the length of the run is missing", do)
    if steps is not None and epochs is not None:
        got = f"max_steps: {show(steps)} and num_train_epochs: {show(epochs)}"
        where = _later(source, key_path(keys[0]), key_path(keys[1]))
        source.report(
            where, "the length of the run is given twice", "keep one of the two; null removes the other", got=got
        )


def _later(source: Source, first: Path, second: Path) -> Path:
    """The path that was given last, which is most likely the one to change."""
    return max(first, second, key=lambda path: source.place(path)[0])


def _batch(source: Source) -> None:
    rows = read(source, "training.global_batch_size", int)
    micro = read(source, "training.per_device_train_batch_size", int)
    if rows and micro and rows % micro:
        what = f"does not divide global_batch_size {rows}"
        divisors = [size for size in range(1, min(rows, 4096) + 1) if rows % size == 0]
        near = min(divisors, key=lambda size: abs(size - micro))
        do = f"write a divisor, such as {near}"
        source.report(key_path("training.per_device_train_batch_size"), what, do, got=show(micro))


def _dashboards(source: Source) -> None:
    names = source.get(key_path("logging.report_to"))
    if not isinstance(names, list):
        return
    if not names:
        source.report(
            key_path("logging.report_to"), "empty list", "write none, auto, or a list such as [wandb]", got="[]"
        )
    for index, name in enumerate(names):
        if name in names[:index]:
            where = (*key_path("logging.report_to"), index)
            source.report(where, "listed twice", "keep one of the two", got=show(name))
