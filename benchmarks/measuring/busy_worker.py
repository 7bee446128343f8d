"""Worker process of `benchmarks.busy`. It sets itself up as drivesim's commands do.

It reads lines `NAME SECONDS` from stdin, repeats the work called NAME for that many seconds, and
answers with a JSON list of the seconds of each repetition.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator

from driving_sim.cli import main as start_as_commands_do

UNCOUNTED = 0.5
"""Seconds of each turn that do not count, because drivesim first has to notice busy programs."""
NAMES = ("world-model step", "tokenizer step", "encode 8 frames", "rollout frame")


def works(preset: str) -> dict[str, Callable[[], object]]:
    """Build the preset's models with random weights. Return functions to time, by name."""
    import torch

    from benchmarks.measuring.paired import Settings
    from benchmarks.measuring.shapes import Shape, tokenizer, world_model
    from benchmarks.rollouts.speed import endless
    from benchmarks.training.speed import own_step, world_model_step
    from driving_sim.tokenizer.objective import TokenizerObjective
    from driving_sim.tokenizer.presets import PRESETS as TOKENIZERS
    from driving_sim.world_model.training.presets import PRESETS as WORLD_MODELS

    settings = Settings()
    frames, model = TOKENIZERS[preset], WORLD_MODELS[preset]
    shape = Shape(name=preset, frames=frames.model, model=model.model)
    size = (8, frames.model.height, frames.model.width, 3)
    pictures = torch.randint(256, size, dtype=torch.uint8)
    objective = TokenizerObjective(frames.model, frames.objective)
    frozen, world = tokenizer(shape, settings), world_model(shape, settings)
    futures = endless(world, context=model.model.context_frames)

    def roll_out() -> None:
        world.tokenizer.decode(next(futures).tokens)

    batch = {"frames": pictures[: frames.data.batch_size]}
    acts = (
        world_model_step(shape, model.data.batch_size, settings),
        own_step(objective, batch, settings),
        lambda: frozen.encode(pictures),
        roll_out,
    )
    return dict(zip(NAMES, acts, strict=True))


def turns(act: Callable[[], object], lasting: float) -> Iterator[float]:
    """Warm up, then call `act` for `lasting` seconds. Yield the time of each call.

    There is at least one call.
    """
    begun = time.perf_counter()
    counted, end = begun + UNCOUNTED, begun + UNCOUNTED + lasting
    while begun < counted:
        act()
        begun = time.perf_counter()
    while True:
        act()
        now = time.perf_counter()
        yield now - begun
        begun = now
        if now >= end:
            return


def main() -> None:
    """Read requests from stdin and print the answers."""
    start_as_commands_do(debug=False)
    known = works(sys.argv[1])
    for line in sys.stdin:
        name, _, seconds = line.rstrip().rpartition(" ")
        print(json.dumps(list(turns(known[name], float(seconds)))), flush=True)


if __name__ == "__main__":
    main()
