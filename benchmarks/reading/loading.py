"""`python -m benchmarks.reading.loading [windows|share]`: the speed of loading random windows.

`windows` reads batches of windows from a token store, in this process. The peer is WebDataset,
which reads the same frames from tar shards in two forms. In the first, each sample is a whole
drive, from which a random window is cut after reading. These windows may begin at any frame, as
drivesim's do. In the second, each sample is a window that was cut before the shards were written.
This is faster, but windows cannot begin at any other frames. Both forms use WebDataset's shuffle
buffer. `share` divides the time to load a batch by the time of the training step on it.
"""

import itertools
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.measuring.machine import precision
from benchmarks.measuring.paired import (
    Benchmark,
    Claim,
    Figure,
    Settings,
    alternate,
    rounded,
    run_command,
    times_faster,
)
from benchmarks.measuring.peers import package
from benchmarks.measuring.shapes import FPS, Shape, shape_of
from benchmarks.training.speed import world_model_step
from driving_sim.data.tokens.plan import PlannedDrive, StorePlan
from driving_sim.data.tokens.store import StoreInfo, TokenStore
from driving_sim.data.tokens.windows import TokenWindows
from driving_sim.data.tokens.writer import TokenStoreWriter
from driving_sim.engine.precision import name_of

_BUFFER = 100
_SAMPLES_A_SHARD = 100

Drive = tuple[NDArray[np.uint16], NDArray[np.float32]]


def _drives(shape: Shape, count: int, frames: int) -> list[Drive]:
    """Return drives of random tokens [T, rows, cols] and actions [T, 2]."""
    rng, grid = np.random.default_rng(0), shape.grid
    size = (frames, grid.rows, grid.cols)
    return [
        (
            rng.integers(grid.codebook_size, size=size).astype(np.uint16),
            rng.standard_normal((frames, 2)).astype(np.float32),
        )
        for _ in range(count)
    ]


def _write_store(path: Path, shape: Shape, drives: list[Drive]) -> TokenStore:
    grid = shape.grid
    info = StoreInfo(
        tokenizer_fingerprint="f" * 64,
        rows=grid.rows,
        cols=grid.cols,
        codebook_size=grid.codebook_size,
        fps=FPS,
        steering_kind="road_wheel",
        levels=grid.levels,
    )
    planned = tuple(PlannedDrive(id=f"{n:06d}", frames=len(d[0])) for n, d in enumerate(drives))
    with TokenStoreWriter(path, StorePlan(info=info, drives=planned)) as writer:
        for drive, (tokens, actions) in zip(planned, drives, strict=True):
            times, valid = np.arange(len(tokens)) / FPS, np.ones(actions.shape, np.bool_)
            writer.add(drive.id, tokens, actions, valid, times, [(0, len(tokens))])
        writer.finish()
    return TokenStore(path)


def _write_tars(path: Path, drives: list[Drive], length: int | None) -> list[str]:
    """Write tar shards and return their paths.

    A sample is a window of `length` frames, or a whole drive if `length` is None. The windows of a
    drive follow each other without overlap.
    """
    webdataset = package("webdataset")
    path.mkdir()
    samples = [
        (tokens[begin : begin + (length or len(tokens))], actions[begin:][: length or len(tokens)])
        for tokens, actions in drives
        for begin in range(0, len(tokens) - (length or len(tokens)) + 1, length or len(tokens))
    ]
    for first in range(0, len(samples), _SAMPLES_A_SHARD):
        shard = path / f"{first // _SAMPLES_A_SHARD:06d}.tar"
        with webdataset.TarWriter(str(shard)) as writer:
            for number in range(first, min(first + _SAMPLES_A_SHARD, len(samples))):
                tokens, actions = samples[number]
                parts = {"tokens.bin": tokens.tobytes(), "actions.bin": actions.tobytes()}
                writer.write({"__key__": f"{number:08d}", **parts})
    return sorted(str(shard) for shard in path.glob("*.tar"))


def _tar_batches(
    shards: list[str], shape: Shape, length: int, size: int, *, whole_drives: bool
) -> Generator[Any, None, None]:
    """Yield batches of windows without end.

    The shards contain tensors as raw bytes, which WebDataset decodes faster than .npy files.
    """
    webdataset, rng = package("webdataset"), np.random.default_rng(0)

    grid = shape.grid

    def cut(sample: tuple[bytes, bytes]) -> tuple[Any, Any]:
        tokens = np.frombuffer(sample[0], np.uint16).reshape(-1, grid.rows, grid.cols)
        actions = np.frombuffer(sample[1], np.float32).reshape(-1, 2)
        begin = rng.integers(len(tokens) - length + 1) if whole_drives else 0
        window = slice(begin, begin + length)
        return tokens[window].astype(np.int64), actions[window]

    data = webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False)
    data = data.repeat().to_tuple("tokens.bin", "actions.bin").map(cut)
    yield from data.shuffle(_BUFFER).batched(size)


def windows(settings: Settings) -> list[Claim]:
    """Compare the windows per second that drivesim and WebDataset read for the shape `base`."""
    shape = shape_of("base", settings)
    count, frames, size, batches = (4, 40, 2, 2) if settings.toy else (64, 600, 8, 20)
    length = shape.model.context_frames + 1  # the window, and the frame before it
    drives = _drives(shape, count, frames)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = _write_store(folder / "store", shape, drives)
        own = TokenWindows(store.drives, frames=shape.model.context_frames, batch_size=size)
        peers = {
            "whole drives": _tar_batches(
                _write_tars(folder / "drives", drives, None),
                shape,
                length,
                size,
                whole_drives=True,
            ),
            "windows cut beforehand": _tar_batches(
                _write_tars(folder / "windows", drives, length),
                shape,
                length,
                size,
                whole_drives=False,
            ),
        }

        # Free each batch before reading the next one, as in training.
        def several(source: Iterator[Any], number: int) -> Callable[[], object]:
            return lambda: deque(itertools.islice(source, number), maxlen=0)

        times = alternate(
            {
                "own": several((own[n] for n in itertools.count()), 10 * batches),
                **{name: several(source, batches) for name, source in peers.items()},
            },
            settings,
        )
        for source in peers.values():
            source.close()
    rates = {name: batches * size / float(np.median(taken)) for name, taken in times.items()}
    rates["own"] *= 10  # In each timing, drivesim reads ten times as many windows as its peers.
    return [
        Claim(
            what="random windows of tokens, base-sized",
            against=f"WebDataset, {name}",
            figure=times_faster(times[name], times["own"], work=1 / 10),
            bar=20,
            own=f"{rounded(rates['own'])} windows/s",
            peer=f"{rounded(rates[name])} windows/s",
            details=(
                f"{length} frames of {shape.frames.rows}x{shape.frames.cols} tokens, "
                f"batches of {size}",
            ),
        )
        for name in peers
    ]


def share(settings: Settings) -> list[Claim]:
    """Return the time to load a batch divided by the time of a world model's training step."""
    shape, size = shape_of("tiny", settings), 2
    drives = _drives(shape, *((4, 40) if settings.toy else (64, 600)))
    step = world_model_step(shape, size, settings)
    with tempfile.TemporaryDirectory() as name:
        store = _write_store(Path(name) / "store", shape, drives)
        own = TokenWindows(store.drives, frames=shape.model.context_frames, batch_size=size)
        numbers = itertools.count()
        times = alternate({"load": lambda: own[next(numbers)], "step": step}, settings)
    shares = [a / b for a, b in zip(times["load"], times["step"], strict=True)]
    return [
        Claim(
            what="share of loading in a training step, tiny-sized",
            figure=Figure.of(shares),
            bar=0.02,
            unit="%",
            at_most=True,
            details=(
                f"{size} windows, {shape}, {name_of(precision(settings))}",
                f"{1e3 * float(np.median(times['load'])):.3g} ms of "
                f"{1e3 * float(np.median(times['step'])):.4g} ms",
            ),
        )
    ]


BENCHMARKS: dict[str, Benchmark] = {"windows": windows, "share": share}


if __name__ == "__main__":
    run_command(__doc__, "reading.loading", BENCHMARKS, sys.argv[1:])
