"""A model and data small enough to train in milliseconds; `python -m` trains it in a process."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from driving_sim.engine.errors import Interrupted
from driving_sim.engine.optimizer import ParameterGroup, decay_groups
from driving_sim.engine.training import Batch, TrainingConfig, TrainingResult, Validation, train

EXPORTED = "model.safetensors"


class TinyModel(nn.Module):
    """A linear map with dropout, and a second player that has no gradient before step 3."""

    def __init__(self, dropout: float = 0.25) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Dropout(dropout), nn.Linear(4, 1))
        self.late = nn.Linear(4, 1)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss = (self.net(batch["x"]) - batch["y"]).square().mean()
        metrics = {"progress": batch["progress"]}
        if batch["step"] >= 3:
            late = (self.late(batch["x"]) - batch["y"]).square().mean()
            loss, metrics["late"] = loss + late, late
        return loss, metrics

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            *decay_groups(self.net, name="net"),
            *decay_groups(self.late, name="late", clip="late", lr_scale=0.5),
        ]

    def ema_module(self) -> nn.Module:
        return self.net

    def blocks(self) -> list[nn.Module]:
        return [self.net, self.late]


class TinyBatches(Dataset[Batch]):
    """Batch n is a function of n; `nan_at` names batches that hold a NaN."""

    def __init__(self, rows: int = 4, seconds: float = 0.0, nan_at: tuple[int, ...] = ()) -> None:
        self.rows, self.seconds, self.nan_at = rows, seconds, nan_at

    def __getitem__(self, number: int) -> Batch:
        time.sleep(self.seconds)
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(self.rows, 4, generator=generator)
        y = x.sum(dim=1, keepdim=True) + 1.0
        return {"x": x, "y": y * torch.nan if number in self.nan_at else y}


def validate(model: nn.Module) -> Validation:
    batch = TinyBatches(rows=64)[10**6]
    with torch.autocast("cpu", enabled=False):
        error = (model.net(batch["x"]) - batch["y"]).square().mean()  # type: ignore[operator]
    return Validation(score=float(error))


def export(module: nn.Module, run: Path) -> None:
    save_file({name: value.clone() for name, value in module.state_dict().items()}, run / EXPORTED)


def tiny_config(**options: Any) -> TrainingConfig:
    chosen: dict[str, Any] = {
        "learning_rate": 0.05,
        "log_every": 5,
        "validate_every": 10,
        "save_every": 10,
        "workers": 0,
        "precision": "fp32",
    }
    chosen |= options
    if "minutes" not in chosen:
        chosen.setdefault("steps", 30)
    return TrainingConfig(**chosen)


def tiny_train(run: Path, **options: Any) -> TrainingResult:
    """Train the tiny model; what is not an argument of `train` or named here is a config option."""
    arguments: dict[str, Any] = {
        "model": None,
        "dataset": TinyBatches(),
        "validate": validate,
        "export": export,
        "resume": False,
        "run_config": {},
    }
    arguments |= {name: options.pop(name) for name in arguments.keys() & options.keys()}
    arguments["model"] = arguments["model"] or TinyModel()
    return train(config=tiny_config(**options), run=run, device="cpu", **arguments)


def checkpoint_tensors(run: Path, step: int) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by file and name."""
    return {
        f"{file.stem}/{name}": value
        for file in (run / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")
        for name, value in load_file(file).items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, mode, batch_seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    try:
        tiny_train(folder, resume=mode == "resume", dataset=TinyBatches(seconds=batch_seconds))
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
