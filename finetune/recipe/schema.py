"""The settings as one flat table made from the models' JSON Schema (key path -> allowed values), and as Markdown."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from finetune.recipe.settings import Recipe
from finetune.recipe.source import show

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"

PATH_OR_ID = "path (or id)"
"""A data set needs exactly one of the two, besides its required keys."""


@dataclass(frozen=True)
class Setting:
    """One key path. `expects`: allowed values, in words; `section`: the value is a mapping of further settings.

    `many`: a list of such mappings is allowed too; the keys of its items have no index here. `kinds`: the values of the
    section's `kind` for which the key exists; empty if it always does.
    """

    path: str
    expects: str
    required: bool
    nullable: bool
    section: bool
    many: bool
    default: object
    description: str
    kinds: tuple[str, ...] = ()


@cache
def settings() -> dict[str, Setting]:
    """Every key path of a recipe, sections included, in the order of the recipe."""
    schema = Recipe.model_json_schema()
    collected: dict[str, Setting] = {}
    _collect(schema, schema["$defs"], "", collected)
    return collected


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors. It has no checks over several keys, which `load_recipe` makes."""
    return {"$schema": SCHEMA_DIALECT, **Recipe.model_json_schema()}


def _collect(schema: dict[str, Any], defs: dict[str, Any], prefix: str, collected: dict[str, Setting]) -> None:
    for name, fragment in schema["properties"].items():
        path = f"{prefix}{name}"
        options = list(_options(fragment))
        variants = _sections(options, defs)
        section = _joined(variants) if variants else None
        many = section is not None and any(option.get("type") == "array" for option in options)
        collected[path] = Setting(
            path=path,
            expects=_expects(fragment) if section is None else _expects_section(section, many),
            required=name in schema.get("required", ()),
            nullable=any(option.get("type") == "null" for option in options),
            section=section is not None,
            many=many,
            default=fragment.get("default"),
            description=fragment.get("description", ""),
            kinds=schema.get("kinds", {}).get(name, ()),
        )
        if section is not None:
            _collect(section, defs, f"{path}.", collected)


def _joined(variants: list[dict[str, Any]]) -> dict[str, Any]:
    """One schema with the keys of all variants of a section; `kinds`: for keys that not all variants have, which do."""
    if len(variants) == 1:
        return variants[0]
    properties: dict[str, Any] = {}
    kinds: dict[str, list[str]] = {}
    for variant in variants:
        for name, fragment in variant["properties"].items():
            properties.setdefault(name, fragment)
            kinds.setdefault(name, []).append(variant["properties"]["kind"]["const"])
    every = kinds["kind"]
    properties["kind"] = {**properties["kind"], "enum": every}
    return {
        "properties": properties,
        "required": {name for variant in variants for name in variant["required"]},
        "kinds": {name: tuple(having) for name, having in kinds.items() if having != every},
    }


def _options(fragment: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The alternatives of a value, one by one."""
    alternatives = [*fragment.get("anyOf", ()), *fragment.get("oneOf", ())]
    if not alternatives:
        yield fragment
    for alternative in alternatives:
        yield from _options(alternative)


def _sections(options: list[dict[str, Any]], defs: dict[str, Any]) -> list[dict[str, Any]]:
    """The models that the options refer to: several for a discriminated union, none for a plain value."""
    return [defs[option["$ref"].removeprefix("#/$defs/")] for option in options if "$ref" in option]


def _expects_section(section: dict[str, Any], many: bool) -> str:
    names = [name for name in section["properties"] if name not in section.get("kinds", ())]
    return "a section with " + ", ".join(names) + (", or a list of such sections" if many else "")


def _expects(fragment: dict[str, Any]) -> str:
    if "anyOf" in fragment:
        return " or ".join(_expects(option) for option in fragment["anyOf"])
    if "enum" in fragment:
        return "one of " + ", ".join(fragment["enum"])
    if "const" in fragment:
        return str(fragment["const"])
    if fragment["type"] == "array":
        return _list(fragment["items"])
    if fragment["type"] in ("integer", "number"):
        return _number(fragment)
    return {
        "boolean": "true or false",
        "string": "text",
        "null": "null",
        "object": _mapping(fragment),
    }[fragment["type"]]


def _list(items: dict[str, Any]) -> str:
    if "enum" in items:
        return "a list of " + ", ".join(items["enum"])
    return "a list of names" if items["type"] == "string" else f"a list, each {_number(items)}"


def _mapping(fragment: dict[str, Any]) -> str:
    values = fragment.get("additionalProperties", {})
    if "enum" in values:
        return "a mapping of names to " + ", ".join(values["enum"])
    texts = values.get("type") == "string"
    return "a mapping of names to " + ("names" if texts else "text, numbers, true, false or null")


def _number(fragment: dict[str, Any]) -> str:
    noun = "an integer" if fragment["type"] == "integer" else "a number"
    if "minimum" in fragment and "maximum" in fragment:
        return f"{noun} from {fragment['minimum']} to {fragment['maximum']}"
    bounds = {
        "minimum": "of at least {}",
        "exclusiveMinimum": "above {}",
        "maximum": "of at most {}",
        "exclusiveMaximum": "below {}",
    }
    limits = [words.format(fragment[key]) for key, words in bounds.items() if key in fragment]
    return " ".join((noun, " and ".join(limits))).strip()


_HEAD = """\
# Recipe reference

Generated by `finetune schema --reference`; do not edit. A recipe is one YAML 1.2 file, read strictly: unknown keys,
wrong types and missing keys are errors, reported all at once. Any key can be given on the command line as
`key.path=value`, for example `lora.r=32`; values are YAML, so lists are `[a, b]`. One entry of a list is named by its
index, counted from 0: `data.train[1].weight=2`. In paths `~` is the home folder.
"""
_COLUMNS = "| key | write | default | meaning |\n| --- | --- | --- | --- |\n"


def reference() -> str:
    """One table per section, in the order of a recipe."""
    known = settings()
    tables: dict[str, str] = {}
    parts = [_HEAD, "\n## Top level\n\n", _table([s for path, s in known.items() if "." not in path and not s.section])]
    for path, setting in known.items():
        if setting.section:
            need = "" if setting.required else " Optional."
            rows = [s for at, s in known.items() if at.rpartition(".")[0] == path and not s.section]
            table = f"\n{_table_once(rows, tables)}" if rows else ""
            parts.append(f"\n## `{path}`\n\n{_purpose(path, setting)}{need}\n{table}")
    return "".join(parts)


def _table_once(rows: list[Setting], tables: dict[str, str]) -> str:
    """The table, or the name of the section that has the same; `tables`: section by text of those written so far."""
    section = rows[0].path.rpartition(".")[0]
    table = _table(rows)
    same = tables.setdefault(table.replace(f"`{section}.", "`"), section)
    return table if same == section else f"Keys as in `{same}`.\n"


def _purpose(path: str, setting: Setting) -> str:
    """The docstring of the section's model; the field's description if several fields share the model."""
    annotation = Recipe.model_fields[path].annotation if path in Recipe.model_fields else None
    return (getattr(annotation, "__doc__", None) if isinstance(annotation, type) else None) or setting.description


def _table(rows: list[Setting]) -> str:
    return _COLUMNS + "".join(
        f"| `{row.path}` | {row.expects} | {_default(row)} | {_only(row)}{row.description} |\n".replace(
            "\n", " "
        ).rstrip()
        + "\n"
        for row in rows
    )


def _only(setting: Setting) -> str:
    return f"With kind: {' or '.join(setting.kinds)}. " if setting.kinds else ""


def _default(setting: Setting) -> str:
    if setting.required:
        return "**required**"
    return "`{}`" if setting.expects.startswith("a mapping") else f"`{show(setting.default)}`"
