"""Configs: frozen dataclasses, checked field by field, to and from dicts, YAML and `a.b=c`.

`@config` makes a class one. Its fields' annotations say what is allowed, and pydantic holds every
instance to them, whether Python makes it or a file: an error is one line that names the field, what
is allowed and what was found.
"""

import dataclasses
import difflib
import functools
import json
import os
import re
import stat
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, dataclass_transform

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.parsing import (
    MOST_YAML_BYTES,
    YamlDumper,
    one_line,
    parse_json,
    parse_yaml,
    shown,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

C = TypeVar("C")
T = TypeVar("T", bound="DataclassInstance")

_MOST = 2**63 - 1  # what an array, or a file's header, can hold

Int64 = Annotated[int, Field(ge=-_MOST - 1, le=_MOST)]
"""A whole number of 64 bits."""
Natural = Annotated[int, Field(ge=0, le=_MOST)]
"""A whole number, 0 or more."""
Count = Annotated[int, Field(ge=1, le=_MOST)]
"""A whole number, 1 or more."""
NonNegative = Annotated[float, Field(ge=0)]
"""A number, 0 or more."""
Positive = Annotated[float, Field(gt=0)]
"""A number above 0."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1."""
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A number from 0 to below 1."""
InnerShare = Annotated[float, Field(gt=0, lt=1)]
"""A number between 0 and 1, neither of them."""

# Nothing is converted but what JSON cannot tell apart: lists to tuples, whole numbers to floats.
_RULES = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

_PLAIN_NAME = re.compile(r"[\w./~ -]{1,80}")
_UNKNOWN, _MISSING = "unexpected_keyword_argument", "missing"  # pydantic's kinds of errors
_WORDS = {"Input should": "must", "a valid array": "a list", "an object": "a mapping"}


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
def config(cls: type[C]) -> type[C]:
    """Make a class a frozen dataclass with slots, whose fields are checked when it is made.

    They hold what their annotations say, strictly: no bool for an int, no text for a number, and
    only finite floats. `__post_init__` checks what concerns several of them, by `require`. Raises
    ValueError.
    """
    made: Any = checked_dataclass(cls, frozen=True, kw_only=True, slots=True, config=_RULES)
    check_fields = made.__init__

    @functools.wraps(check_fields)
    def __init__(self: C, **values: Any) -> None:  # noqa: N807
        try:
            check_fields(self, **values)
        except ValidationError as error:
            mistake = _mistake(error, made, values, "")
            raise ValueError(mistake.lstrip(".: ")) from None

    made.__init__ = __init__
    return typing.cast("type[C]", made)


def require(config: object, name: str, holds: bool, allowed: str) -> None:
    """Raise ValueError, which names the field and what it must be, unless its value `holds`."""
    if not holds:
        raise ValueError(f"{name}: must be {allowed}, found {shown(getattr(config, name))}")


def from_dict(cls: type[T], values: object, where: str = "config") -> T:
    """Build a dataclass, nested ones included, from plain values.

    Understands what JSON holds: bool, int, float, str, Literal, unions, tuples, lists, dicts and
    dataclasses. Raises `DriveSimError` naming `where` and the key for an unknown key (with the
    nearest known one), a missing one, a wrong type, and a value that is not allowed.
    """
    try:
        # As JSON, for then pydantic takes lists for tuples and is strict all the same.
        text = json.dumps(values, ensure_ascii=False, default=_refuse).encode("utf-8")
        made: T = _reader(cls).validate_json(text)
    except ValidationError as error:
        raise DriveSimError(_mistake(error, cls, values, where)) from None
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise DriveSimError(f"{where}: {one_line(error)}") from error
    return made


def to_dict(config: "DataclassInstance") -> dict[str, Any]:
    """The config as nested dicts, lists and scalars: what JSON and YAML can hold."""
    plain: dict[str, Any] = _reader(type(config)).dump_python(config, mode="json")
    return plain


def resolve(config: T, *, file: Path | None = None, assignments: Sequence[str] = ()) -> T:
    """Overlay a YAML file, then `a.b=c` assignments (values read as YAML), on a preset.

    Raises `DriveSimError` naming the file or the assignment.
    """
    if file is not None:
        merged = _merge(to_dict(config), load_yaml(file))
        config = from_dict(type(config), merged, where=str(file))
    if assignments:
        values = to_dict(config)
        for assignment in assignments:
            values = _merge(values, _parse_assignment(assignment))
        config = from_dict(type(config), values, where="`assignments`")
    return config


def save_json(path: Path, mapping: Mapping[str, Any]) -> None:
    """Write readable JSON atomically; NaN and infinities, which JSON lacks, are a `ValueError`."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(mapping, indent=2, allow_nan=False) + "\n", "utf-8")


def load_json(path: Path, *, most_bytes: int | None = None) -> dict[str, Any]:
    """Read a JSON object; `DriveSimError` where the file is missing or holds something else.

    `most_bytes` refuses larger files; without it any is read, as an index may list millions.
    """
    text = _read_text(path, most_bytes)
    try:
        mapping = parse_json(text)
    except ValueError as error:
        raise DriveSimError(f"{path}: not JSON: {error}") from error
    return _expect_mapping(path, mapping)


def save_yaml(path: Path, mapping: Mapping[str, Any]) -> None:
    """Write YAML atomically, keys in their own order."""
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.dump(dict(mapping), Dumper=YamlDumper, sort_keys=False), "utf-8")


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; an empty file is an empty one."""
    text = _read_text(path, MOST_YAML_BYTES)
    try:
        mapping = parse_yaml(text)
    except ValueError as error:
        raise DriveSimError(f"{path}: not YAML: {error}") from error
    return _expect_mapping(path, {} if mapping is None else mapping)


def _read_text(path: Path, most_bytes: int | None) -> str:
    try:
        with path.open("rb") as file:
            # A device may have no end; a pipe (the shell's `<(...)`) has one.
            if most_bytes is None and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DriveSimError(f"cannot read {path}: not a file")
            content = file.read(-1 if most_bytes is None else most_bytes + 1)
        if most_bytes is not None and len(content) > most_bytes:
            raise DriveSimError(f"{path}: larger than the {most_bytes} bytes that it may have")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DriveSimError(f"cannot read {path}: {reason}") from error


def _expect_mapping(path: Path, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DriveSimError(f"{path}: expected a mapping, found {type(value).__name__}")
    return value


def _merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overlay.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = _merge(below, value) if both else value  # type: ignore[arg-type]
    return merged


def _parse_assignment(assignment: str) -> dict[str, Any]:
    path, equals, text = assignment.partition("=")
    keys = [key.strip() for key in path.split(".")]
    if not equals or not all(keys):
        raise DriveSimError(f"`assignments` {one_line(assignment)}: expected key.key=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise DriveSimError(
            f"`assignments` {one_line(assignment)}: the value is not YAML: {error}"
        ) from error
    for key in reversed(keys):
        value = {key: value}
    return typing.cast("dict[str, Any]", value)


@functools.cache
def _reader(cls: type[T]) -> TypeAdapter[T]:
    if "__pydantic_config__" not in vars(cls):  # a plain dataclass is read by the same rules
        cls.__pydantic_config__ = _RULES  # type: ignore[attr-defined]
    return TypeAdapter(cls)


def _refuse(value: object) -> None:
    raise ValueError(f"must be a number, text, a list or a mapping, found {shown(value)}")


def _mistake(error: ValidationError, cls: type, values: object, where: str) -> str:
    """Say in one line what is wrong with the first field at fault, and where it is."""
    # A misspelt key is also one that is missing: how it is spelt comes first.
    order = {_UNKNOWN: 0, _MISSING: 1}
    first = min(error.errors(include_url=False), key=lambda each: order.get(each["type"], 2))
    owner, name, parent, place = cls, "", where, where
    for step in first["loc"]:
        if isinstance(values, Mapping):
            owner = next(_dataclasses_in(typing.get_type_hints(owner).get(name)), owner)
            name, parent, values = str(step), place, values.get(step)
            place = f"{parent}.{_key_name(name)}"
        elif isinstance(values, list | tuple) and isinstance(step, int):
            place, values = f"{place}[{step}]", values[step] if step < len(values) else None
    if first["type"] == _UNKNOWN:
        nearest = _nearest_key(owner, name)
        message = f"{parent}: unknown key '{_key_name(name)}'; the nearest one is '{nearest}'"
    elif first["type"] == _MISSING:
        message = f"{place} is missing"
    elif first["type"] == "value_error":
        message = f"{place}.{one_line(first['ctx']['error'])}"
    else:
        reason = first["msg"]
        for theirs, ours in _WORDS.items():
            reason = reason.replace(theirs, ours)
        message = f"{place}: {one_line(reason)}, found {shown(first['input'])}"
    return message


def _dataclasses_in(hint: Any) -> Iterator[type]:
    """The dataclasses among an annotation and its parts."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _dataclasses_in(part)


def _known_keys(cls: type) -> Iterator[str]:
    """Every key of a dataclass and, dotted, of the ones in it."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield field.name
        for inner in _dataclasses_in(hints[field.name]):
            yield from (f"{field.name}.{key}" for key in _known_keys(inner))


def _key_name(key: object) -> str:
    """A key that a file named, as messages show it: few are more than a plain name."""
    name = key if isinstance(key, str) else shown(key)
    return name if _PLAIN_NAME.fullmatch(name) else shown(name)


def _nearest_key(cls: type, key: str) -> str:
    def likeness(known: str) -> tuple[bool, bool, float, int]:
        last = known.rpartition(".")[2]
        short = _is_shortened(key.replace("_", ""), last.split("_"))
        # `ctx` for `context_frames`: letters left out, but not the first.
        letters = iter(last)
        sparse = key[:1] == last[:1] and all(letter in letters for letter in key)
        ratio = difflib.SequenceMatcher(None, key, last).ratio()
        # Of equally near ones the shallowest: it is what was most likely meant.
        return short, sparse, ratio, -known.count(".")

    return max(_known_keys(cls), key=likeness)


def _is_shortened(key: str, words: Sequence[str]) -> bool:
    """Whether `key` is made of beginnings of some of the words, in order, as `lr` is."""
    if not words:
        return not key
    return any(
        _is_shortened(key[taken:], words[1:])
        for taken in range(len(words[0]) + 1)
        if words[0].startswith(key[:taken])
    )
