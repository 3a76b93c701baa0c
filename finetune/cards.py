"""Model cards: `README.md` of merged folders, adapters and exports; from plain facts, without this machine's paths.

Names of runs, models and files, and all that an adapter of others records about itself, are shown as what they are:
what Markdown or HTML would read as more than text stands in a code span (`_inline`), and YAML quotes it.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import finetune
from finetune.errors import printable
from finetune.recipe.row_formats import is_hub_id

Facts = Mapping[str, Any]
Row = tuple[str, str, str]  # label, value, remark
_HASH = re.compile(r"[0-9a-f]{64}")
# Folders that every run has.
_IN_A_RUN = re.compile(r"adapter|checkpoint-\d+")
# Settings of a recipe that name files, folders or models.
_SHOWN = 300
"""Characters of one name or value."""
# What Markdown, GitHub's and mkdocs', would take for more than text: HTML, links (bare ones too), code, emphasis,
# cells, lists and headings.
_MARKUP = re.compile(r"[<>&\[\]`*|~\\@$]|://|\bwww\.|^\s*[#=+-]\s|^#|^\s*\d+[.)]\s|(?<!\w)_|_(?!\w)", re.IGNORECASE)
_METHOD = re.compile(r"[a-z0-9_-]{1,32}")
_PLACES = ("path", "output_dir", "name_or_path", "adapter", "chat_template")


def public_name(name: str | None, folder: str | None = None) -> str:
    """A hub id as it is, of anything else the last part. `folder`: where it was found, if it was."""
    if not name:
        return "unknown"
    parts = Path(name).parts
    found_there = folder is not None and Path(folder).parts[-len(parts) :] == parts
    is_public = is_hub_id(name) and not found_there and not Path(name).exists()
    return name if is_public else Path(name).name or "unknown"


def adapter_name(folder: str) -> str:
    """Of an adapter's folder the last part; below a run, which calls all of them alike, the run's name too."""
    path = Path(folder)
    run = path.parent.name
    return f"{run}/{path.name}" if _IN_A_RUN.fullmatch(path.name) and run not in ("", "..") else public_name(folder)


class _Markdown(str):
    """Text that is Markdown already, and holds nothing from outside that is not escaped."""


def _inline(text: object) -> _Markdown:
    """A name or a value within a line: as it is where it is plain text, else as code."""
    if isinstance(text, _Markdown):
        return text
    plain = printable(str(text))
    plain = plain if len(plain) <= _SHOWN else plain[:_SHOWN] + "..."
    return _code(plain) if _MARKUP.search(plain) else _Markdown(plain)


def _code(text: object) -> _Markdown:
    """A code span that the text cannot end; a bar would end the cell of a table."""
    plain = printable(str(text)).replace("|", r"\|")
    fence = "`" * (1 + _longest_run(plain))
    space = " " if "`" in plain or not plain.strip() else ""
    return _Markdown(f"{fence}{space}{plain}{space}{fence}")


def _longest_run(text: str) -> int:
    """Of backticks."""
    return max(map(len, re.findall("`+", text)), default=0)


def _block(text: str, language: str) -> str:
    """A block of code that the text cannot end."""
    fence = "`" * max(3, 1 + _longest_run(text))
    lines = "\n".join(map(printable, text.rstrip("\n").split("\n")))
    return f"{fence}{language}\n{lines}\n{fence}"


def merged_card(
    report: Facts, records: Sequence[Facts], output: str, rows: Iterable[Row], compared: Iterable[Row] = ()
) -> str:
    """`report`: `MergeReport.as_dict()`; `records`: `finetune.json` of its adapters, in their order.

    `output`: the merged folder; `rows`: what the merge reports, without paths; `compared`: the losses, where
    `--compare` measured them.
    """
    base = _base_name(report, records)
    missing = report["proof"]["not_proven"]
    tags = ["moe-finetune", "lora", "merged", *_methods(records), *(["not-proven"] if missing else [])]
    sections = [
        _front_matter(base, "transformers", tags),
        *([_warning(missing)] if missing else []),
        f"# {_inline(public_name(output))}",
        f"{_inline(base)} with {_count(len(records))} merged into its weights by moe-finetune {finetune.__version__}: "
        f"{report['nbytes'] / 2**30:.2f} GiB, {'/'.join(report['dtypes'])}.",
        "## Proof",
        _row_table([("fingerprint of this model", report["fingerprint"], ""), *rows]),
        *([_comparison(report["compare"], compared)] if report.get("compare") else []),
    ]
    for number, (adapter, record) in enumerate(zip(report["adapters"], records, strict=True), start=1):
        title = "## Adapter" if len(records) == 1 else f"## Adapter {number}"
        facts = [
            ("name", adapter_name(adapter["name_or_path"])),
            ("SHA-256 of its weights", _code(adapter["sha256"])),
            *([] if adapter["weight"] == 1 else [("weight", f"{adapter['weight']:g}")]),
        ]
        sections += [title, _table(("", ""), facts), *_training(record)]
    return "\n\n".join(sections) + "\n"


def adapter_card(record: Facts) -> str:
    """Of an adapter folder that training writes; `record`: its `finetune.json`."""
    base = _name((record.get("base") or {}).get("name_or_path"))
    lora = (record.get("recipe") or {}).get("lora", {})
    targets, experts = ", ".join(map(str, lora.get("targets") or [])) or "unknown", lora.get("expert_r")
    rank = f"r={_inline(lora.get('r'))}" + (f", {_inline(experts)} for experts" if experts else "")
    sections = [
        _front_matter(base, "peft", ["moe-finetune", "lora", *_methods([record])], relation="adapter"),
        "# LoRA adapter",
        f"An adapter for {_inline(base)}: {rank}, on {_inline(targets)}. `PeftModel.from_pretrained` loads it on the "
        "base in 16 or 32 bits; `finetune merge` writes it into the weights, and proves the result; `finetune export` "
        "makes a folder for vLLM, or a GGUF file.",
        *_training(record),
    ]
    return "\n\n".join(sections) + "\n"


def vllm_card(record: Facts, exported: Facts) -> str:
    """Of a folder for vLLM; `record`: the adapter's `finetune.json`, `exported`: what was written beside it."""
    base = _name(exported["base"]["name_or_path"])
    rows = [
        ("made from", adapter_name(exported["adapter"]["name_or_path"])),
        ("SHA-256 of its weights", _code(exported["adapter"]["sha256"])),
        ("fingerprint of the base", _code(exported["base"]["fingerprint"])),
        *(
            [(_Markdown("`stop_token_ids` of requests"), _Markdown(str(ends)))]
            if (ends := exported.get("stop_token_ids"))
            else []
        ),
    ]
    rank = exported["max_lora_rank"]
    sections = [
        _front_matter(base, "vllm", ["moe-finetune", "lora", *_methods([record])], relation="adapter"),
        "# LoRA adapter for vLLM",
        f"An adapter for {_inline(base)} with the factors of each expert, as vLLM's fused-MoE LoRA reads them:",
        f"    vllm serve BASE --enable-lora --max-lora-rank {rank} --lora-modules NAME=FOLDER",
        _table(("", ""), rows),
        *_training(record),
    ]
    return "\n\n".join(sections) + "\n"


def _base_name(report: Facts, records: Sequence[Facts]) -> str:
    recorded = next((record["base"]["name_or_path"] for record in records if record.get("base")), None)
    return public_name(recorded or report["base"], report["base"])


def _name(recorded: str | None) -> str:
    return public_name(recorded)


def _methods(records: Sequence[Facts]) -> list[str]:
    kinds = ((record.get("recipe") or {}).get("method", {}).get("kind") for record in records)
    return list(dict.fromkeys(kind for kind in kinds if isinstance(kind, str) and _METHOD.fullmatch(kind)))


def _count(adapters: int) -> str:
    return "an adapter" if adapters == 1 else f"{adapters} adapters"


def _front_matter(base: str, library: str, tags: Sequence[str], relation: str = "finetune") -> str:
    base = printable(base)
    facts: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation", "tags": list(tags)}
    # The hub takes ids only, and would look for a folder's name there.
    if "/" in base:
        facts = {"base_model": base, "base_model_relation": relation, **facts}
    else:
        facts["base_model"] = base
    return f"---\n{yaml.safe_dump(facts, sort_keys=False, width=2**20)}---"


def _warning(missing: Sequence[str]) -> str:
    lines = ["> **NOT PROVEN.** This model was merged with `--no-proof`. Not verified:"]
    return "\n".join([*lines, *(f"> - {phrase}" for phrase in missing)])


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_inline, line))} |" for line in lines)


def _row_table(rows: Iterable[Row]) -> str:
    return _table(
        ("", "", ""), [(label, _code(value) if _HASH.fullmatch(value) else value, x) for label, value, x in rows]
    )


def _comparison(compare: Facts, rows: Iterable[Row]) -> str:
    """Losses of the merges that were measured; `compare`: `Comparison` as a dict."""
    return f"### Compared on {_inline(public_name(compare['data'], compare['data']))}\n\n{_row_table(rows)}"


def _training(record: Facts) -> list[str]:
    """Data, figures, versions and recipe of one training; of an adapter without a record, that it has none."""
    if not record.get("recipe"):
        return ["How it was trained is not recorded."]
    try:
        return _trained(record)
    except (KeyError, TypeError, ValueError, AttributeError):
        return ["How it was trained is recorded in another form than this program writes."]


def _trained(record: Facts) -> list[str]:
    sections = []
    if args := record.get("template_args"):
        given = _code(f"chat_template_kwargs={json.dumps(args)}")
        sections += [
            f"Prompts must be rendered with {given}, as in training: in requests to a server, or as keyword arguments "
            "of `apply_chat_template`."
        ]
    if data := record.get("data"):
        sections += ["### Data", _table(("set", "rows", "tokens", "fingerprint (SHA-256)"), _data_rows(data))]
    if metrics := record.get("metrics"):
        sections += ["### Final metrics", _table(("", "", ""), _metric_rows(metrics))]
    versions = [f"{name} {number}" for name, number in record.get("versions", {}).items()]
    template = record.get("template_sha256")
    made_with = [
        ("versions", ", ".join(versions) or "not recorded"),
        *([("chat template (SHA-256)", _Markdown(_code(template) + _unused_template(record)))] if template else []),
        *([("date that the chat template wrote", record["template_day"])] if record.get("template_day") else []),
        ("quantisation of the base in training", record.get("quantization") or "none"),
    ]
    recipe = yaml.safe_dump(_without_places(record["recipe"]), sort_keys=False, allow_unicode=True)
    return [*sections, "### Made with", _table(("", ""), made_with), "### Recipe", _block(recipe, "yaml")]


def _unused_template(record: Facts) -> str:
    """That training did not go through the chat template, where every row had its marks already."""
    train = (record["recipe"].get("data") or {}).get("train") or []
    formats = {source.get("format") for source in (train if isinstance(train, list) else [train])}
    return ", not used in training: the rows were already rendered" if formats == {"rendered"} else ""


def _data_rows(data: Facts) -> list[tuple[str, ...]]:
    return [
        (
            f"{split}: {public_name(dataset['name'])}",
            *(_number(dataset.get(name)) for name in ("rows", "tokens")),
            _code(dataset.get("content") or dataset.get("digest") or "not recorded"),
        )
        for split, sets in data.items()
        for dataset in sets
    ]


def _number(count: int | None) -> str:
    return "not recorded" if count is None else f"{count:,}"


def _metric_rows(metrics: Facts) -> list[tuple[str, ...]]:
    return [
        (split, name, f"{value:.6g}" if isinstance(value, float) else str(value))
        for split, values in metrics.items()
        for name, value in values.items()
    ]


def _without_places(value: Any, key: str = "") -> Any:
    """A recipe without the folders of this machine: of whatever names a place only the last part is kept."""
    if isinstance(value, Mapping):
        return {name: _without_places(item, name) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(item, key) for item in value]
    if isinstance(value, str) and (key in _PLACES or value.startswith(("/", "~"))):
        return public_name(value)
    return value
