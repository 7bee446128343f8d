"""Check whether a command may write into an existing folder, such as that of a training run."""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from driving_sim.engine.config import load_json, load_yaml, save_json, save_yaml
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import is_free, tidy
from driving_sim.engine.torchrun import is_main_process, launcher

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
FINISHED = "finished.json"
_LAUNCHER = ".launcher"  # file that names the `torchrun` which started an unfinished run

CHANGEABLE = (
    *("steps", "minutes", "min_steps", "accumulate", "learning_rate", "patience"),
    *("log_every", "validate_every", "save_every", "keep_last"),
    *("workers", "threads", "gradient_checkpointing", "compile", "shard"),
)
"""Settings that may change when a run is resumed: its length, batches per step and learning rate,
what it logs and saves, and how it uses the machine."""


def goes_on(run: Path, resume: bool) -> bool:
    """Return whether to continue `run`: if `resume` is true, or if `torchrun` restarted it."""
    begun_by = run / _LAUNCHER
    if resume or launcher() is None or not (run / CONFIG).is_file() or not begun_by.is_file():
        return resume
    return begun_by.read_text("utf-8") == launcher()


def check_run(run: Path, run_config: Mapping[str, Any], resume: bool) -> None:
    """Raise `DriveSimError` unless a run can be started or resumed in the folder `run`.

    A new run needs a new or empty folder. A resumed run needs the same configuration as before.
    The check is fast, so call it before loading data. `train` checks again, so do not write into
    `run` in between. Only the main rank checks.
    """
    if not is_main_process():
        return
    resume = goes_on(run, resume)
    has_config = (run / CONFIG).is_file()
    if resume and not has_config:
        raise DriveSimError(f"{run}: nothing to resume (no {CONFIG}); leave out `resume`")
    if resume:
        _check_same(run, load_yaml(run / CONFIG), run_config)
    elif has_config:
        raise DriveSimError(
            f"{run} already holds a run: continue it with `resume` or choose another `run`"
        )
    elif run.exists() and not is_free(run):
        raise DriveSimError(f"{run} exists and is not a run: choose another `run`")


def prepare_run(run: Path, run_config: Mapping[str, Any], resume: bool) -> None:
    """Check the folder `run`, create it if needed, and write the resolved config into it."""
    check_run(run, run_config, resume)
    run.mkdir(parents=True, exist_ok=True)
    if launcher() is not None:
        (run / _LAUNCHER).write_text(str(launcher()), "utf-8")
    tidy(run)
    save_yaml(run / CONFIG, run_config)


def claim_folder(out: Path, name: str, plan: Mapping[str, Any], what: str) -> None:
    """Write `plan` to the file `name` in a new folder `out`, or accept a folder with the same plan.

    `what` says in messages what the plan produces. Raises `DriveSimError` if `out` holds another
    plan or other files.
    """
    if not out.exists() or is_free(out):
        save_json(out / name, plan)
    elif not (out / name).exists():
        raise DriveSimError(
            f"{out}: is a file, or a folder with other files; choose a new folder for {what}"
        )
    elif load_json(out / name) != plan:
        raise DriveSimError(
            f"{out}: holds {what} of another plan (see {name}); "
            "choose a new folder or delete this one"
        )


def check_replaceable(
    out: Path, report: str, what: str, files_of: Callable[[Mapping[str, Any]], Collection[str]]
) -> None:
    """Raise `DriveSimError` unless `out` is absent, empty, or holds only an earlier result.

    `files_of` receives the content of the result's file `report` and returns the names of the
    result's files. If another program wrote `report`, `files_of` returns no names or raises
    KeyError or TypeError. `what` names the result in the message.
    """
    result_files: Collection[str] = ()
    if (out / report).is_file():
        with suppress(KeyError, TypeError):
            result_files = files_of(load_json(out / report))

    def is_foreign(path: Path) -> bool:
        is_folder = path.is_dir() and not path.is_symlink()
        return not is_folder and path.relative_to(out).as_posix() not in result_files

    if out.exists() and (not out.is_dir() or any(map(is_foreign, out.rglob("*")))):
        raise DriveSimError(f"{out} holds more than {what}: choose another `out`")


def is_finished(run: Path) -> bool:
    """Return whether `run` trained to its end. Before that, its weights are the best so far."""
    return (run / FINISHED).is_file()


def mark_finished(run: Path, result: Mapping[str, Any]) -> None:
    """Write the result of the run, which marks the run as finished for `is_finished`."""
    save_json(run / FINISHED, result)
    (run / _LAUNCHER).unlink(missing_ok=True)


def mark_unfinished(run: Path) -> None:
    """Remove the mark of `mark_finished`, because the run continues."""
    (run / FINISHED).unlink(missing_ok=True)


def _check_same(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    # Converting to JSON turns tuples into lists, as the values in the YAML file are.
    old, new = dict(_leaves(before)), dict(_leaves(json.loads(json.dumps(now))))
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key) and key.rpartition(".")[2] not in CHANGEABLE:
            raise DriveSimError(
                f"{run} was started with {key}={old.get(key)}, now it is {new.get(key)}: resume "
                "with the same configuration or choose another `run`"
            )


def _leaves(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
