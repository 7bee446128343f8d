"""`python -m benchmarks.training.options`: what the options of a training cost, and what they save.

World-model steps of a preset on random tokens, each variant in a process of its own (or two, with
`torchrun`), in turns. Printed are medians over the rounds, as ratios to the plain training.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from benchmarks import ROOT

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "accumulate=2, half the batch each": {"accumulate": 2},
    "compile": {"compile": True},
    "two ranks, half the batch each": {"ranks": 2},
    "two ranks with --shard": {"ranks": 2, "shard": True},
}
_WARM_UP, _TIMED = 3, 10


def measure(preset: str, options: dict[str, Any]) -> dict[str, float] | None:
    """Seconds of a step and megabytes that steps take beyond the model; on the main rank."""
    import torch

    from driving_sim.engine.ranks.distributed import process_group
    from driving_sim.engine.training.step import Stepper
    from driving_sim.engine.training.trainable import Batch
    from driving_sim.tokenizer.presets import PRESETS as TOKENIZERS
    from driving_sim.world_model.actions import ActionStatistics
    from driving_sim.world_model.training.objective import WorldModelObjective
    from driving_sim.world_model.training.presets import PRESETS
    from driving_sim.world_model.transformer import TokenGrid, Transformer

    config, frames = PRESETS[preset], TOKENIZERS[preset].model
    parts = options.pop("ranks", 1) * options.get("accumulate", 1)
    training = replace(config.training, steps=_WARM_UP + _TIMED, minutes=None, **options)
    grid = TokenGrid(rows=frames.rows, cols=frames.cols, levels=frames.levels)
    torch.manual_seed(0)
    model = WorldModelObjective(
        config.objective, Transformer(config.model, grid, ActionStatistics())
    )
    shape = (config.data.batch_size // parts, config.model.context_frames)
    batch = {
        "tokens": torch.randint(grid.codebook_size, (*shape, grid.rows, grid.cols)),
        "previous": torch.randint(grid.codebook_size, (shape[0], grid.rows, grid.cols)),
        "has_previous": torch.ones(shape[0], dtype=torch.bool),
        "actions": torch.randn(*shape, 2),
        "action_valid": torch.ones(*shape, 2, dtype=torch.bool),
    }

    def batches() -> Iterator[tuple[int, Batch]]:
        number = 0
        while True:
            yield number, dict(batch)
            number += 1

    with process_group(torch.device("cpu")) as (ranks, device):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.size))
        stepper, source, seconds = Stepper(model, training, ranks, device), batches(), []
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for step in range(_WARM_UP + _TIMED):
            begun = time.perf_counter()
            stepper.step(source, step, 0.5)
            seconds.append(time.perf_counter() - begun)
        if not ranks.is_main:
            return None
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        return {"seconds": statistics.median(seconds[_WARM_UP:]), "megabytes": taken / 1024}


def run(preset: str, options: dict[str, Any]) -> dict[str, float]:
    """`measure` in processes of its own."""
    ranks = options.get("ranks", 1)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [
        sys.executable,
        *(launcher if ranks > 1 else []),
        "-m",
        "benchmarks.training.options",
    ]
    done = subprocess.run(
        [*command, "--preset", preset, "--measure", json.dumps(options)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Parse, measure in turns, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m benchmarks.training.options"
    )
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        found = measure(given.preset, json.loads(given.measure))
        if found:
            print(json.dumps(found))
        return
    rounds = [
        {name: run(given.preset, dict(options)) for name, options in VARIANTS.items()}
        for _ in range(given.rounds)
    ]
    print(f"steps of {given.preset}, medians of {given.rounds} rounds, relative to plain:")
    for name in VARIANTS:
        times = [each[name]["seconds"] / each["plain"]["seconds"] for each in rounds]
        memory = statistics.median(each[name]["megabytes"] for each in rounds)
        print(f"  {name}: {statistics.median(times):.2f} of the time, {memory:,.0f} MB a process")
    plain = statistics.median(each["plain"]["seconds"] for each in rounds)
    print(f"a plain step takes {plain:.3g} s")


if __name__ == "__main__":
    main()
