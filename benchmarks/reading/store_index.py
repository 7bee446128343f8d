"""`python -m benchmarks.reading.store_index`: the cost of the index of a very large token store.

Writes the index of a store of N drives. Its shards are sparse files, which have the size of real
shards but take no disk space. Then does what every process of a training does before its first
batch: reads the index, lists the drives, splits them, and builds the table of windows. Prints the
processor seconds (one thread) and the memory that each of these steps takes.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from driving_sim.data.split import split_drives
from driving_sim.data.tokens.index import INDEX, SCHEMA, frame_bytes, shard_name
from driving_sim.data.tokens.plan import SHARD_BYTES
from driving_sim.data.tokens.store import TokenStore
from driving_sim.data.tokens.windows import WindowIndex

ROWS, COLS = 16, 32
_FRAMES = 600  # a minute at 10 frames/s
_WINDOW = 20

T = TypeVar("T")


def write_index(folder: Path, drives: int) -> None:
    """Write a finished token store of `drives` drives, with sparse files instead of shards."""
    a_shard = SHARD_BYTES // (_FRAMES * frame_bytes(ROWS, COLS))
    entry = {"frames": _FRAMES, "segments": [[0, _FRAMES]], "start": 0, "source": "videos"}
    shards = []
    for number, first in enumerate(range(0, drives, a_shard)):
        with (folder / shard_name(number)).open("wb") as file:
            file.truncate(SHARD_BYTES)
        ids = [f"city/2025-01-01/drive_{n:08d}" for n in range(first, min(first + a_shard, drives))]
        entries = [{"id": name, **entry, "mirrored": False} for name in ids]
        shards.append({"bytes": SHARD_BYTES, "sha256": f"{number:064x}", "drives": entries})
    info = {"tokenizer_fingerprint": "f" * 64, "rows": ROWS, "cols": COLS, "codebook_size": 1000}
    index = {
        "schema": SCHEMA,
        "plan": "0" * 64,
        "info": {**info, "fps": 10.0},
        "drives": drives,
        "frames": drives * _FRAMES,
        "shards": shards,
        "skipped": [],
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2))


def resident_mib() -> float:
    """Return the memory of this process in MiB (Linux only)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def timed(what: str, act: Callable[[], T]) -> T:
    """Call `act` and return its result. Print its processor time and how much memory it added."""
    before, start = resident_mib(), time.process_time()
    result = act()
    seconds = time.process_time() - start
    print(f"{what:<28}{seconds:8.2f} s{resident_mib() - before:+10.0f} MiB")
    return result


def measure(folder: Path, drives: int) -> None:
    """Print the time and memory that a store of `drives` drives takes to open."""
    write_index(folder, drives)
    size = (folder / INDEX).stat().st_size / 2**20
    print(f"{drives:,} drives of {_FRAMES} frames: {INDEX} takes {size:.0f} MiB")
    store = timed("TokenStore (reads the index)", lambda: TokenStore(folder))
    training, _ = timed("split_drives", lambda: split_drives(store.drive_ids))
    chosen = timed("select", lambda: store.select(training))
    index = timed("WindowIndex", lambda: WindowIndex(chosen, frames=_WINDOW))
    numbers = np.random.default_rng(0).integers(len(index), size=(10_000, 1))
    start = time.process_time()
    for number in numbers:
        index.places(number)
    print(f"{'one window':<28}{(time.process_time() - start) / len(numbers) * 1e6:8.2f} µs")


def main() -> None:
    """Parse the options and measure."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m benchmarks.reading.store_index"
    )
    parser.add_argument(
        "--drives", type=int, default=1_000_000, help="number of drives; default: 1,000,000"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options.drives)


if __name__ == "__main__":
    main()
