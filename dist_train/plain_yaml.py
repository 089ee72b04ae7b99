"""YAML for settings: mappings, lists and plain values, read literally.

PyYAML reads YAML 1.1: ``010`` is 8, ``1_000`` is 1000, ``12:30`` is 750, ``no`` is false, ``1e-3``
is a string, and the last of two equal keys wins. Here plain values follow the YAML 1.2 core schema
in decimal, and duplicate keys, aliases and tags are refused.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from dist_train.errors import ConfigError, FileError
from dist_train.files import read_plain

#: Settings are a few kilobytes; a larger file is something else.
MOST_BYTES = 2**18


class _Reader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            raise _refused("an alias ('*name') is not allowed", event)
        if event.tag is not None:
            raise _refused(f"a tag ('{event.tag}') is not allowed", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _refused("a key must be a name", key)
            if key.value in first:
                line = first[key.value]
                raise _refused(f"'{key.value}' is already on line {line}; write it once", key)
            first[key.value] = key.start_mark.line + 1
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}


class _Writer(yaml.SafeDumper):
    """Quotes strings that ``_Reader`` would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _refused(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


_Reader.add_constructor("tag:yaml.org,2002:map", _Reader.construct_mapping)

#: Type, pattern, and the characters that its values can begin with.
_PLAIN = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    # 19 digits suffice for every setting; Python refuses to parse thousands.
    ("int", r"[-+]?(?:0|[1-9][0-9]{0,18})", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)\.[0-9]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?(?:0|[1-9][0-9]*)[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL", "~nN"),
)
for _kind in (_Reader, _Writer):
    _kind.yaml_implicit_resolvers = {}
    for _name, _pattern, _characters in _PLAIN:
        _tag, _compiled = f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z")
        _kind.add_implicit_resolver(_tag, _compiled, list(_characters))


def parse_yaml(text: str) -> Any:
    """Parse a YAML document into dicts, lists, strings, bools, decimal ints, floats and None.

    An empty document is None. A missing value is the empty string.

    Raises:
        ValueError: the document is invalid. The message is one line, with the line number.
    """
    try:
        return yaml.load(text, _Reader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f"line {mark.line + 1}: "
        raise ValueError(f"{place}{error.problem or error.context or 'malformed'}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_yaml(path: Path) -> Any:
    """``parse_yaml`` of a regular file of at most ``MOST_BYTES``.

    Raises:
        ConfigError: the file cannot be read, is too large, not regular, or not valid YAML.
        MachineError: the machine is at fault (see ``blame_machine``).
    """
    try:
        return parse_yaml(read_plain(path, most_bytes=MOST_BYTES).decode("utf-8"))
    except FileError as error:
        raise ConfigError(error.what, where=path) from None
    except ValueError as error:
        raise ConfigError(f"is not valid YAML ({error})", where=path) from None


def yaml_text(tree: dict[str, Any]) -> str:
    """The YAML text of a tree; ``parse_yaml`` reads it as the same tree."""
    return yaml.dump(tree, Dumper=_Writer, sort_keys=False)
