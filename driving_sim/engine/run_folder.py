"""When a folder may be used again: a training run's, or one that a command fills bit by bit."""

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
_LAUNCHER = ".launcher"  # which torchrun began a run that is not over

CHANGEABLE = (
    *("steps", "minutes", "min_steps", "accumulate", "learning_rate", "patience"),
    *("log_every", "validate_every", "save_every", "keep_last"),
    *("workers", "threads", "gradient_checkpointing", "compile", "shard"),
)
"""What a resumed run may change: how long it lasts, what it writes, how it computes the same, and
the usual remedy."""


def goes_on(run: Path, resume: bool) -> bool:
    """Whether to continue `run`: as asked, or as the `torchrun` that began it started it again."""
    begun_by = run / _LAUNCHER
    if resume or launcher() is None or not (run / CONFIG).is_file() or not begun_by.is_file():
        return resume
    return begun_by.read_text("utf-8") == launcher()


def check_run(run: Path, run_config: Mapping[str, Any], resume: bool) -> None:
    """Raise `DriveSimError` unless `run` is free to start in, or, if it `goes_on`, the same run.

    Cheap: call it before loading data. `train` checks again, so write nothing into `run` before.
    Of several ranks, the main one looks.
    """
    if not is_main_process():
        return
    resume = goes_on(run, resume)
    known = (run / CONFIG).is_file()
    if resume and not known:
        raise DriveSimError(f"nothing to resume in {run} (no {CONFIG}): leave `resume` out")
    if resume:
        _check_same(run, load_yaml(run / CONFIG), run_config)
    elif known:
        raise DriveSimError(
            f"{run} already holds a run: continue it with `resume` or choose another `run`"
        )
    elif run.exists() and not is_free(run):
        raise DriveSimError(f"{run} exists and is not a run: choose another `run`")


def prepare_run(run: Path, run_config: Mapping[str, Any], resume: bool) -> None:
    """Check the folder, create it where needed and write the resolved config into it."""
    check_run(run, run_config, resume)
    run.mkdir(parents=True, exist_ok=True)
    if launcher() is not None:
        (run / _LAUNCHER).write_text(str(launcher()), "utf-8")
    tidy(run)
    save_yaml(run / CONFIG, run_config)


def claim_folder(out: Path, name: str, plan: Mapping[str, Any], what: str) -> None:
    """Write `plan` into a new folder as its file `name`, or find just that plan there.

    `what` names, for the message, things made by such a plan. Raises `DriveSimError` for a folder
    with anything else in it.
    """
    if not out.exists() or is_free(out):
        save_json(out / name, plan)
    elif not (out / name).exists():
        raise DriveSimError(
            f"{out}: is a file, or a folder with other files; choose a new one for {what}"
        )
    elif load_json(out / name) != plan:
        raise DriveSimError(
            f"{out}: holds {what} of another plan (see {name}); "
            "choose a new folder or delete this one"
        )


def check_replaceable(
    out: Path, report: str, what: str, files_of: Callable[[Mapping[str, Any]], Collection[str]]
) -> None:
    """Raise `DriveSimError` unless `out` is absent or empty, or holds an earlier result alone.

    `files_of` lists the result's files by what its file `report` says: none, or a KeyError or
    TypeError, where another program wrote that. `what` names such a result for the message.
    """
    known: Collection[str] = ()
    if (out / report).is_file():
        with suppress(KeyError, TypeError):
            known = files_of(load_json(out / report))

    def is_foreign(path: Path) -> bool:
        is_folder = path.is_dir() and not path.is_symlink()
        return not is_folder and path.relative_to(out).as_posix() not in known

    if out.exists() and (not out.is_dir() or any(map(is_foreign, out.rglob("*")))):
        raise DriveSimError(f"{out} holds more than {what}: choose another `out`")


def is_finished(run: Path) -> bool:
    """Whether `run` trained to its end; until then what it holds is only the best so far."""
    return (run / FINISHED).is_file()


def mark_finished(run: Path, result: Mapping[str, Any]) -> None:
    """Write what the run came to: the mark that `is_finished` looks for."""
    save_json(run / FINISHED, result)
    (run / _LAUNCHER).unlink(missing_ok=True)


def mark_unfinished(run: Path) -> None:
    """Take the mark away: the run goes on."""
    (run / FINISHED).unlink(missing_ok=True)


def _check_same(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    # Through JSON, as the file's values went through YAML: tuples are lists there.
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
