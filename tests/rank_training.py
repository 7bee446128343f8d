"""Small real models in training, alone or as `torchrun` ranks: `python -m tests.rank_training`."""

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from driving_sim.engine.errors import DriveSimError, Interrupted
from driving_sim.engine.training import Batch, TrainingConfig, TrainingResult, Validation, train
from driving_sim.tokenizer.autoencoder import AutoencoderConfig
from driving_sim.tokenizer.discriminator import DiscriminatorConfig
from driving_sim.tokenizer.objective import ObjectiveConfig as TokenizerObjectiveConfig
from driving_sim.tokenizer.objective import TokenizerObjective
from driving_sim.tokenizer.tokenizer import images_from_frames
from driving_sim.world_model.actions import ActionDropoutConfig, ActionStatistics
from driving_sim.world_model.objective import ObjectiveConfig, WorldModelObjective
from driving_sim.world_model.transformer import TokenGrid, Transformer, TransformerConfig

STEPS = 6
_ROWS = 2


def tokenizer() -> nn.Module:
    """A tokenizer whose discriminator starts after the first third of the steps."""
    torch.manual_seed(0)
    model = AutoencoderConfig(
        height=32, width=64, widths=(16, 32, 48), blocks=(1, 1, 1), attention_blocks=1, head_size=16
    )
    objective = TokenizerObjectiveConfig(
        lpips_weight=0, gan_start=0.3, discriminator=DiscriminatorConfig(width=16)
    )
    return TokenizerObjective(model, objective)


def world_model(dropout: float = 0.0, heads: int = 4) -> nn.Module:
    """A world model without noise, which would be another one for each way to cut a batch."""
    torch.manual_seed(0)
    statistics = ActionStatistics(mean=(8.0, 0.0), std=(2.0, 0.1))
    config = TransformerConfig(
        layers=3, width=64, heads=heads, kv_heads=2, context_frames=3, dropout=dropout
    )
    grid = TokenGrid(rows=2, cols=4, levels=(5, 3))
    quiet = ObjectiveConfig(token_noise=0, action_dropout=ActionDropoutConfig(both=0, channel=0))
    return WorldModelObjective(quiet, Transformer(config, grid, statistics))


def compiled_world_model() -> nn.Module:
    """One whose attention `native_training` takes over."""
    return world_model(heads=2)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tokenizer": tokenizer,
    "world_model": world_model,
    "compiled_world_model": compiled_world_model,
}


class Halves(Dataset[Batch]):
    """Batches of a few samples; batch n is a function of n.

    `bad` is a batch that cannot be made; who makes batch `fatal` dies, once: `mark` is left then.
    Each takes `seconds`.
    """

    def __init__(
        self,
        model: str,
        *,
        bad: int | None = None,
        fatal: int | None = None,
        mark: str = "",
        seconds: float = 0.0,
    ) -> None:
        self.model, self.bad, self.fatal, self.mark = model, bad, fatal, Path(mark)
        self.seconds = seconds

    def __getitem__(self, number: int) -> Batch:
        time.sleep(self.seconds)
        if number == self.bad:
            raise DriveSimError(f"batch {number} cannot be made")
        if number == self.fatal and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        generator = torch.Generator().manual_seed(number)

        def integers(high: int, *shape: int) -> Tensor:
            return torch.randint(high, (_ROWS, *shape), generator=generator)

        if self.model == "tokenizer":
            coarse = torch.rand(_ROWS, 4, 8, 3, generator=generator)
            frames = coarse.repeat_interleave(8, 1).repeat_interleave(8, 2)
            return {"frames": (255 * frames).to(torch.uint8)}
        return {
            "tokens": integers(15, 3, 2, 4),
            "previous": integers(15, 2, 4),
            "has_previous": integers(2).bool(),
            "actions": torch.randn(_ROWS, 3, 2, generator=generator),
            "action_valid": integers(2, 3, 2).bool(),
        }


class Wholes(Halves):
    """Batch n is batches 2 n and 2 n + 1 of `Halves`."""

    def __getitem__(self, number: int) -> Batch:
        halves = [super(Wholes, self).__getitem__(2 * number + half) for half in (0, 1)]
        return {name: torch.cat([half[name] for half in halves]) for name in halves[0]}


def validate(model: nn.Module) -> Validation:
    """The loss, a tokenizer's without the discriminator, on a batch of its own."""
    if isinstance(model, TokenizerObjective):
        frames = Halves("tokenizer")[10**6]["frames"]
        images = images_from_frames(frames, model.autoencoder.config.frame_size)
        loss, _ = model.fidelity(model.autoencoder(images).images, images)
    else:
        loss, _ = model(Halves("world_model")[10**6])
    return Validation(score=float(loss))


def export(module: nn.Module, run: Path) -> None:
    tensors = {name: value.detach().contiguous() for name, value in module.state_dict().items()}
    save_file(tensors, run / "model.safetensors")


def rank_train(name: str, run: Path, *, halves: bool = True, **options: Any) -> TrainingResult:
    """Train a model of `MODELS` on halves of batches, or on whole ones."""
    resume = options.pop("resume", False)
    faults = {
        key: options.pop(key) for key in ("bad", "fatal", "mark", "seconds") if key in options
    }
    chosen: dict[str, Any] = {
        "steps": STEPS,
        "learning_rate": 0.003,
        "warmup_steps": 0,
        "log_every": 1,
        "validate_every": 3,
        "save_every": 2,
        "keep_last": 9,
        "workers": 0,
        "precision": "fp32",
        "threads": 1,
    }
    return train(
        MODELS[name](),
        dataset=(Halves if halves else Wholes)(name, **faults),
        config=TrainingConfig(**chosen | options),
        run=run,
        validate=validate,
        export=export,
        run_config={},
        resume=resume,
        device="cpu",
    )


def said_by(run: Path, rank: str) -> Path:
    """Where `train_as_rank` puts what a rank says."""
    return run.with_name(f"{run.name}-rank-{rank}.txt")


FAILED = 7
"""The exit code for an error of drivesim's own."""


def train_as_rank(
    environment: dict[str, str],
    name: str,
    run: Path,
    *,
    most_bytes: int | None = None,
    **options: Any,
) -> None:
    """`rank_train` in a process that `environment` makes a rank, with files of at most a size.

    What it says is in a file beside the run: a fork server's own output is not the test's.
    """
    os.environ.update(environment)
    os.dup2(os.open(said_by(run, environment["RANK"]), os.O_CREAT | os.O_WRONLY), 2)
    if most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        rank_train(name, run, **options)
    except DriveSimError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(FAILED)


if __name__ == "__main__":
    model, folder, arguments = sys.argv[1:]
    try:
        rank_train(model, Path(folder), **json.loads(arguments))
    except (DriveSimError, Interrupted) as stopped:
        print(f"error: {stopped}", file=sys.stderr)
        sys.exit(getattr(stopped, "exit_code", 1))
