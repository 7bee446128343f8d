"""Configs: frozen dataclasses to and from nested dicts, YAML files and `a.b=c` assignments."""

import dataclasses
import difflib
import json
import math
import os
import re
import stat
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

import yaml

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file
from driving_sim.engine.parsing import MOST_YAML_BYTES, one_line, parse_json, parse_yaml, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

_SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which no file can hold
_PLAIN_NAME = re.compile(r"[\w./~ -]{1,80}")


def from_dict(cls: type[T], values: object, where: str = "config") -> T:
    """Build a dataclass, nested ones included, from plain values.

    Understands bool, int, float, str, Path, Literal, unions with None, tuples, lists, dicts and
    dataclasses. Raises `DriveSimError` naming `where` and the key for an unknown key (with the
    nearest known one), a missing one, a wrong type, and a value that `__post_init__` refuses.
    """
    if not isinstance(values, Mapping):
        raise DriveSimError(f"{where}: expected a mapping of options, found {shown(values)}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            name = _key_name(key)
            nearest = _nearest_key(cls, name)
            raise DriveSimError(f"{where}: unknown key '{name}'; the nearest one is '{nearest}'")
    for name, field in fields.items():
        if name not in values and _is_required(field):
            raise DriveSimError(f"{where}: '{name}' is missing")
    converted = {
        name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()
    }
    try:
        return cls(**converted)
    except (ValueError, ArithmeticError) as error:
        raise DriveSimError(f"{where}: {one_line(error)}") from error


def to_dict(config: "DataclassInstance") -> dict[str, Any]:
    """The config as nested dicts, lists and scalars: what JSON and YAML can hold."""
    return {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.init
    }


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
        config = from_dict(type(config), values, where="--set")
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
        temporary.write_text(yaml.safe_dump(dict(mapping), sort_keys=False), "utf-8")


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
        raise DriveSimError(f"--set {one_line(assignment)}: expected key.key=value")
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise DriveSimError(
            f"--set {one_line(assignment)}: the value is not YAML: {error}"
        ) from error
    for key in reversed(keys):
        value = {key: value}
    return typing.cast("dict[str, Any]", value)


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def _known_keys(cls: type) -> Iterator[str]:
    """Every key of a dataclass and, dotted, of the ones in it."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield field.name
        for arm in (hints[field.name], *typing.get_args(hints[field.name])):
            if isinstance(arm, type) and dataclasses.is_dataclass(arm):
                yield from (f"{field.name}.{key}" for key in _known_keys(arm))


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


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if origin in (Union, types.UnionType):
        return _convert_union(hint, value, where)
    if origin is Literal:
        return _convert_literal(hint, value, where)
    if origin in (tuple, list):
        return _convert_sequence(hint, value, where)
    if origin is dict:
        return _convert_dict(hint, value, where)
    return _convert_scalar(hint, value, where)


def _convert_union(hint: Any, value: Any, where: str) -> Any:
    arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
    if value is None and len(arms) < len(typing.get_args(hint)):
        return None
    # An arm of the value's own type first: 3 stays an int in `float | int`.
    arms.sort(key=lambda arm: arm is not type(value))
    for arm in arms[:-1]:
        try:
            return _convert(arm, value, where)
        except DriveSimError:
            continue
    return _convert(arms[-1], value, where)


def _convert_literal(hint: Any, value: Any, where: str) -> Any:
    allowed = typing.get_args(hint)
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise DriveSimError(f"{where}: found {shown(value)}, expected one of {choices}")
    return value


def _convert_sequence(hint: Any, value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise DriveSimError(f"{where}: expected a list, found {shown(value)}")
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is list or arms[-1] is Ellipsis:
        arms = (arms[0],) * len(value)
    if len(arms) != len(value):
        raise DriveSimError(f"{where}: expected {len(arms)} values, found {len(value)}")
    items = zip(arms, value, strict=True)
    return origin(_convert(arm, item, f"{where}[{i}]") for i, (arm, item) in enumerate(items))


def _convert_dict(hint: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise DriveSimError(f"{where}: expected a mapping, found {shown(value)}")
    arm = typing.get_args(hint)[1]
    items = ((key if isinstance(key, str) else shown(key), item) for key, item in value.items())
    return {key: _convert(arm, item, f"{where}.{_key_name(key)}") for key, item in items}


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is Path and isinstance(value, str | Path) and "\0" not in str(value):
        return Path(value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return _finite(value, where)
    if type(value) is hint and _is_usable(value):
        return value
    name = getattr(hint, "__name__", str(hint))
    raise DriveSimError(f"{where}: expected {name}, found {shown(value)}")


def _is_usable(value: Any) -> bool:
    """Whether a value of the right type can be counted with, or written: JSON may hold others."""
    if isinstance(value, str):
        return not _SURROGATE.search(value)
    return not isinstance(value, int) or abs(value) < 2**63


def _finite(value: float | str, where: str) -> float:
    try:
        number = float(value)  # YAML 1.1 reads 1e-4, without a point, as a string
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DriveSimError(f"{where}: expected float, found {shown(value)}")
    return number
