"""Choose the device that torch computes on, and list the features of the CPU."""

from pathlib import Path

import torch

from driving_sim.engine.errors import DriveSimError


def resolve_device(name: torch.device | str) -> torch.device:
    """Return the torch device with the name cuda, mps or cpu. auto is the first available of these.

    Raises `DriveSimError` if the name is unknown, or if torch cannot use the device.
    """
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
    """Return the CPU's features in /proc/cpuinfo, such as "avx2". On other systems, return ()."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text("utf-8").splitlines() if information.exists() else []
    line = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return tuple(line.partition(":")[2].split())
