"""`python -m benchmarks.training.options`: how training options change time and memory.

Times training steps of a preset's world model on random tokens. Each round tries all options, one
after the other, each in a new process. Options for two ranks start two processes with `torchrun`.
Prints medians over the rounds: the time relative to a training without options, and the memory.
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
    """Return the seconds of a step, and the megabytes by which steps raise the peak memory.

    Returns None on all ranks except the main one.
    """
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
    """Call `measure` in new processes, one for each rank, and return its result."""
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
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    """Parse the options, measure in turns, print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, prog="python -m benchmarks.training.options"
    )
    parser.add_argument("--preset", default="tiny", help="size of the model; default: tiny")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of timing; default: 5")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measured = measure(arguments.preset, json.loads(arguments.measure))
        if measured:
            print(json.dumps(measured))
        return
    rounds = [
        {name: run(arguments.preset, dict(options)) for name, options in VARIANTS.items()}
        for _ in range(arguments.rounds)
    ]
    print(
        f"training steps of {arguments.preset}, relative to plain, "
        f"medians of {arguments.rounds} rounds:"
    )
    for name in VARIANTS:
        ratios = [times[name]["seconds"] / times["plain"]["seconds"] for times in rounds]
        memory = statistics.median(times[name]["megabytes"] for times in rounds)
        print(
            f"  {name}: {statistics.median(ratios):.2f} of the time, {memory:,.0f} MB per process"
        )
    plain = statistics.median(times["plain"]["seconds"] for times in rounds)
    print(f"a plain step takes {plain:.3g} s")


if __name__ == "__main__":
    main()
