"""Checks between the settings of one section: data, and the training method."""

import json
from typing import Any, TypeAlias, TypeVar

from finetune.recipe.row_formats import (
    MESSAGE_FORMATS,
    PAIR_FORMATS,
    ROW_FORMATS,
    hub_id_in_url,
    is_hub_id,
    is_url,
    looks_like_path,
)
from finetune.recipe.schema import settings
from finetune.recipe.settings import DataSource
from finetune.recipe.source import Source, show, spell
from finetune.recipe.yaml import Path

T = TypeVar("T")


def key_path(key: str) -> Path:
    """The path of a dotted key."""
    return tuple(key.split("."))


def read(source: Source, key: str, kind: type[T]) -> T | None:
    """The value of `key`, or its default if the recipe does not set it; None if null or already reported."""
    path = key_path(key)
    if source.is_broken(path):
        return None
    value: object = source.get(path)
    if value is None:
        value = settings()[key].default
    return value if isinstance(value, kind) else None


def real(source: Source, key: str) -> float | None:
    """Like `read`, for a setting that takes integers and floats."""
    whole = read(source, key, int)
    return read(source, key, float) if whole is None else whole


SHIPPED_TEMPLATES = (
    *("chatml", "mistral", "mistral-v3", "mistral-v3-tekken", "mistral-v7", "mistral-v7-tekken"),
    *("mistral-v11", "mistral-v13", "mistral-v15", "alpaca"),
)
ONLY_WITH_ID = ("config", "split", "revision", "streaming")

_DEFAULTS = DataSource(format="auto").model_dump()

Entry: TypeAlias = tuple[Path, dict[str, Any]]


def check_data(source: Source) -> None:
    """Run every check of `data`; problems are collected in `source`."""
    for which in ("train", "eval"):
        entries = _entries(source, which)
        for path, entry in entries:
            _origin(source, path, entry)
            _format(source, path, entry)
        _listed_twice(source, entries)
    _pairs(source)
    _weights(source, _entries(source, "train"))
    _weights_of_evaluation(source, _entries(source, "eval"))
    _unused(source)
    _chat_template(source)


def _entries(source: Source, which: str) -> list[Entry]:
    """Path and values, as typed, of each data set; entries that are not sections were already reported."""
    path = key_path(f"data.{which}")
    given = source.get(path)
    entries: list[Entry] = [(path, given)] if isinstance(given, dict) else []
    if isinstance(given, list):
        entries = [((*path, index), entry) for index, entry in enumerate(given) if isinstance(entry, dict)]
    return entries


def _origin(source: Source, path: Path, entry: dict[str, Any]) -> None:
    files, hub = entry.get("path"), entry.get("id")
    if files is None and hub is None:
        do = "add path: a file, a glob or a folder; or id: owner/name of a data set on the hub"
        source.report(path, "no data set is named", do)
    elif files is not None and hub is not None:
        got = f"path: {show(files)} and id: {show(hub)}"
        source.report((*path, "id"), "two data sets in one", "keep one of the two, or write a list of both", got=got)
    elif isinstance(hub, str):
        _hub_id(source, (*path, "id"), hub)
    elif isinstance(files, str):
        _local(source, path, entry, files)


def _hub_id(source: Source, where: Path, name: str) -> None:
    in_url = hub_id_in_url(name)
    if is_url(name) and in_url:
        source.report(where, "a URL, not a name", f"write id: {in_url}", got=show(name))
    elif looks_like_path(name):
        source.report(where, "looks like a path of files", f"write path: {name} in place of id", got=show(name))
    elif not is_hub_id(name):
        do = "write owner/name, as on its page; files are given with path"
        source.report(where, "not the name of a data set on the hub", do, got=show(name))


def _local(source: Source, path: Path, entry: dict[str, Any], name: str) -> None:
    if is_url(name):
        in_url = hub_id_in_url(name)
        do = f"write id: {in_url} in place of path" if in_url else "download it first, and write the path of the file"
        source.report((*path, "path"), "a URL, not a path", do, got=show(name))
    for key in ONLY_WITH_ID:
        value = entry.get(key)
        if value is not None and value != _DEFAULTS[key]:
            do = (
                "remove it, or write id in place of path"
                if is_hub_id(name) and not looks_like_path(name)
                else "remove it"
            )
            source.report((*path, key), "only for data sets on the hub", do, got=show(value))


def _format(source: Source, path: Path, entry: dict[str, Any]) -> None:
    name, columns = entry.get("format"), entry.get("columns")
    where = (*path, "format")
    if source.is_broken(where) or name not in ("auto", *ROW_FORMATS):
        return
    method = read(source, "method.kind", str)
    if name in PAIR_FORMATS and method == "sft":
        what = "pairs of answers are for preference tuning; method.kind: sft takes one answer per row"
        do = "write method.kind: dpo, or give rows with one answer each, for example as messages"
        source.report(where, what, do, got=show(name))
    if name in ROW_FORMATS and name not in PAIR_FORMATS and method == "dpo":
        what = "one answer per row, or none; method.kind: dpo compares two answers to one prompt"
        do = f"give pairs, in one of the formats {', '.join(PAIR_FORMATS)}, or write method.kind: sft"
        source.report(where, what, do, got=show(name))
        return
    if name == "text" and read(source, "data.loss_on", str) not in ("all", None):
        got = f"text, and data.loss_on: {read(source, 'data.loss_on', str)}"
        what = "plain text has no answers: all of its tokens are supervised"
        source.report(where, what, "write data.loss_on: all, for all data sets of the recipe", got=got)
    _response_marks(source, path, entry)
    if isinstance(columns, dict) and columns:
        _columns(source, (*path, "columns"), str(name), columns)
    if entry.get("roles") and name in ROW_FORMATS and name not in MESSAGE_FORMATS:
        what = f"the format {name} has no messages that say who speaks"
        do = f"remove it; it is for {', '.join(MESSAGE_FORMATS)}"
        source.report((*path, "roles"), what, do, got=show(entry["roles"]))


def _response_marks(source: Source, path: Path, entry: dict[str, Any]) -> None:
    """Marks of answers belong to rendered text, and say where its loss is."""
    name, loss_on = entry.get("format"), read(source, "data.loss_on", str)
    before, end = entry.get("response_template"), entry.get("response_end")
    for key, value in (("response_template", before), ("response_end", end)):
        if value is not None and name != "rendered":
            do = "remove it, or write format: rendered"
            source.report((*path, key), "only for text that already has its marks", do, got=show(value))
    if name != "rendered" or loss_on is None:
        return
    where, all_tokens = (*path, "response_template"), "data.loss_on: all learns every token"
    if loss_on == "all":
        if before is not None:
            do = "remove it, or write data.loss_on: assistant"
            source.report(where, f"has no effect: {all_tokens}", do, got=show(before))
    elif loss_on == "completion":
        do = "write assistant (every answer), last_assistant or all"
        source.report(key_path("data.loss_on"), "rendered text has no user messages to count from", do, got=loss_on)
    elif before is None:
        do = 'name the text before every answer, for example "[/INST]"; or write data.loss_on: all'
        source.report(where, "missing: nothing says where the answers of rendered text begin", do)
    if end is not None and before is None and loss_on == "all":
        source.report((*path, "response_end"), f"has no effect: {all_tokens}", "remove it", got=show(end))


def _pairs(source: Source) -> None:
    """Settings that do not apply to pairs of answers."""
    if read(source, "method.kind", str) != "dpo":
        return
    loss_on, overlong = (read(source, f"data.{key}", str) for key in ("loss_on", "overlong"))
    if loss_on not in ("assistant", None):
        what = "the loss of a pair is on its two answers, and nowhere else"
        source.report(key_path("data.loss_on"), what, "write assistant, or remove this key", got=show(loss_on))
    if overlong == "split":
        what = "a pair cannot be split: its answers are compared whole"
        source.report(key_path("data.overlong"), what, "write error, truncate or drop", got=show(overlong))


def _columns(source: Source, where: Path, name: str, columns: dict[str, Any]) -> None:
    if name == "auto":
        what = "renames the fields of a format, which format: auto does not name"
        source.report(where, what, "write the format", got=show(columns))
        return
    fields = ROW_FORMATS[name].fields
    for field, column in columns.items():
        if field not in fields:
            turned = f"write {column}: {field}, the format's name first" if column in fields else ""
            do = turned or f"write {{field: column of the file}}; its fields are {', '.join(fields)}"
            source.report((*where, field), f"the format {name} has no such field", do, got=show(column))


def _listed_twice(source: Source, entries: list[Entry]) -> None:
    """A data set that is listed twice with the same columns; with other columns it is another data set."""
    seen: dict[str, Path] = {}
    for path, entry in entries:
        kept = {key: value for key, value in entry.items() if key not in ("weight", "max_rows")}
        same = json.dumps({**_DEFAULTS, **kept}, sort_keys=True)
        if same in seen:
            do = "keep one of the two; a weight lets a data set be drawn more often"
            source.report(path, f"the same data set as {spell(seen[same])}", do, got=show(_name(entry)))
        seen.setdefault(same, path)


def _name(entry: dict[str, Any]) -> object:
    return entry.get("path") if entry.get("id") is None else entry.get("id")


def _weights(source: Source, entries: list[Entry]) -> None:
    weighted = [entry.get("weight") is not None for _, entry in entries]
    if not any(weighted):
        return
    given = source.get(key_path("data.train"))
    if not isinstance(given, list) or len(given) == 1:
        path, entry = entries[0]
        what = "has no effect: it is a share among several data sets"
        source.report((*path, "weight"), what, "remove it, or write a list of data sets", got=show(entry["weight"]))
        return
    first = spell(entries[weighted.index(True)][0])
    for (path, _), has_one in zip(entries, weighted, strict=True):
        if not has_one:
            do = "add a weight to every data set of the list, or to none"
            source.report((*path, "weight"), f"missing, and {first} has one", do)


def _weights_of_evaluation(source: Source, entries: list[Entry]) -> None:
    for path, entry in entries:
        if entry.get("weight") is not None:
            what = "has no effect: an evaluation uses every row once"
            source.report((*path, "weight"), what, "remove it", got=show(entry["weight"]))


def _unused(source: Source) -> None:
    """Settings that are given but not used."""
    where = key_path("data.stopping_strategy")
    strategy = source.get(where)
    weighted = any(entry.get("weight") is not None for _, entry in _entries(source, "train"))
    if strategy not in (None, settings()["data.stopping_strategy"].default) and not weighted:
        what = "has no effect: no data set has a weight, so each row is used once per epoch"
        several = len(_entries(source, "train")) > 1
        do = "add a weight to every data set of data.train, or remove this key" if several else "remove this key"
        source.report(where, what, do, got=show(strategy))
    where = key_path("data.max_bad_share")
    share = source.get(where)
    kept = read(source, "data.on_bad_row", str) == "error"
    if share not in (None, settings()["data.max_bad_share"].default) and kept:
        what, do = "has no effect: any bad row is an error", "write data.on_bad_row: drop, or remove this key"
        source.report(where, what, do, got=show(share))


def _chat_template(source: Source) -> None:
    name = read(source, "data.chat_template", str)
    if name and name not in SHIPPED_TEMPLATES and not name.endswith(".jinja"):
        do = f"write one of {', '.join(SHIPPED_TEMPLATES)}, or the path of a .jinja file"
        source.report(
            key_path("data.chat_template"), "neither a shipped template nor a .jinja file", do, got=show(name)
        )


# TRL rejects the others: arXiv 2309.16240 changes the difference of two rewards, which they do not have.
_ANY_DIVERGENCE = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
_SORTING = ("aot", "aot_unpaired")
_SMOOTHED = ("robust", "exo_pair", *_SORTING)


def check_method(source: Source) -> None:
    """Run every check of `method`; all problems end in `source`."""
    if read(source, "method.kind", str) != "dpo":
        return
    losses = _losses(source)
    for check in (_loss_weights, _smoothing, _divergence, _pair_weights, _sorted_pairs, _of_another_loss):
        check(source, losses)


def _losses(source: Source) -> list[str]:
    given = source.get(key_path("method.loss_type"))
    losses = [name for name in given if isinstance(name, str)] if isinstance(given, list) else ["sigmoid"]
    for index, name in enumerate(losses):
        if name in losses[:index]:
            where = (*key_path("method.loss_type"), index)
            source.report(where, "listed twice", "keep one of the two, with the sum of their weights", got=show(name))
    return losses


def _loss_weights(source: Source, losses: list[str]) -> None:
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
        do = "remove it, or add robust or exo_pair to method.loss_type"
        source.report(where, what, do, got=show(smoothing))


def _divergence(source: Source, losses: list[str]) -> None:
    where = key_path("method.f_divergence_type")
    name = read(source, "method.f_divergence_type", str)
    others = [loss for loss in losses if loss not in _ANY_DIVERGENCE]
    if name and name != "reverse_kl" and others:
        what = f"the losses {', '.join(others)} are defined for reverse_kl only"
        do = "write reverse_kl" + (", or take them out of method.loss_type" if set(losses) > set(others) else "")
        source.report(where, what, do, got=show(name))


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
        do = "write false" + (", or take it out of method.loss_type" if len(losses) > 1 else "")
        source.report(key_path("method.use_weighting"), what, do, got="true")


def _sorted_pairs(source: Source, losses: list[str]) -> None:
    where = key_path("training.per_device_train_batch_size")
    alone = read(source, "training.per_device_train_batch_size", int) == 1 and not read(source, "data.packing", bool)
    for loss in losses:
        if loss in _SORTING and alone:
            what = f"the loss {loss} sorts the pairs of a micro-batch: with one pair it equals sigmoid"
            rows = read(source, "training.global_batch_size", int) or 1
            sizes = [size for size in range(2, min(rows, 4096) + 1) if rows % size == 0]
            fitting = f"write {min(sizes, key=lambda size: abs(size - 8))}" if sizes else "enlarge global_batch_size"
            source.report(where, what, f"{fitting}, or write method.loss_type: [sigmoid]", got="1")


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
