import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from driving_sim.data.tokens.index import frame_bytes, shard_name
from driving_sim.data.tokens.plan import PlannedDrive, StorePlan
from driving_sim.data.tokens.store import StoreInfo, TokenStore, column_forms
from driving_sim.data.tokens.writer import TokenStoreWriter
from driving_sim.engine.errors import DriveSimError
from tests import ROOT

INFO = StoreInfo(
    tokenizer_fingerprint="f00d",
    rows=2,
    cols=3,
    codebook_size=50,
    fps=10.0,
    steering_kind="road_wheel",
    levels=(5, 10),
    height=32,
    width=48,
    every=2,
)
OTHER_INFO = {"tokenizer_fingerprint": "beef", "every": 3, "steering_kind": "curvature"}
COLUMNS = column_forms(INFO, [1])
LENGTHS = {"a": 5, "b/left": 7, "long": 23, "c": 4, "d": 6}


def make_plan(frames_per_shard: int = 10, **changes: Any) -> StorePlan:
    return StorePlan(
        info=replace(INFO, **changes),
        drives=tuple(PlannedDrive(id=name, frames=n) for name, n in LENGTHS.items()),
        shard_bytes=frames_per_shard * frame_bytes(INFO.rows, INFO.cols),
    )


def arrays(name: str) -> dict[str, Any]:
    """Return the content of a drive, which depends only on its name."""
    n = LENGTHS[name]
    rng = np.random.default_rng(list(name.encode()))
    return {
        "tokens": rng.integers(0, INFO.codebook_size, (n, INFO.rows, INFO.cols)).astype(np.uint16),
        "actions": rng.normal(size=(n, 2)).astype(np.float32),
        "action_valid": np.ones((n, 2), bool),
        "timestamps": np.arange(n) / INFO.fps,
        "segments": [(0, n)],
    }


def write(out: Path, plan: StorePlan | None = None, skip: tuple[str, ...] = ()) -> TokenStore:
    with TokenStoreWriter(out, plan or make_plan()) as writer:
        for name in LENGTHS:
            if writer.done(name):
                continue
            if name in skip:
                writer.skip(name, f"/secret/place/{name}.mp4: bad")
            else:
                writer.add(name, **arrays(name))
        writer.finish()
    return TokenStore(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def joined(store: TokenStore, name: str, column: str) -> np.ndarray[Any, Any]:
    return np.concatenate([getattr(drive, column) for drive in store.select([name])])


def test_reading_gives_what_was_written(tmp_path: Path) -> None:
    store = write(tmp_path / "tokens")
    assert store.info == INFO
    assert store.drive_ids == tuple(LENGTHS)
    for name in LENGTHS:
        content = arrays(name)
        for column in set(COLUMNS) - {"offsets"}:
            expected = content[column]
            np.testing.assert_array_equal(joined(store, name, column), expected)
    assert store.index.frames == sum(LENGTHS.values())
    assert store.index.drives == len(LENGTHS)
    store.verify()


def test_views_are_read_only(tmp_path: Path) -> None:
    drive = write(tmp_path / "tokens").drives[0]
    with pytest.raises(ValueError, match="read-only"):
        drive.tokens[0] = 0


def test_drives_share_shards_and_only_a_long_one_is_split(tmp_path: Path) -> None:
    store = write(tmp_path / "tokens")
    shards = [[(d.id, d.start, d.frames) for d in s.drives] for s in store.index.shards]
    assert shards == [
        [("a", 0, 5)],
        [("b/left", 0, 7)],
        [("long", 0, 10)],
        [("long", 10, 10)],
        [("long", 20, 3), ("c", 0, 4)],
        [("d", 0, 6)],
    ]


def test_the_safetensors_library_reads_a_shard(tmp_path: Path) -> None:
    write(tmp_path / "tokens")
    tensors = load_file(tmp_path / "tokens" / shard_name(4))
    assert set(tensors) == set(COLUMNS)
    np.testing.assert_array_equal(tensors["offsets"], [0, 3, 7])
    np.testing.assert_array_equal(tensors["tokens"][3:], arrays("c")["tokens"])


def test_a_gap_in_time_is_in_the_index(tmp_path: Path) -> None:
    content = arrays("d")
    content["segments"] = [(0, 3), (3, 6)]
    plan = StorePlan(info=INFO, drives=(PlannedDrive(id="d", frames=6),))
    with TokenStoreWriter(tmp_path / "tokens", plan) as writer:
        writer.add("d", **content)
        writer.finish()
    assert TokenStore(tmp_path / "tokens").drives[0].entry.segments == ((0, 3), (3, 6))


def test_invalid_actions_are_zero(tmp_path: Path) -> None:
    content = arrays("d")
    content["action_valid"][2, 1] = False
    content["actions"][2, 1] = np.nan
    plan = StorePlan(info=INFO, drives=(PlannedDrive(id="d", frames=6),))
    with TokenStoreWriter(tmp_path / "tokens", plan) as writer:
        writer.add("d", **content)
        writer.finish()
    assert TokenStore(tmp_path / "tokens").drives[0].actions[2, 1] == 0


def test_a_skipped_drive_changes_only_its_own_shard(tmp_path: Path) -> None:
    complete, short = write(tmp_path / "complete"), write(tmp_path / "short", skip=("c",))
    (skipped,) = short.index.skipped
    assert (skipped.id, skipped.reason) == ("c", "c.mp4: bad")
    assert "/secret" not in (tmp_path / "short" / "index.json").read_text()
    assert "c" not in short.drive_ids
    pairs = zip(complete.index.shards, short.index.shards, strict=True)
    assert [with_c == without_c for with_c, without_c in pairs] == [
        number != 4 for number in range(6)
    ]


def test_a_shard_of_skipped_drives_is_empty(tmp_path: Path) -> None:
    store = write(tmp_path / "tokens", make_plan(frames_per_shard=7), skip=("b/left", "d"))
    assert [len(shard.drives) for shard in store.index.shards].count(0) == 2
    assert store.drive_ids == ("a", "long", "c")
    for name in store.drive_ids:
        assert np.array_equal(
            np.concatenate([drive.tokens for drive in store.select([name])]),
            arrays(name)["tokens"],
        )


@pytest.mark.parametrize(
    ("reason", "kept"),
    [
        ("/home/me/drives/left.mp4: bad", "left.mp4: bad"),
        ("/home/my own drives/b/left.mp4: bad,\nas it is", "left.mp4: bad, as it is"),
        ("left.csv (of /a/b/left.mp4): 20 km/h or 1/2", "left.csv (of left.mp4): 20 km/h or 1/2"),
        ("'/a/other.csv': no", "'other.csv': no"),
        (r"C:\Users\me\left.mp4: bad", "left.mp4: bad"),
        ("videos/left.mp4: bad", "videos/left.mp4: bad"),
    ],
)
def test_no_absolute_path_gets_into_the_index(tmp_path: Path, reason: str, kept: str) -> None:
    plan = StorePlan(
        info=INFO,
        drives=(PlannedDrive(id="a", frames=5), PlannedDrive(id="b/left", frames=7)),
    )
    with TokenStoreWriter(tmp_path / "tokens", plan) as writer:
        writer.add("a", **arrays("a"))
        writer.skip("b/left", reason)
        assert writer.finish().skipped[0].reason == kept


def test_the_order_in_which_drives_are_added_does_not_change_the_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one")
    with TokenStoreWriter(tmp_path / "two", make_plan()) as writer:
        for name in reversed(LENGTHS):
            writer.add(name, **arrays(name))
        writer.finish()
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.data.tokens.test_store import write

root = Path(sys.argv[1])
changes = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
step = limit = 0

def hook(event, arguments):
    global step
    step += event in changes
    if step == limit and event in changes:
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
limit = -1
write(root / "whole", skip=("c",))
total, step = step, 0
for limit in range(1, total + 1):
    if not (child := os.fork()):
        write(root / f"killed-{limit}", skip=("c",))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


def run_script(script: str, folder: Path) -> str:
    return subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=True,
    ).stdout


def test_a_writer_killed_at_any_step_can_be_continued_to_the_same_bytes(tmp_path: Path) -> None:
    # The script runs the writer once for each change to the folder. The process kills itself just
    # before that change.
    run_script(KILLED, tmp_path)
    expected = contents(tmp_path / "whole")
    assert set(expected) == {"index.json", *(shard_name(n) for n in range(6))}
    killed = sorted(tmp_path.glob("killed-*"))
    assert len(killed) > 30
    for out in killed:
        if (out / "index.json").exists():  # only the deletion of temporary files is missing
            with pytest.raises(DriveSimError, match="finished"):
                write(out, skip=("c",))
        else:
            write(out, skip=("c",))
        assert contents(out) == expected, out.name


def test_an_unfinished_store_cannot_be_read(tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    with TokenStoreWriter(out, make_plan()) as writer:
        writer.add("a", **arrays("a"))
    with pytest.raises(DriveSimError, match="unfinished"):
        TokenStore(out)


def test_an_unfinished_store_of_another_plan_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    with TokenStoreWriter(out, make_plan()) as writer:
        writer.add("a", **arrays("a"))
    before = contents(out)
    changes: list[dict[str, Any]] = [{name: value} for name, value in OTHER_INFO.items()]
    for change in changes:
        with pytest.raises(DriveSimError, match=f"unfinished .*{next(iter(change))} was"):
            TokenStoreWriter(out, make_plan(**change))
    assert contents(out) == before


def test_an_unfinished_store_without_a_drive_accepts_another_plan(tmp_path: Path) -> None:
    TokenStoreWriter(tmp_path / "tokens", make_plan()).close()
    assert write(tmp_path / "tokens", make_plan(every=3)).info.every == 3


def test_a_finished_store_and_a_foreign_folder_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "tokens")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    for name, reason in (("tokens", "finished"), ("foreign", "thesis"), ("file", "exists")):
        with pytest.raises(DriveSimError, match=reason):
            TokenStoreWriter(tmp_path / name, make_plan())
    assert contents(tmp_path) == before


def test_two_writers_do_not_share_a_folder(tmp_path: Path) -> None:
    with (
        TokenStoreWriter(tmp_path / "tokens", make_plan()),
        pytest.raises(DriveSimError, match="another process"),
    ):
        TokenStoreWriter(tmp_path / "tokens", make_plan())


def test_with_every_drive_skipped_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="every drive was skipped"):
        write(tmp_path / "tokens", skip=tuple(LENGTHS))
    assert not (tmp_path / "tokens").exists()


FULL_DISK = """
import resource
from pathlib import Path
from tests.data.tokens.test_store import *
resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))
try:
    write(Path(sys.argv[1]))
except DriveSimError as error:
    print(error)
"""


def test_a_full_disk_gives_a_one_line_error_and_the_store_can_be_continued(tmp_path: Path) -> None:
    out = tmp_path / "tokens"
    output = run_script(FULL_DISK, out)
    assert "cannot write" in output
    assert output.count("\n") == 1
    assert not list(out.rglob("*.partial*"))
    write(out)
    write(tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"tokens": np.full((5, 2, 3), 50)}, "tokens"),
        ({"tokens": np.full((5, 2, 3), -1)}, "tokens"),
        ({"tokens": np.zeros((5, 3, 2), np.uint16)}, "tokens"),
        ({"actions": np.zeros((4, 2))}, "actions"),
        ({"timestamps": np.zeros(6)}, "timestamps"),
    ],
)
def test_arrays_that_do_not_fit_the_plan_are_refused(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    with TokenStoreWriter(tmp_path / "tokens", make_plan()) as writer:
        with pytest.raises(ValueError, match=reason):
            writer.add("a", **(arrays("a") | change))
        assert not writer.done("a")
        with pytest.raises(ValueError, match="missing"):
            writer.finish()


@pytest.mark.parametrize("name", ["../a", "a/../../b", "", "a\nb"])
def test_ids_that_lead_out_of_the_store_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="id"):
        PlannedDrive(id=name, frames=1)


def rewrite_header(path: Path, change: Any) -> None:
    """Change a shard's header in place without changing its length."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= length
    path.write_bytes(data[:8] + text.ljust(length) + data[8 + length :])


def patch(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset, 2 if offset < 0 else 0)
        file.write(data)


def set_dtype(header: dict[str, Any]) -> None:
    header["tokens"]["dtype"] = "I16"


def set_shape(header: dict[str, Any]) -> None:
    header["tokens"]["shape"] = [7, 3, 2]


def set_far(header: dict[str, Any]) -> None:
    header["tokens"]["data_offsets"][1] += 9000


def set_fingerprint(header: dict[str, Any]) -> None:
    header["__metadata__"]["tokenizer_fingerprint"] = "beef"


def set_steering(header: dict[str, Any]) -> None:
    header["__metadata__"]["steering_kind"] = "curvature"


def drop_column(header: dict[str, Any]) -> None:
    del header["actions"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_dtype, "int16"),
        (set_shape, "expected"),
        (set_far, "offset"),
        (set_fingerprint, "another store"),
        (set_steering, "another store"),
        (drop_column, "offset"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    write(tmp_path / "tokens")
    rewrite_header(tmp_path / "tokens" / shard_name(4), change)
    with pytest.raises(DriveSimError, match=reason) as caught:
        joined(TokenStore(tmp_path / "tokens"), "c", "tokens")
    assert "\n" not in str(caught.value)


def test_offsets_that_do_not_rise_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "tokens")
    path = tmp_path / "tokens" / shard_name(4)
    start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    for offsets in ([0, 8, 7], [1, 3, 7], [0, 3, 6], [-1, 3, 7]):
        patch(path, start, np.array(offsets, "<i8").tobytes())
        with pytest.raises(DriveSimError, match="offsets"):
            joined(TokenStore(tmp_path / "tokens"), "c", "tokens")
    patch(path, start, np.array([0, 4, 7], "<i8").tobytes())
    with pytest.raises(DriveSimError, match="offsets"):
        joined(TokenStore(tmp_path / "tokens"), "c", "tokens")


def test_a_short_missing_or_foreign_shard_is_refused(tmp_path: Path) -> None:
    store = write(tmp_path / "tokens")
    path = tmp_path / "tokens" / shard_name(1)
    data = path.read_bytes()
    for content in (data[:-1], b"", data + b"x"):
        path.write_bytes(content)
        with pytest.raises(DriveSimError, match="bytes"):
            TokenStore(tmp_path / "tokens")
        with pytest.raises(DriveSimError, match="damaged"):
            store.shard(1)
    path.write_bytes(b"\xff" * len(data))
    with pytest.raises(DriveSimError, match="header"):
        TokenStore(tmp_path / "tokens").shard(1)
    path.unlink()
    with pytest.raises(DriveSimError, match="missing"):
        TokenStore(tmp_path / "tokens")


def test_verify_finds_one_changed_byte(tmp_path: Path) -> None:
    store = write(tmp_path / "tokens")
    patch(tmp_path / "tokens" / shard_name(2), -1, b"\x00")
    with pytest.raises(DriveSimError, match="checksum"):
        store.verify()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 1}', '{"schema": 2}', "{", '{"schema": 1, "path": "../x"}']
)
def test_a_file_that_is_no_index_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path / "tokens")
    (tmp_path / "tokens" / "index.json").write_text(text)
    with pytest.raises(DriveSimError) as caught:
        TokenStore(tmp_path / "tokens")
    assert "index.json" in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"frames": 4.5},
        {"frames": -1},
        {"frames": None},
        {"segments": [[0, 9]]},
        {"segments": [[3, 1]]},
        {"segments": [[0]]},
        {"segments": 7},
        {"id": 7},
        {"id": "../a"},
        {"id": "/a"},
        {"id": "a\n"},
        {"frames": 2**63},
        {"mirrored": "no"},
        {"path": "../../elsewhere.safetensors"},
    ],
)
def test_a_wrong_drive_entry_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path / "tokens")
    file = tmp_path / "tokens" / "index.json"
    index = json.loads(file.read_text())
    index["shards"][4]["drives"][1] |= change
    file.write_text(json.dumps(index))
    with pytest.raises(
        DriveSimError, match=r"index\.json\.shards\[4\]\.drives\[1\].*; tokenize"
    ) as caught:
        TokenStore(tmp_path / "tokens")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("shard", {"bytes": "9"}),
        ("shard", {"sha256": 3}),
        ("info", {"rows": 10**15}),
        ("info", {"rows": 2**70}),
        ("info", {"fps": float("nan")}),
        ("info", {"steering_kind": "\ud800"}),
        ("info", {"levels": [[]]}),
    ],
)
def test_an_index_with_hostile_values_is_refused(
    tmp_path: Path, place: str, change: dict[str, Any]
) -> None:
    write(tmp_path / "tokens")
    file = tmp_path / "tokens" / "index.json"
    index = json.loads(file.read_text())
    (index["info"] if place == "info" else index["shards"][4]).update(change)
    file.write_text(json.dumps(index))
    with pytest.raises(DriveSimError, match=r"index\.json") as caught:
        TokenStore(tmp_path / "tokens")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(DriveSimError, match="drivesim tokenize"):
            TokenStore(path)


def test_an_unknown_drive_is_named(tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="nobody"):
        write(tmp_path / "tokens").select(["a", "nobody"])


def test_a_store_travels_to_another_process(tmp_path: Path) -> None:
    store = write(tmp_path / "tokens")
    before = joined(store, "long", "tokens")
    np.testing.assert_array_equal(
        joined(pickle.loads(pickle.dumps(store)), "long", "tokens"), before
    )
