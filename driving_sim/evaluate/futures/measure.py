"""Measure a world model on a folder of true futures: the function behind `evaluate futures`."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.engine.precision import name_of
from driving_sim.engine.progress import say
from driving_sim.evaluate.footage import sampled_fingerprint
from driving_sim.evaluate.futures.nearest import DISTANCE, EARLY, LATE, PSNR, SOURCES, windows
from driving_sim.evaluate.futures.section import evaluate_futures
from driving_sim.evaluate.futures.starts import Start, find_starts
from driving_sim.evaluate.pictures.efficientnet import EXTRA
from driving_sim.evaluate.pictures.feature_distance import FeatureDistance
from driving_sim.evaluate.report.protocol_hash import Protocol
from driving_sim.evaluate.report.report import KeyFigure, refuse_existing, write_report
from driving_sim.evaluate.report.section import Media
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel

SHEET = "futures.png"
_MEASURES = {PSNR: "PSNR", DISTANCE: "feature distance"}
_WINDOWS = {EARLY: "0.5 to 1.5 s", LATE: "last second"}


def _figure(measure: str, window: str, metric: str, label: str, total: str = "") -> KeyFigure:
    place = f"futures.{measure}.{window}"
    beside = {
        whose: f"{place}.{source}.{metric}"
        for source, whose in SOURCES.items()
        if source != "model"
    }
    label = f"{label}, {_MEASURES[measure]}, {_WINDOWS[window]}"
    return KeyFigure(label, f"{place}.model.{metric}", beside, total)


HEADLINE = [
    _figure(measure, window, *figure)
    for measure in _MEASURES
    for window in _WINDOWS
    for figure in (
        ("nearest_count", "nearest to their own future", "futures.rollouts"),
        ("pairs.left/right", "left and right told apart (share)"),
    )
]
"""Key figures at the top of the report. Those on left and right need futures of these names."""


def measure_futures(
    run: Path,
    folder: Path,
    out: Path,
    *,
    sampling: Sampling,
    reading: Reading = AS_NAMED,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, str]:
    """Measure a world model on the true futures in `folder`, and write a report to `out`.

    Returns the key figures as text, by their labels. Without the weights of the feature distance,
    only PSNR is measured, and a line says so.
    """
    began = time.perf_counter()
    world = WorldModel.from_run(run, device, precision)
    refuse_existing(out)
    distance = FeatureDistance.if_installed(world.device)
    if distance is None:
        say(
            "the feature distance is left out, because its network is not installed: "
            f"pip install 'drivesim[{EXTRA}]'"
        )
    starts = find_starts(world, folder, reading)
    protocol = _protocol(world, starts, sampling, distance)
    section = evaluate_futures(world, starts, sampling=sampling, distance=distance)
    sheet = section.parts[-1]
    assert isinstance(sheet, Media)
    return write_report(
        out,
        title="True futures",
        description={
            "world model": str(run),
            "true futures": f"{len(starts)} starts in {folder}",
            "device": f"{world.device}, {name_of(world.dtype)}",
            "key figures": "more is better",
        },
        sections=[section],
        protocol=protocol,
        model={
            "path": str(run),
            "fingerprint": world.fingerprint,
            "tokenizer_fingerprint": world.tokenizer.fingerprint,
            "precision": name_of(world.dtype),
            "tokenizer_precision": name_of(world.tokenizer.dtype),
        },
        seconds=time.perf_counter() - began,
        headline=HEADLINE,
        attachments={SHEET: sheet.data},
    )


def _protocol(
    world: WorldModel,
    starts: Sequence[Start],
    sampling: Sampling,
    distance: FeatureDistance | None,
) -> Protocol:
    """Return the protocol: everything that decides the measured numbers, except the model."""
    frames, size = starts[0].frames, world.tokenizer.frame_size
    return Protocol.of(
        "futures",
        {
            "starts": {
                start.name: {
                    name: sampled_fingerprint(drive)
                    for name, drive in (("context", start.context), *start.futures.items())
                }
                for start in starts
            },
            "known_channels": world.known_channels,
            "size": [size.height, size.width],
            "fps": round(world.fps, 4),
            "context_frames": world.context_frames,
            "frames": frames,
            "windows": {
                name: [window.start, window.stop]
                for name, window in windows(world.fps, frames).items()
            },
            "precision": world.precisions,
            "sampling": asdict(sampling),
            "feature_distance": distance.fingerprint if distance else None,
        },
    )
