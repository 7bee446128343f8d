"""Configs: frozen dataclasses to and from nested dicts, YAML files and `a.b=c` assignments."""

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union

import yaml

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_file

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def from_dict(cls: type[T], values: object, where: str = "config") -> T:
    """Build a dataclass, nested ones included, from plain values.

    Understands bool, int, float, str, Path, Literal, unions with None, tuples, lists, dicts and
    dataclasses. Raises `DriveSimError` naming `where` and the key for an unknown key (with the
    nearest known one), a missing one, a wrong type, and a value that `__post_init__` refuses.
    """
    if not isinstance(values, Mapping):
        raise DriveSimError(f"{where}: expected a mapping of options, found {values!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in values:
        if key not in fields:
            nearest = _nearest_key(cls, str(key))
            raise DriveSimError(f"{where}: unknown key '{key}'; the nearest one is '{nearest}'")
    for name, field in fields.items():
        if name not in values and _is_required(field):
            raise DriveSimError(f"{where}: '{name}' is missing")
    converted = {
        name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()
    }
    try:
        return cls(**converted)
    except ValueError as error:
        raise DriveSimError(f"{where}: {error}") from error


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


def load_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; `DriveSimError` where the file is missing or holds something else."""
    text = _read_text(path)
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError as error:
        raise DriveSimError(f"{path}: not JSON: {error}") from error
    return _expect_mapping(path, mapping)


def save_yaml(path: Path, mapping: Mapping[str, Any]) -> None:
    """Write YAML atomically, keys in their own order."""
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(dict(mapping), sort_keys=False), "utf-8")


def load_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; an empty file is an empty one."""
    text = _read_text(path)
    try:
        mapping = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DriveSimError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return _expect_mapping(path, {} if mapping is None else mapping)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
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
        raise DriveSimError(f"--set {assignment}: expected key.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DriveSimError(f"--set {assignment}: the value is not YAML") from error
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


def _nearest_key(cls: type, key: str) -> str:
    def likeness(known: str) -> tuple[float, int]:
        last = known.rpartition(".")[2]
        # Of equally near ones the shallowest: it is what was most likely meant.
        return difflib.SequenceMatcher(None, key, last).ratio(), -known.count(".")

    return max(_known_keys(cls), key=likeness)


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
        raise DriveSimError(f"{where}: found {value!r}, expected one of {choices}")
    return value


def _convert_sequence(hint: Any, value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise DriveSimError(f"{where}: expected a list, found {value!r}")
    origin, arms = typing.get_origin(hint), typing.get_args(hint)
    if origin is list or arms[-1] is Ellipsis:
        arms = (arms[0],) * len(value)
    if len(arms) != len(value):
        raise DriveSimError(f"{where}: expected {len(arms)} values, found {len(value)}")
    items = zip(arms, value, strict=True)
    return origin(_convert(arm, item, f"{where}[{i}]") for i, (arm, item) in enumerate(items))


def _convert_dict(hint: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise DriveSimError(f"{where}: expected a mapping, found {value!r}")
    arm = typing.get_args(hint)[1]
    return {str(key): _convert(arm, item, f"{where}.{key}") for key, item in value.items()}


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is Any:
        return value
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML 1.1 reads 1e-4, without a point, as a string
        except ValueError:
            pass
    elif type(value) is hint:
        return value
    name = getattr(hint, "__name__", str(hint))
    raise DriveSimError(f"{where}: expected {name}, found {value!r}")
