import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.report.protocol_hash import Protocol

SETTINGS: dict[str, Any] = {
    "drives": {"track/drive_07": "3f" * 32},
    "clips": [{"drive": "track/drive_07", "start_s": 1.5}, {"drive": "track/drive_07"}],
    "size": [128, 256],
    "fps": 10.0,
    "seed": 0,
    "sampling": {"temperature": 1.0, "top_k": None},
}


def shuffled(value: Any) -> Any:
    """Return the same mapping with its keys in another order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


def leaves(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(value, dict | list):
        return [place]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, item in items for leaf in leaves(item, (*place, key))]


def changed(settings: dict[str, Any], place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(settings))
    inner: Any = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return copy


def test_the_hash_does_not_depend_on_the_order_of_keys() -> None:
    original = Protocol.of("tokenizer", SETTINGS)
    reordered = Protocol.of("tokenizer", shuffled(SETTINGS))
    assert list(original.content) != list(reordered.content)
    assert original.hash == reordered.hash
    assert original.differences(reordered) == []
    tuples = Protocol.of("tokenizer", {**SETTINGS, "size": (128, 256)})
    assert tuples.hash == original.hash


def test_the_hash_is_the_sha256_of_the_canonical_json() -> None:
    # echo -n '{"kind":"tokenizer","seed":0,"version":1}' | sha256sum
    protocol = Protocol(content={"version": 1, "seed": 0, "kind": "tokenizer"})
    assert protocol.hash == "64e1c726e3e922515203d753cc5c66fdb01d2aa4bad9377f9b8527b850e8e7dd"


@pytest.mark.parametrize("place", leaves(SETTINGS), ids=str)
def test_every_field_changes_the_hash_and_is_named(place: tuple[Any, ...]) -> None:
    original = Protocol.of("world-model", SETTINGS)
    edited = Protocol.of("world-model", changed(SETTINGS, place, 77))
    assert original.hash != edited.hash
    (difference,) = original.differences(edited)
    name = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)
    assert difference.startswith(f"{name[1:]}: ")
    assert difference.endswith(" / 77")


def test_kind_and_version_are_part_of_the_hash() -> None:
    world_model = Protocol.of("world-model", SETTINGS)
    tokenizer = Protocol.of("tokenizer", SETTINGS)
    assert world_model.differences(tokenizer) == ['kind: "world-model" / "tokenizer"']
    later = Protocol(content={**world_model.content, "version": 999})
    assert later.hash != world_model.hash


def test_differences_in_words() -> None:
    def differences(**settings: Any) -> list[str]:
        edited = Protocol.of("tokenizer", {**SETTINGS, **settings})
        return Protocol.of("tokenizer", SETTINGS).differences(edited)

    assert differences(sampling={"temperature": 0.8, "top_k": 5}) == [
        "sampling.temperature: 1.0 / 0.8",
        "sampling.top_k: null / 5",
    ]
    assert differences(clips=[]) == ["clips: 2 entries / 0 entries"]
    assert differences(probe=None) == ["probe: absent / null"]
    assert differences(drives={}) == [f'drives.track/drive_07: "{"3f" * 11}3… / absent']
    # 0 and 0.0 are equal numbers, but their JSON differs, and so does the hash.
    assert differences(seed=0.0) == ["seed: 0 / 0.0"]
    assert differences(seed=False) == ["seed: 0 / false"]


def test_round_trip(tmp_path: Path) -> None:
    protocol = Protocol.of("tokenizer", {**SETTINGS, "drives": {"weg\udcff/ä": "00"}})
    protocol.save(tmp_path / "protocol.json")
    assert Protocol.load(tmp_path / "protocol.json") == protocol


def edit_value(written: dict[str, Any]) -> None:
    written["protocol"]["seed"] = 1


def edit_hash(written: dict[str, Any]) -> None:
    written["hash"] = "0" * 64


def add_field(written: dict[str, Any]) -> None:
    written["protocol"]["note"] = "the same, really"


def put_nan(written: dict[str, Any]) -> None:
    written["protocol"]["fps"] = math.nan


def empty(written: dict[str, Any]) -> None:
    written.clear()


@pytest.mark.parametrize("edit", [edit_value, edit_hash, add_field, put_nan, empty])
def test_an_edited_file_is_refused(tmp_path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = tmp_path / "protocol.json"
    Protocol.of("tokenizer", SETTINGS).save(path)
    written = json.loads(path.read_text())
    edit(written)
    path.write_text(json.dumps(written))
    with pytest.raises(DriveSimError, match=r"protocol\.json: .*(evaluate again|name the folder)"):
        Protocol.load(path)


@pytest.mark.parametrize("value", [math.nan, math.inf, object(), {1, 2}])
def test_content_that_is_not_json_is_refused(value: object) -> None:
    with pytest.raises((ValueError, TypeError), match="JSON"):
        Protocol.of("tokenizer", {"value": value})
