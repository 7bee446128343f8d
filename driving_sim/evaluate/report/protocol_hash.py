"""Record what an evaluation measures and how, and hash this record.

Two reports can be compared only if their hashes are equal.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from driving_sim.engine.config import load_json, save_json
from driving_sim.engine.errors import DriveSimError

VERSION = 5
"""Version of the evaluation code. Raise it with every change that alters a measured number."""

Kind = Literal["tokenizer", "world-model", "futures"]
_NAMED = {
    "tokenizer": "a tokenizer's report",
    "world-model": "a world model's report",
    "futures": "a report on true futures",
}
_ABSENT = object()
_SHOWN_CHARACTERS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Everything that decides the numbers of an evaluation, except the measured model.

    Raises ValueError or TypeError if the content is not valid JSON. NaN and infinity are not valid.
    """

    content: Mapping[str, Any]
    """JSON content: version, kind, fingerprints of the data, clips, sizes, settings, seeds, ..."""
    hash: str = field(init=False)
    """SHA-256 (hex) of the JSON with sorted keys, no spaces, and floats in Python's repr."""

    def __post_init__(self) -> None:
        # Convert the content to JSON and back, so that it equals the content that `load` reads from
        # a file. Tuples become lists, for example.
        content = json.loads(_canonical(self.content, sort=False))
        object.__setattr__(self, "content", content)
        object.__setattr__(self, "hash", hashlib.sha256(_canonical(content).encode()).hexdigest())

    @classmethod
    def of(cls, kind: Kind, settings: Mapping[str, Any]) -> Self:
        """Return a protocol with these settings, the kind of model and the current version."""
        return cls(content={"version": VERSION, "kind": kind, **settings})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a file that `save` wrote. Raises `DriveSimError` if it was changed after that."""
        written = load_json(path)
        content = written.get("protocol")
        if not isinstance(content, dict) or content.get("kind") not in _NAMED:
            raise DriveSimError(f"{path}: not a report's protocol; name the folder of a report")
        try:
            protocol = cls(content=content)
        except ValueError as error:
            raise DriveSimError(f"{path}: not valid JSON ({error}); evaluate again") from error
        if protocol.hash != written.get("hash"):
            raise DriveSimError(
                f"{path}: the content does not match its hash, so the file was changed after the "
                "evaluation; evaluate again"
            )
        return protocol

    def save(self, path: Path) -> None:
        """Write a JSON file, `{"hash": ..., "protocol": ...}`."""
        save_json(path, {"hash": self.hash, "protocol": self.content})

    @property
    def kind_named(self) -> str:
        """The kind of report that the protocol belongs to, such as "a tokenizer's report"."""
        return _NAMED[self.content["kind"]]

    def differences(self, other: "Protocol") -> list[str]:
        """Return a line for each field that differs, such as `sampling.temperature: 1.0 / 0.8`.

        If the hashes are equal, the list is empty.
        """
        return list(_differences(self.content, other.content, ""))


def _canonical(value: Any, *, sort: bool = True) -> str:
    """Return compact JSON; raise ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=sort, separators=(",", ":"), allow_nan=False)


def _differences(a: Any, b: Any, path: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            below = f"{path}.{key}" if path else key
            yield from _differences(a.get(key, _ABSENT), b.get(key, _ABSENT), below)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (item_a, item_b) in enumerate(zip(a, b, strict=True)):
            yield from _differences(item_a, item_b, f"{path}[{number}]")
    # Compare the JSON texts, because 1 and 1.0 are equal in Python but give different hashes.
    elif _ABSENT in (a, b) or _canonical(a) != _canonical(b):
        yield f"{path}: {_brief(a)} / {_brief(b)}"


def _brief(value: Any) -> str:
    """Return a value as short JSON text. For a list or mapping, return its number of entries."""
    if value is _ABSENT:
        return "absent"
    if isinstance(value, dict | list):
        return f"{len(value)} entries"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
