"""A list of all settings with type, default and meaning, made from the settings tree."""

from __future__ import annotations

import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args

from dist_train.config import Config, Section

MARKDOWN_HEAD = """# Settings of a training run

Give a setting as `key=value` after `dist-train train`, or in a YAML file for `--config`, where
sections are nested: `plan: {batch: 64}` is `plan.batch=64`. Types are strict. A key that is unknown
or given twice is refused. `dist-train config` prints this list, and
`dist-train config --markdown > docs/settings.md` writes this page.
"""


@dataclass(frozen=True)
class Setting:
    """One setting, by its dotted key."""

    key: str
    type: str
    default: str | None
    """As YAML; None if the setting must be given."""
    meaning: str


@dataclass(frozen=True)
class SectionHelp:
    """A section of the tree, or of a list's items (``clip.growth[]``); "" is the top level."""

    key: str
    meaning: str
    settings: list[Setting]


def describe_settings() -> list[SectionHelp]:
    """All settings of a run, in the order of the tree."""
    return list(_sections(Config, ""))


def as_text() -> str:
    """The list for a terminal."""
    parts = []
    for section in describe_settings():
        parts.append(f"{section.key or 'top level'}: {section.meaning}\n")
        for setting in section.settings:
            default = "" if setting.default is None else f"={setting.default}"
            parts.append(
                f"  {setting.key}{default}   ({setting.type})\n"
                + textwrap.fill(
                    setting.meaning, 96, initial_indent=" " * 6, subsequent_indent=" " * 6
                )
            )
        parts.append("")
    return "\n".join(parts)


def as_markdown() -> str:
    """The list as a page of the documentation."""
    parts = [MARKDOWN_HEAD]
    for section in describe_settings():
        parts += [
            f"## {section.key or 'Top level'}\n\n{section.meaning}\n",
            "| setting | type | default | meaning |\n|---|---|---|---|",
        ]
        parts += [
            f"| `{setting.key}` | {setting.type} "
            f"| {'must be given' if setting.default is None else f'`{setting.default}`'} "
            f"| {setting.meaning} |"
            for setting in section.settings
        ]
        parts.append("")
    return "\n".join(parts)


def _sections(section: type[Section], key: str) -> Iterator[SectionHelp]:
    schema = section.model_json_schema()["properties"]
    prefix = f"{key}." if key else ""
    plain, inner = [], []
    for name, field in section.model_fields.items():
        default = None if field.is_required() else _shown(schema[name].get("default"))
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            inner.append((field.annotation, prefix + name))
            continue
        plain.append(
            Setting(prefix + name, _type_of(schema[name]), default, _one_line(field.description))
        )
        inner += [
            (item, f"{prefix}{name}[]")
            for item in get_args(field.annotation)
            if isinstance(item, type) and issubclass(item, Section)
        ]
    yield SectionHelp(key, _one_line(inspect.getdoc(section)), plain)
    for kind, place in inner:
        yield from _sections(kind, place)


def _type_of(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if any("pattern" in form for form in schema.get("anyOf", ())):
        return "size in bytes, such as 8GiB"
    if forms := schema.get("anyOf", schema.get("oneOf")):
        return " or ".join(map(_type_of, forms))
    if "enum" in schema:
        return " or ".join(map(_shown, schema["enum"]))
    match schema:
        case {"const": value}:
            return _shown(value)
        case {"prefixItems": items}:
            return f"list of {len(items)}: {_type_of(items[0])}"
        case {"$ref": _}:
            return "section"
        case {"items": item}:
            return f"list of: {_type_of(item)}"
        case {"additionalProperties": {"type": _} as value}:
            return f"mapping to: {_type_of(value)}"
        case {"format": "path" | "path or URL" as form}:
            return str(form)
        case {"type": "string"}:
            return "text"
        case {"type": "boolean"}:
            return "true or false"
        case _:
            return f"{schema['type']}{_bounds(schema)}"


def _bounds(schema: dict[str, Any]) -> str:
    low, high = (
        next((f"{word} {_shown(schema[bound])}" for bound, word in ends if bound in schema), "")
        for ends in (
            (("minimum", "from"), ("exclusiveMinimum", "above")),
            (("maximum", "to"), ("exclusiveMaximum", "below")),
        )
    )
    return "".join(f" {end}" for end in (low, high) if end)


def _shown(value: object) -> str:
    """A value as a user types it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
