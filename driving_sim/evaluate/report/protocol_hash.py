"""What an evaluation measures and how, frozen under one hash: equal hashes, comparable results."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from driving_sim.engine.config import load_json, save_json
from driving_sim.engine.errors import DriveSimError

VERSION = 3
"""Of the evaluation: raised by every change that alters a number measured under one protocol."""

Kind = Literal["tokenizer", "world-model"]
_NAMED = {"tokenizer": "a tokenizer's report", "world-model": "a world model's report"}
_ABSENT = object()
_SHOWN_CHARACTERS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Everything that decides what is measured, and nothing of which model it is measured on.

    Raises ValueError or TypeError for content that is not JSON; NaN and infinities are not.
    """

    content: Mapping[str, Any]
    """JSON: version, kind, data fingerprints, clips, sizes, rates, counts, seeds, sampling, ..."""
    hash: str = field(init=False)
    """SHA-256, in hex, of the canonical JSON: keys sorted, no spaces, floats as Python's repr."""

    def __post_init__(self) -> None:
        # Through JSON once: a tuple, or a key that is a number, is what a file would bring back.
        content = json.loads(_canonical(self.content, sort=False))
        object.__setattr__(self, "content", content)
        object.__setattr__(self, "hash", hashlib.sha256(_canonical(content).encode()).hexdigest())

    @classmethod
    def of(cls, kind: Kind, settings: Mapping[str, Any]) -> Self:
        """Return the protocol of these settings under this version of the evaluation."""
        return cls(content={"version": VERSION, "kind": kind, **settings})

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; `DriveSimError` where it was changed since."""
        written = load_json(path)
        content = written.get("protocol")
        if not isinstance(content, dict) or content.get("kind") not in _NAMED:
            raise DriveSimError(f"{path}: not a protocol; name the folder of a report")
        try:
            protocol = cls(content=content)
        except ValueError as error:
            raise DriveSimError(f"{path}: not JSON: {error}; evaluate again") from error
        if protocol.hash != written.get("hash"):
            raise DriveSimError(
                f"{path}: its content does not fit its hash, so it was changed after the "
                "measurement; evaluate again"
            )
        return protocol

    def save(self, path: Path) -> None:
        """Write `{"hash": ..., "protocol": ...}`."""
        save_json(path, {"hash": self.hash, "protocol": self.content})

    @property
    def kind_named(self) -> str:
        """What it is the protocol of, in words."""
        return _NAMED[self.content["kind"]]

    def differences(self, other: "Protocol") -> list[str]:
        """Return the fields that differ: `sampling.temperature: 1.0 / 0.8`; none, equal hashes."""
        return list(_differences(self.content, other.content, ""))


def _canonical(value: Any, *, sort: bool = True) -> str:
    return json.dumps(value, sort_keys=sort, separators=(",", ":"), allow_nan=False)


def _differences(one: Any, other: Any, path: str) -> Iterator[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        for key in sorted(one.keys() | other.keys()):
            below = f"{path}.{key}" if path else key
            yield from _differences(one.get(key, _ABSENT), other.get(key, _ABSENT), below)
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for number, (left, right) in enumerate(zip(one, other, strict=True)):
            yield from _differences(left, right, f"{path}[{number}]")
    # As JSON, for 1 and 1.0 are equal in Python and have other hashes.
    elif _ABSENT in (one, other) or _canonical(one) != _canonical(other):
        yield f"{path}: {_shown(one)} / {_shown(other)}"


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    if isinstance(value, dict | list):
        return f"{len(value)} entries"
    text = json.dumps(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}…"
