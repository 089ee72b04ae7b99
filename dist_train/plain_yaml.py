"""A subset of YAML for settings: mappings, lists and plain values, read literally.

PyYAML reads YAML 1.1: ``010`` is 8, ``1_000`` is 1000, ``12:30`` is 750, ``no`` is false, ``1e-3``
is a string, and the last of two equal keys wins. Here plain values follow the YAML 1.2 core schema
in decimal. Duplicate keys, aliases, tags, merge keys and deep nesting are refused.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from dist_train.errors import ConfigError
from dist_train.system.advice import blame_machine

#: Settings are a few kilobytes; a larger file is something else.
MOST_BYTES = 2**18
DEEPEST = 12

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

#: (tag, pattern) by the first character of the value, the form that PyYAML needs.
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _name, _pattern, _characters in _PLAIN:
    for _character in _characters:
        _RESOLVERS.setdefault(_character, []).append(
            (f"tag:yaml.org,2002:{_name}", re.compile(rf"(?:{_pattern})\Z"))
        )


class _Reader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            self._refuse("an alias ('*name') is not allowed")
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            self._refuse(f"a tag ('{event.tag}') is not allowed")
        self._depth += 1
        if self._depth > DEEPEST:
            self._refuse(f"nested deeper than {DEEPEST} levels")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem="a key must be a name", problem_mark=key.start_mark
                )
            if key.value in first:
                raise yaml.MarkedYAMLError(
                    problem=f"'{key.value}' is given already on line {first[key.value]}; "
                    "write it once",
                    problem_mark=key.start_mark,
                )
            first[key.value] = line
        return {key.value: self.construct_object(value, deep=True) for key, value in node.value}

    def _refuse(self, what: str) -> None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)


class _Writer(yaml.SafeDumper):
    """Quotes strings that ``_Reader`` would read as another type."""

    yaml_implicit_resolvers = _RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _construct_map(reader: _Reader, node: Any) -> dict[Any, Any]:
    return reader.construct_mapping(node)


_Reader.add_constructor("tag:yaml.org,2002:map", _construct_map)


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
        what = error.problem or error.context or "malformed"
        place = "" if mark is None else f"line {mark.line + 1}: "
        raise ValueError(f"{place}{what}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def read_yaml(path: Path) -> Any:
    """``parse_yaml`` of a regular file of at most ``MOST_BYTES``.

    Raises:
        ConfigError: the file cannot be read, is too large, not regular, or not valid YAML.
        MachineError: the machine is at fault (see ``blame_machine``).
    """
    try:
        # Non-blocking, as opening a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        blame_machine(error, path)
        raise ConfigError(f"cannot be read ({_reason(error)})", where=path) from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConfigError(
                "is no plain file", where=path, fix="Give the path of a YAML file of settings."
            )
        # For so few bytes one call reads the whole of a regular file.
        content = os.read(descriptor, MOST_BYTES + 1)
    except OSError as error:
        blame_machine(error, path)
        raise ConfigError(f"cannot be read ({_reason(error)})", where=path) from None
    finally:
        os.close(descriptor)
    if len(content) > MOST_BYTES:
        raise ConfigError(
            f"is larger than {MOST_BYTES // 2**10} KiB, so it is no file of settings", where=path
        )
    try:
        return parse_yaml(content.decode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"is not valid YAML ({error})", where=path) from None


def yaml_text(tree: dict[str, Any]) -> str:
    """The YAML text of a tree; ``parse_yaml`` reads it as the same tree."""
    return yaml.dump(tree, Dumper=_Writer, sort_keys=False)


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
