"""Read the environment variables of `torchrun`. Without `torchrun` there is only one process."""

import os
import socket


def rank_count() -> int:
    """Return the number of processes that `torchrun` started, or 1 without `torchrun`."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def is_main_process() -> bool:
    """Return whether this process is the one that prints messages (rank 0)."""
    return rank_count() == 1 or os.environ["RANK"] == "0"


def local_rank() -> int:
    """Return the index of this process on its machine. Its GPU has the same index."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def restarts() -> int:
    """Return how often `torchrun --max-restarts` restarted all processes after one died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def launcher() -> str | None:
    """Return a name for the `torchrun` that started this process, or None without `torchrun`.

    The name does not change when `torchrun` restarts the process.
    """
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name is None else f"{name} {socket.gethostname()} {os.getppid()}"
