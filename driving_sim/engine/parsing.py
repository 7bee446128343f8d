"""Parse JSON and YAML from untrusted files, and shorten values and errors for messages."""

import json
import re
import reprlib
from typing import Any

import yaml

MOST_YAML_BYTES = 2**20
"""Maximum size of a YAML file. Configs are far smaller, and PyYAML reads this much in seconds."""
_MOST_NODES = 100_000
_MOST_DEPTH = 64
_MOST_SHOWN = 300

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class _Loader(yaml.SafeLoader):
    """A `yaml.SafeLoader` with limits on the nesting depth and on the number of values.

    Each use of an alias counts as many values as the alias stands for, because a few lines of
    nested aliases can stand for billions of values.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._nodes = self._depth = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        is_alias, before = self.check_event(yaml.AliasEvent), self._nodes
        self._depth += 1
        if self._depth > _MOST_DEPTH:
            raise yaml.YAMLError("it is nested too deeply")
        node = super().compose_node(parent, index)
        self._depth -= 1
        # An alias inside its own value would be infinitely large. Its size is not in `_sizes` yet,
        # so count the maximum.
        self._nodes += self._sizes.get(id(node), _MOST_NODES) if is_alias else 1
        self._sizes[id(node)] = self._nodes - before
        if self._nodes > _MOST_NODES:
            raise yaml.YAMLError(f"it contains more than {_MOST_NODES} values, including aliases")
        return node


class YamlDumper(yaml.SafeDumper):
    """A `yaml.SafeDumper` that quotes strings which `parse_yaml` would read as numbers."""


# Strings that look like dates stay strings, because no setting is a date.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 treats 1e-4 (no decimal point) and 1.0e4 (no sign) as strings. Treat them as numbers.
for _class in (_Loader, YamlDumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text. Raises ValueError with a one-line reason if the text is invalid."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(one_line(error)) from None


def parse_yaml(text: str) -> Any:
    """Parse a YAML text. Raises ValueError with a one-line reason if the text is invalid.

    Also refuses texts with more than 100,000 values (aliases expanded) or 64 nested levels.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    # PyYAML converts values to the type of their tag. Wrong values can raise any kind of error.
    except Exception as error:
        raise ValueError(one_line(error)) from None


def shown(value: object) -> str:
    """Return a value as messages show it: on one line, and shortened if it is long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python refuses to print integers with more than 4300 digits
        return f"a huge {type(value).__name__}"


def one_line(error: object) -> str:
    """Return an error's message as one line of limited length, or its type if it has no message.

    Unprintable characters are escaped, because they could control the terminal.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
