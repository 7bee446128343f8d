"""Cut contexts out of synthetic drives: short drives with a known world, to start futures from."""

from collections.abc import Mapping
from pathlib import Path

from driving_sim.data.synthetic.true_future import load_synthetic_drive
from driving_sim.data.synthetic.writer import write_drive
from driving_sim.engine.errors import DriveSimError

SECONDS = 3.0
"""Time from the first frame of a context to its last one, in seconds."""


def write_contexts(
    out: Path, moments: Mapping[str, tuple[Path, float]], *, seconds: float = SECONDS
) -> list[Path]:
    """Write a context for each of `moments` to the folder `out`; return the videos' paths.

    `moments` gives the drive (the JSON file beside its video) and the time of the first frame, in
    seconds, by the name of the context. A context consists of `NAME.mp4`, `.csv` and `.json`, like
    the drives of `write_synthetic_drives`, and its frames are rendered anew. Its JSON has the state
    at every frame, so `replay` can draw the true future of any actions from its last state.
    Existing files are replaced. Raises DriveSimError if a file is not a drive, or if the drive does
    not last from the given time for `seconds`.
    """
    contexts = {}
    for name, (path, start_s) in moments.items():
        driven = load_synthetic_drive(path)
        fps = driven.world.config.fps
        begin = round(start_s * fps)
        end = begin + round(seconds * fps) + 1
        if begin < 0 or end > len(driven.states):
            raise DriveSimError(
                f"{path}: has no {seconds:g} s from {start_s:g} s on; it goes from 0 to "
                f"{driven.timestamps[-1]:g} s, so choose another time for {name}"
            )
        contexts[name] = driven.between(begin, end)
    for name, context in contexts.items():
        write_drive(context, out / name)
    return [out / f"{name}.mp4" for name in moments]
