"""What `torchrun` tells a process in its environment; without it, the process is alone."""

import os
import socket


def rank_count() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_main_process() -> bool:
    """Whether this is the one of them that talks to the user."""
    return rank_count() == 1 or os.environ["RANK"] == "0"


def local_rank() -> int:
    """Its number on its machine: that of its device."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def restarts() -> int:
    """How often `torchrun --max-restarts` started all of them again after one died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launcher() -> str | None:
    """Which `torchrun` started this process: the same one after a restart; None without one."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name is None else f"{name} {socket.gethostname()} {os.getppid()}"
