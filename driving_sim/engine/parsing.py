"""JSON and YAML that somebody else wrote: plain values, at no more cost than the text is worth."""

import json
import re
import reprlib
from typing import Any

import yaml

MOST_YAML_BYTES = 2**20
"""Of a YAML file: far beyond any config, and what its parser, in Python, reads in seconds."""
_MOST_NODES = 100_000
_MOST_DEPTH = 64
_MOST_SHOWN = 300

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class _Loader(yaml.SafeLoader):
    """The safe loader, for texts whose nesting and aliases stay within bounds.

    Aliases count as often as they are used: a few lines of them stand for billions of values.
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
        # An alias within what it stands for has no size yet: it would have no end.
        self._nodes += self._sizes.get(id(node), _MOST_NODES) if is_alias else 1
        self._sizes[id(node)] = self._nodes - before
        if self._nodes > _MOST_NODES:
            raise yaml.YAMLError(f"it holds more than {_MOST_NODES} values, aliases counted")
        return node


class YamlDumper(yaml.SafeDumper):
    """The safe dumper, which quotes the text that `parse_yaml` would take for a number."""


# Text that looks like a date stays text: no setting is one.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 takes 1e-4, without a point or the exponent's sign, for text.
for _class in (_Loader, YamlDumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; `ValueError`, with a reason of one line, where it is none."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(one_line(error)) from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text; `ValueError`, with a reason of one line, where it is none.

    Raises it too for a text that stands for more than 100,000 values or is nested deeper than 64.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    # Values that are not what their tag or form says raise whatever int(), datetime and so on do.
    except Exception as error:
        raise ValueError(one_line(error)) from None


def shown(value: object) -> str:
    """A value as a message shows it: on one line, and short whatever it is."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python prints no integer of over 4300 digits
        return f"a huge {type(value).__name__}"


def one_line(error: object) -> str:
    """What an error says, on one line and not endlessly; its kind where it says nothing.

    Characters that would command a terminal are shown by their numbers.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
