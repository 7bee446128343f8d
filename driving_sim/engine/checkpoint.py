"""Checkpoints: folders of safetensors and JSON, written whole or not at all, never unpickled."""

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from driving_sim.engine.config import load_json, save_json
from driving_sim.engine.ema import Ema
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_folder
from driving_sim.engine.optimizer import load_optimizer_tensors, optimizer_tensors

_NAME = re.compile(r"step-(\d{8,})")


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema,
    state: Mapping[str, Any],
) -> Path:
    """Write `folder/step-XXXXXXXX` with everything that a run needs to go on; return its path.

    Frozen parameters are left out: who builds the model gives them the same values again.
    """
    path = folder / f"step-{step:08d}"
    with atomic_folder(path) as temporary:
        _save_tensors(temporary / "model.safetensors", _changing_tensors(model))
        _save_tensors(temporary / "optimizer.safetensors", optimizer_tensors(optimizer, model))
        _save_tensors(temporary / "ema.safetensors", ema.state_dict())
        save_json(temporary / "state.json", {**state, "ema_updates": ema.updates})
    return path


def load_checkpoint(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema
) -> dict[str, Any]:
    """Put a checkpoint into model, optimiser and EMA; return its state.

    Raises `DriveSimError` where files are missing or damaged or were made for another model.
    """
    state = load_json(path / "state.json")
    try:
        _load_model(model, load_file(path / "model.safetensors"))
        load_optimizer_tensors(optimizer, model, load_file(path / "optimizer.safetensors"))
        ema.load_state_dict(load_file(path / "ema.safetensors"), state.pop("ema_updates"))
    except (KeyError, OSError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise DriveSimError(
            f"{path} is damaged or was made for another model ({reason}); remove it to resume "
            "from the checkpoint before it"
        ) from error
    return state


def latest(folder: Path) -> Path | None:
    """The checkpoint with the highest step in `folder`; None where there is none."""
    return max(_all(folder), key=step_of, default=None)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def prune(folder: Path, *, keep_last: int, best_step: int | None) -> None:
    """Remove all checkpoints but the newest `keep_last` and the best, and what a kill left over."""
    for path in sorted(_all(folder), key=step_of)[:-keep_last]:
        if step_of(path) != best_step:
            shutil.rmtree(path)
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]


def _changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters, tied ones once, and the buffers that belong to the state."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    buffers = {name: v for name, v in model.state_dict().items() if name not in parameters}
    return trainable | buffers


@torch.no_grad()
def _load_model(model: nn.Module, saved: dict[str, Tensor]) -> None:
    tensors = _changing_tensors(model)
    for name in sorted(tensors.keys() | saved.keys()):
        # Not left to copy_, which would also fill a large tensor from a small one.
        if tensors[name].shape != saved[name].shape:
            raise KeyError(f"{name} has another shape")
        tensors[name].copy_(saved[name])


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # As bytes, because `save_file` makes files that only their owner can read.
    path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
