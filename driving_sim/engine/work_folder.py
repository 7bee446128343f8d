"""A folder that one command fills, in several goes where it is stopped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from driving_sim.engine.config import load_json, save_json
from driving_sim.engine.errors import DriveSimError


def claim_folder(out: Path, name: str, plan: Mapping[str, Any], what: str) -> None:
    """Write `plan` into a new folder as its file `name`, or find just that plan there.

    `what` names, for the message, things made by such a plan. Raises `DriveSimError` for a folder
    with anything else in it.
    """
    # A dot: what a killed run left half-written.
    if not out.exists() or all(path.name.startswith(".") for path in out.iterdir()):
        save_json(out / name, plan)
    elif not (out / name).exists():
        raise DriveSimError(f"{out}: holds other files; choose a new folder for {what}")
    elif load_json(out / name) != plan:
        raise DriveSimError(
            f"{out}: holds {what} of another plan (see {name}); "
            "choose a new folder or delete this one"
        )
