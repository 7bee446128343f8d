"""Which device to work on, and what a processor can do."""

from pathlib import Path

import torch

from driving_sim.engine.errors import DriveSimError


def resolve_device(name: torch.device | str) -> torch.device:
    """The device behind auto, cuda, mps or cpu; `DriveSimError` where it is not there."""
    if isinstance(name, torch.device):
        return name
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if name not in available:
        raise DriveSimError(f"`device` {name}: expected one of auto, {', '.join(available)}")
    if not available[name]:
        raise DriveSimError(f"`device` {name}: this machine has none that torch can use; try auto")
    return torch.device(name)


def processor_features() -> tuple[str, ...]:
    """What Linux says that this processor can do; empty elsewhere."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text("utf-8").splitlines() if information.exists() else []
    line = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return tuple(line.partition(":")[2].split())
