"""Find run folders, check whether a command may write into one, and mark finished runs."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from driving_sim.engine.config import load_json, load_yaml, save_json, save_yaml
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import is_free, tidy
from driving_sim.engine.torchrun import is_main_process, launcher

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
FINISHED = "finished.json"
MODELS = Path(__file__).parents[1] / "models"
"""Folder of the packaged models. Each of its folders is the run folder of a world model."""
_LAUNCHER = ".launcher"  # file that names the `torchrun` which started an unfinished run
_MOST_CONFIG_BYTES = 2**26

CHANGEABLE = (
    *("steps", "minutes", "min_steps", "accumulate", "learning_rate", "patience"),
    *("log_every", "validate_every", "save_every", "keep_last"),
    *("workers", "threads", "gradient_checkpointing", "compile", "shard"),
)
"""Settings that may change when a run is resumed. They control the length of the run, batches per
step, learning rate, logging, saving, and the use of the machine."""


def find_run(run: Path | str, part: str = "") -> Path:
    """Return the folder of a run, which is named by its path or by the name of a packaged model.

    A folder `run` is returned as it is, even if a packaged model has the same name. For a packaged
    model, the folder `part` inside its run folder is returned. If `run` is neither, its path is
    returned, and `check_complete` explains what is wrong.
    """
    path = Path(run)
    if not path.is_dir() and str(path) in packaged_models():
        return MODELS / path / part
    return path


def packaged_models() -> list[str]:
    """Return the names of the models that are packaged with drivesim, sorted."""
    return sorted(path.parent.name for path in MODELS.glob("*/config.json"))


def kind_of(folder: Path) -> object:
    """Return "tokenizer" or "world-model" if `folder` holds such a model, or otherwise None."""
    with suppress(DriveSimError):
        return load_json(folder / "config.json", most_bytes=_MOST_CONFIG_BYTES).get("kind")
    return None


def check_complete(folder: Path, names: Iterable[str], what: str) -> None:
    """Raise `DriveSimError` unless `folder` contains the files of a model, which `names` lists.

    `what` is "tokenizer" or "world model". The message names the packaged models.
    """
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is None:
        return
    models = packaged_models()
    if folder.is_dir() and str(folder) in models:
        raise DriveSimError(
            f"{folder} holds no {what}, but a folder of that name hides the packaged model; rename "
            "the folder, or work in another one"
        )
    similar = get_close_matches(str(folder), models, n=1)
    packaged = f", or name a packaged model ({', '.join(models)})" if models else ""
    reason = f"{missing} is missing" if folder.is_dir() else "there is no such folder"
    raise DriveSimError(
        f"{folder} holds no {what} ({reason}); "
        + (f"did you mean {similar[0]}? Otherwise " if similar else "")
        + f"train one with `drivesim train-{what.replace(' ', '-')}`, or choose another folder"
        + packaged
    )


def goes_on(run: Path, resume: bool) -> bool:
    """Return True if `resume` is true, or if `torchrun` has restarted the processes of `run`."""
    begun_by = run / _LAUNCHER
    if resume or launcher() is None or not (run / CONFIG).is_file() or not begun_by.is_file():
        return resume
    return begun_by.read_text("utf-8") == launcher()


def check_run(run: Path, run_config: Mapping[str, Any], resume: bool) -> None:
    """Raise `DriveSimError` unless a run can be started or resumed in the folder `run`.

    A new run needs a new or empty folder. A resumed run needs the same configuration as before.
    The check is fast, so call it before loading data. `train` repeats the check, so write nothing
    into `run` before you call `train`. On ranks other than the main rank, this does nothing.
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
    """Reserve the folder `out` for a result: write the settings `plan` to the file `name` in it.

    If `out` already contains the same plan, do nothing, so that an interrupted command can be
    continued. Raises `DriveSimError` if `out` contains another plan or other files. `what` names
    the result in messages, for example "a demo".
    """
    if not out.exists() or is_free(out):
        save_json(out / name, plan)
    elif not (out / name).exists():
        raise DriveSimError(
            f"{out}: is a file, or a folder with other files; choose a new folder for {what}"
        )
    elif load_json(out / name) != plan:
        raise DriveSimError(
            f"{out}: contains {what} made with other settings (see {name}); "
            "choose a new folder or delete this one"
        )


def check_replaceable(
    out: Path, report: str, what: str, files_of: Callable[[Mapping[str, Any]], Collection[str]]
) -> None:
    """Raise `DriveSimError` unless `out` is missing, is empty, or contains only an earlier result.

    Every result contains a JSON file with the name `report`. `files_of` receives the content of
    this file, and returns the names of all files of the result. If the content is not that of a
    report, it returns no names, or raises KeyError or TypeError. `what` names the result in
    messages, for example "a scaling law".
    """
    result_files: Collection[str] = ()
    if (out / report).is_file():
        with suppress(KeyError, TypeError):
            result_files = files_of(load_json(out / report))

    def is_foreign(path: Path) -> bool:
        is_folder = path.is_dir() and not path.is_symlink()
        return not is_folder and path.relative_to(out).as_posix() not in result_files

    if out.exists() and (not out.is_dir() or any(map(is_foreign, out.rglob("*")))):
        raise DriveSimError(
            f"{out} contains files that do not belong to {what}: choose another `out`"
        )


def is_finished(run: Path) -> bool:
    """Return whether the training of `run` has ended. An unfinished run can have weights too."""
    return (run / FINISHED).is_file()


def mark_finished(run: Path, result: Mapping[str, Any]) -> None:
    """Write the result of the run to a file. The file marks the run as finished."""
    save_json(run / FINISHED, result)
    (run / _LAUNCHER).unlink(missing_ok=True)


def mark_unfinished(run: Path) -> None:
    """Delete the file that marks the run as finished, because the run continues."""
    (run / FINISHED).unlink(missing_ok=True)


def _check_same(run: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    # Convert `now` to JSON and back to turn its tuples into lists, because YAML has no tuples.
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
