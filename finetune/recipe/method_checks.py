"""Checks between the settings of a method."""

from finetune.recipe.fields import settings
from finetune.recipe.source import Source, show
from finetune.recipe.typed import key_path, read, real

# TRL rejects the others: arXiv 2309.16240 changes the difference of two rewards, which they do not have.
_ANY_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
_SORTING = ("aot", "aot_unpaired")
_SMOOTHED = ("robust", "exo_pair", *_SORTING)


def check_method(source: Source) -> None:
    """Run every check of `method`; all problems end in `source`."""
    if read(source, "method.kind", str) != "dpo":
        return
    losses = _losses(source)
    for check in (_weights, _smoothing, _divergence, _pair_weights, _sorted_pairs, _of_another_loss):
        check(source, losses)


def _losses(source: Source) -> list[str]:
    given = source.get(key_path("method.loss_type"))
    losses = [name for name in given if isinstance(name, str)] if isinstance(given, list) else ["sigmoid"]
    for index, name in enumerate(losses):
        if name in losses[:index]:
            where = (*key_path("method.loss_type"), index)
            source.report(where, "listed twice", "keep one of the two, with the sum of their weights", got=show(name))
    return losses


def _weights(source: Source, losses: list[str]) -> None:
    where = key_path("method.loss_weights")
    weights = source.get(where)
    if isinstance(weights, list) and len(weights) != len(losses):
        what = f"needs one weight for each of {', '.join(losses)}"
        do = "write one number" if len(losses) == 1 else f"write {len(losses)} numbers"
        source.report(where, what, do, got=show(weights))


def _smoothing(source: Source, losses: list[str]) -> None:
    where = key_path("method.label_smoothing")
    smoothing = real(source, "method.label_smoothing")
    if smoothing is None:
        return
    if "exo_pair" in losses and smoothing == 0:
        source.report(
            where, "the loss exo_pair needs a value above 0", "write 1e-3, as in its paper", got=show(smoothing)
        )
    if "robust" in losses and smoothing >= 0.5:
        what = "the loss robust needs a value below 0.5: from 0.5 on most labels would be swapped"
        source.report(
            where, what, "write the share of pairs that are labelled wrongly, such as 0.1", got=show(smoothing)
        )
    if smoothing and not set(losses) & set(_SMOOTHED):
        what = f"has no effect: {', '.join(losses)} does not use it"
        do = f"remove it, or add one of {', '.join(_SMOOTHED)} to method.loss_type"
        source.report(where, what, do, got=show(smoothing))


def _divergence(source: Source, losses: list[str]) -> None:
    where = key_path("method.f_divergence_type")
    name = read(source, "method.f_divergence_type", str)
    others = [loss for loss in losses if loss not in _ANY_DIVERGENCE]
    if name and name != "reverse_kl" and others:
        what = f"the losses {', '.join(others)} are defined for reverse_kl only"
        source.report(where, what, "write reverse_kl, or take them out of method.loss_type", got=show(name))


def _pair_weights(source: Source, losses: list[str]) -> None:
    if not read(source, "method.use_weighting", bool):
        return
    for loss in losses:
        if loss in _SORTING:
            what = f"{loss} sorts the pairs, so a pair cannot be weighted"
        elif loss == "sft":
            what = "sft is a mean over tokens, so a pair cannot be weighted"
        else:
            continue
        do = "write false, or take it out of method.loss_type"
        source.report(key_path("method.use_weighting"), what, do, got="true")


def _sorted_pairs(source: Source, losses: list[str]) -> None:
    where = key_path("training.per_device_train_batch_size")
    alone = read(source, "training.per_device_train_batch_size", int) == 1 and not read(source, "data.packing", bool)
    for loss in losses:
        if loss in _SORTING and alone:
            what = f"the loss {loss} sorts the pairs of a micro-batch: with one pair it equals sigmoid"
            source.report(where, what, "write at least 2, better 8, or method.loss_type: [sigmoid]", got="1")


def _of_another_loss(source: Source, losses: list[str]) -> None:
    """Settings that are given but not used."""
    divergence = read(source, "method.f_divergence_type", str)
    for key, used, needed in (
        ("method.discopop_tau", "discopop" in losses, "method.loss_type: [discopop]"),
        (
            "method.f_alpha_divergence_coef",
            divergence == "alpha_divergence",
            "method.f_divergence_type: alpha_divergence",
        ),
    ):
        value = source.get(key_path(key))
        if value not in (None, settings()[key].default) and not used:
            source.report(key_path(key), "has no effect", f"remove it, or write {needed}", got=show(value))
