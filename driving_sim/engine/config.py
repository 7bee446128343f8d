"""Configs: frozen dataclasses with checked fields, read from dicts, YAML and `a.b=c` assignments.

The decorator `@config` turns a class into a config. The annotations of its fields say which values
are allowed. pydantic checks every instance, whether it is created in Python or read from a file. An
error message is one line that names the field, the allowed values and the wrong value.
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

_MOST = 2**63 - 1  # largest int64: arrays and file headers cannot store larger integers

Int64 = Annotated[int, Field(ge=-_MOST - 1, le=_MOST)]
"""A signed 64-bit integer."""
Natural = Annotated[int, Field(ge=0, le=_MOST)]
"""An integer of 0 or more."""
Count = Annotated[int, Field(ge=1, le=_MOST)]
"""An integer of 1 or more."""
NonNegative = Annotated[float, Field(ge=0)]
"""A finite number of 0 or more."""
Positive = Annotated[float, Field(gt=0)]
"""A finite number greater than 0."""
Share = Annotated[float, Field(ge=0, le=1)]
"""A number from 0 to 1, both included."""
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
"""A number from 0 (included) to 1 (excluded)."""
InnerShare = Annotated[float, Field(gt=0, lt=1)]
"""A number between 0 and 1, both excluded."""

# Values are not converted, except as JSON requires: lists become tuples, and integers become
# floats.
_RULES = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

_PLAIN_NAME = re.compile(r"[\w./~ -]{1,80}")
_UNKNOWN, _MISSING = "unexpected_keyword_argument", "missing"  # error types of pydantic
_WORDS = {"Input should": "must", "a valid array": "a list", "an object": "a mapping"}


@dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,)
)
def config(cls: type[C]) -> type[C]:
    """Turn a class into a frozen dataclass with slots that checks its fields on creation.

    A value must match the annotation of its field strictly: a bool is not an int, a string is not
    a number, and floats must be finite. To check several fields together, call `require` in
    `__post_init__`. A wrong value raises ValueError.
    """
    checked: Any = checked_dataclass(cls, frozen=True, kw_only=True, slots=True, config=_RULES)
    check_fields = checked.__init__

    @functools.wraps(check_fields)
    def __init__(self: C, **values: Any) -> None:  # noqa: N807
        try:
            check_fields(self, **values)
        except ValidationError as error:
            mistake = _first_mistake(error, checked, values, "")
            raise ValueError(mistake.lstrip(".: ")) from None

    checked.__init__ = __init__
    return typing.cast("type[C]", checked)


def require(config: object, name: str, holds: bool, allowed: str) -> None:
    """Raise ValueError unless `holds` is true.

    The message contains the `name` of the field, its value, and which values are `allowed`.
    """
    if not holds:
        raise ValueError(f"{name}: must be {allowed}, found {shown(getattr(config, name))}")


def from_dict(cls: type[T], values: object, where: str = "config") -> T:
    """Build a dataclass, and the dataclasses nested in it, from dicts, lists and scalars.

    Fields may be bool, int, float, str, Literal, unions, tuples, lists, dicts and dataclasses.
    Raises `DriveSimError` if a key is missing or unknown, or if a value has the wrong type or is
    not allowed. The message contains `where` and the key. For an unknown key, it suggests the
    nearest known key.
    """
    try:
        # Convert to JSON first, because strict pydantic accepts a list as a tuple if it reads
        # JSON, but not if it is given a Python list.
        text = json.dumps(values, ensure_ascii=False, default=_refuse_value).encode("utf-8")
        instance: T = _type_adapter(cls).validate_json(text)
    except ValidationError as error:
        raise DriveSimError(_first_mistake(error, cls, values, where)) from None
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise DriveSimError(f"{where}: {one_line(error)}") from error
    return instance


def to_dict(config: "DataclassInstance") -> dict[str, Any]:
    """Return the config as nested dicts, lists and scalars, which JSON and YAML can store."""
    plain: dict[str, Any] = _type_adapter(type(config)).dump_python(config, mode="json")
    return plain


def resolve(config: T, *, file: Path | None = None, assignments: Sequence[str] = ()) -> T:
    """Return a copy of `config` with the values of a YAML file, and of `a.b=c` assignments.

    Assignments override the file. Their values are parsed as YAML. Raises `DriveSimError` if a
    value is invalid.
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
    """Write indented JSON atomically. Raises ValueError for NaN and infinities."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(mapping, indent=2, allow_nan=False) + "\n", "utf-8")


def load_json(path: Path, *, most_bytes: int | None = None) -> dict[str, Any]:
    """Read a JSON object. Raises `DriveSimError` if the file is missing or is not a JSON object.

    Files larger than `most_bytes` are refused. By default there is no limit, because the index of
    a token store may have millions of entries.
    """
    text = _read_text(path, most_bytes)
    try:
        mapping = parse_json(text)
    except ValueError as error:
        raise DriveSimError(f"{path}: not JSON: {error}") from error
    return _expect_mapping(path, mapping)


def save_yaml(path: Path, mapping: Mapping[str, Any]) -> None:
    """Write YAML atomically, with the keys in the order of `mapping`."""
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.dump(dict(mapping), Dumper=YamlDumper, sort_keys=False), "utf-8")


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping. An empty file counts as an empty mapping."""
    text = _read_text(path, MOST_YAML_BYTES)
    try:
        mapping = parse_yaml(text)
    except ValueError as error:
        raise DriveSimError(f"{path}: not YAML: {error}") from error
    return _expect_mapping(path, {} if mapping is None else mapping)


def _read_text(path: Path, most_bytes: int | None) -> str:
    try:
        with path.open("rb") as file:
            # Devices such as /dev/zero have no end, so only regular files are read without a limit.
            if most_bytes is None and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DriveSimError(f"cannot read {path}: not a file")
            content = file.read(-1 if most_bytes is None else most_bytes + 1)
        if most_bytes is not None and len(content) > most_bytes:
            raise DriveSimError(f"{path}: larger than the limit of {most_bytes} bytes")
        return content.decode("utf-8")
    except (OSError, ValueError) as error:
        # A ValueError means that the text is not UTF-8, or that the path contains a null byte.
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DriveSimError(f"cannot read {path}: {reason}") from error


def _expect_mapping(path: Path, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DriveSimError(f"{path}: expected a mapping, found {type(value).__name__}")
    return value


def _merge(base: Mapping[str, Any], overlay: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in overlay.items():
        base_value = merged.get(key)
        are_mappings = isinstance(value, Mapping) and isinstance(base_value, Mapping)
        merged[key] = _merge(base_value, value) if are_mappings else value  # type: ignore[arg-type]
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
def _type_adapter(cls: type[T]) -> TypeAdapter[T]:
    if "__pydantic_config__" not in vars(cls):  # a plain dataclass: apply the same rules
        cls.__pydantic_config__ = _RULES  # type: ignore[attr-defined]
    return TypeAdapter(cls)


def _refuse_value(value: object) -> None:
    raise ValueError(f"must be a number, text, a list or a mapping, found {shown(value)}")


def _first_mistake(error: ValidationError, cls: type, values: object, where: str) -> str:
    """Return one line that says what is wrong with the first invalid field, and where it is."""
    # A misspelt key often leaves another key missing, so unknown keys are reported first.
    order = {_UNKNOWN: 0, _MISSING: 1}
    first = min(error.errors(include_url=False), key=lambda detail: order.get(detail["type"], 2))
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
        for phrase, replacement in _WORDS.items():
            reason = reason.replace(phrase, replacement)
        message = f"{place}: {one_line(reason)}, found {shown(first['input'])}"
    return message


def _dataclasses_in(hint: Any) -> Iterator[type]:
    """Yield the dataclasses in an annotation, including those in its type arguments."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for part in typing.get_args(hint):
        yield from _dataclasses_in(part)


def _known_keys(cls: type) -> Iterator[str]:
    """Yield every key of a dataclass, and the keys of nested dataclasses in the form `a.b`."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield field.name
        for inner in _dataclasses_in(hints[field.name]):
            yield from (f"{field.name}.{key}" for key in _known_keys(inner))


def _key_name(key: object) -> str:
    """Return a key as messages show it: unchanged if it is a plain name, otherwise quoted."""
    name = key if isinstance(key, str) else shown(key)
    return name if _PLAIN_NAME.fullmatch(name) else shown(name)


def _nearest_key(cls: type, key: str) -> str:
    def likeness(known: str) -> tuple[bool, bool, float, int]:
        last = known.rpartition(".")[2]
        short = _is_shortened(key.replace("_", ""), last.split("_"))
        # An abbreviation such as `ctx` for `context_frames` begins with the same letter and has its
        # letters in the same order.
        letters = iter(last)
        sparse = key[:1] == last[:1] and all(letter in letters for letter in key)
        ratio = difflib.SequenceMatcher(None, key, last).ratio()
        # Of several equally similar keys, the user most likely meant the least nested key.
        return short, sparse, ratio, -known.count(".")

    return max(_known_keys(cls), key=likeness)


def _is_shortened(key: str, words: Sequence[str]) -> bool:
    """Return whether `key` consists of prefixes of `words`, as "lr" does of learning and rate."""
    if not words:
        return not key
    return any(
        _is_shortened(key[length:], words[1:])
        for length in range(len(words[0]) + 1)
        if words[0].startswith(key[:length])
    )
