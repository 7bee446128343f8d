"""Choose the device that torch computes on, and read the features of the processor."""

from pathlib import Path

import torch

from driving_sim.engine.errors import DriveSimError


def resolve_device(name: torch.device | str) -> torch.device:
    """Return the device for auto, cuda, mps or cpu. Raises `DriveSimError` if it is missing."""
    if isinstance(name, torch.device):
        return name
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, usable in available.items() if usable))
    if name not in available:
        raise DriveSimError(f"`device` {name}: expected one of auto, {', '.join(available)}")
    if not available[name]:
        raise DriveSimError(f"`device` {name}: torch cannot use it on this machine; try auto")
    return torch.device(name)


def processor_features() -> tuple[str, ...]:
    """Return the names of the processor's features as Linux lists them, or () on other systems."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text("utf-8").splitlines() if information.exists() else []
    line = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return tuple(line.partition(":")[2].split())
