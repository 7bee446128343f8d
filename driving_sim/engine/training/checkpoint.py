"""Checkpoints: folders of safetensors and JSON files, written atomically and never unpickled.

If every rank has the complete model, a run writes `model.safetensors`, `optimizer.safetensors`
and `ema.safetensors`. A sharded run writes one safetensors file per rank. Both kinds of run can
resume from both kinds of checkpoint, with any number of ranks. `checksums.json` shows whether the
files are still as they were written.
"""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from driving_sim.engine.config import load_json, save_json
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.files import atomic_folder, sha256_of, temporary_beside
from driving_sim.engine.parsing import one_line, shown
from driving_sim.engine.ranks.distributed import Ranks
from driving_sim.engine.ranks.sharding import (
    SHARDS,
    is_sharded,
    load_shards,
    placed_like,
    save_shards,
)
from driving_sim.engine.training.ema import Ema
from driving_sim.engine.training.optimizer import Optimizers
from driving_sim.engine.weights import write_tensors

CHECKSUMS = "checksums.json"
STATE = "state.json"
_PARTS = ("model", "optimizer", "ema")
_NAME = re.compile(r"step-(\d{8,})")


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: nn.Module,
    optimizers: Optimizers,
    ema: Ema,
    state: Mapping[str, Any],
    ranks: Ranks | None = None,
) -> Path:
    """Write the checkpoint `folder/step-XXXXXXXX`, from which a run can resume. Return its path.

    Every rank has to call this function. If the model is not sharded, only the main rank writes.
    Frozen parameters are not saved, because they already have the same values when the model is
    built again.
    """
    ranks = ranks or Ranks()
    path = checkpoint_path(folder, step)
    parts = {
        "model": changing_tensors(model),
        "optimizer": optimizers.tensors(),
        "ema": ema.averages,
    }
    with _shared_folder(path, ranks) as temporary:
        if any(is_sharded(parameter) for parameter in model.parameters()):
            named = ((part, name, t) for part in parts for name, t in parts[part].items())
            save_shards(temporary, {f"{part}/{name}": tensor for part, name, tensor in named})
        elif ranks.is_main:
            for part, tensors in parts.items():
                write_tensors(temporary / f"{part}.safetensors", tensors)
        if ranks.is_main:
            save_json(temporary / STATE, {**state, "ema_updates": int(ema.updates)})
        _save_checksums(temporary, ranks)
    ranks.barrier()
    return path


@torch.no_grad()
def load_checkpoint(
    path: Path, *, model: nn.Module, optimizers: Optimizers, ema: Ema
) -> dict[str, Any]:
    """Load a checkpoint into the model, the optimisers and the EMA. Return the saved `state`.

    Raises `DriveSimError` if files are missing or belong to another model.
    """
    state = load_json(path / STATE)
    try:
        saved = _load_parts(path, model, ema)
        for part, current in {"model": changing_tensors(model), "ema": ema.averages}.items():
            for name in sorted(current.keys() | saved[part].keys()):
                current[name].copy_(placed_like(saved[part][name], current[name]))
        optimizers.load_tensors(saved["optimizer"])
        ema.updates = torch.tensor(state.pop("ema_updates"), dtype=torch.float64)
    except (KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        raise DriveSimError(
            f"{path} was made for another model ({one_line(error)}): resume with the configuration "
            "of that model, or choose another `run`"
        ) from error
    return state


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint, and one line for each newer, damaged checkpoint.

    If the folder contains no checkpoints, return None instead of a checkpoint. Raises
    `DriveSimError` if all checkpoints are damaged.
    """
    notices: list[str] = []
    for path in reversed(checkpoints(folder)):
        fault = damage(path)
        if fault is None:
            return path, notices
        notices.append(f"{path} is damaged ({fault}): continuing from the checkpoint before it")
    if notices:
        raise DriveSimError(
            f"{folder}: every checkpoint is damaged, for example "
            f"{notices[0].partition(': ')[0]}; restore one from a copy, or start again with "
            "another `run`"
        )
    return None, []


def damage(path: Path) -> str | None:
    """Return a text that says how a checkpoint is damaged, or None if its checksums are right."""
    try:
        written = load_json(path / CHECKSUMS)
        files = {file.name: file for file in _files(path)}
        for name in sorted(written.keys() | files.keys()):
            if name not in files:
                return f"{shown(name)} is missing"
            if name not in written:
                return f"{shown(name)} does not belong there"
            if not files[name].is_file() or sha256_of(files[name]) != written[name]:
                return f"{name} has a wrong checksum"
    except DriveSimError:
        return f"no readable {CHECKSUMS}, which checkpoints of earlier versions lack"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    return None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` steps."""
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step number in the name of a checkpoint."""
    return int(path.name.removeprefix("step-"))


def remove_after(path: Path) -> None:
    """Delete all checkpoints that are newer than the checkpoint `path`."""
    for checkpoint in checkpoints(path.parent):
        if step_of(checkpoint) > step_of(path):
            shutil.rmtree(checkpoint)


def prune(folder: Path, *, keep_last: int, best_step: int | None) -> None:
    """Keep the newest `keep_last` checkpoints and that of `best_step`. Delete all others.

    Checkpoints that were not written completely are deleted too.
    """
    for path in checkpoints(folder)[:-keep_last]:
        if step_of(path) != best_step:
            shutil.rmtree(path)
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, sorted by step."""
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def _files(path: Path) -> list[Path]:
    """Return the paths of all files in a checkpoint except the file of checksums."""
    return sorted(file for file in path.iterdir() if file.name != CHECKSUMS)


def _save_checksums(path: Path, ranks: Ranks) -> None:
    """Write the checksums of all files. The ranks share the work, because hashing is slow."""
    ranks.barrier()  # wait until all ranks have written their files
    own_files = _files(path)[ranks.rank :: ranks.size]
    shares = ranks.gather({file.name: sha256_of(file) for file in own_files})
    if ranks.is_main:
        digests = {name: digest for share in shares for name, digest in share.items()}
        # List the files again: on a network file system, a rank may not have seen all of them.
        files = _files(path)
        save_json(path / CHECKSUMS, {f.name: digests.get(f.name) or sha256_of(f) for f in files})


@contextmanager
def _shared_folder(path: Path, ranks: Ranks) -> Iterator[Path]:
    """Yield the same temporary folder on all ranks.

    The main rank creates the folder, and renames it to `path` on success.
    """
    same_folder = temporary_beside(path, ranks.from_main(os.getpid))
    with atomic_folder(path) if ranks.is_main else nullcontext(same_folder) as temporary:
        ranks.barrier()
        yield temporary


def changing_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters and the persistent buffers. Tied parameters appear once."""
    trainable = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return trainable | state_buffers(model)


def state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the persistent buffers of the model by name, without copying them."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {name: v for name, v in model.state_dict().items() if name not in parameters}


def _load_parts(path: Path, model: nn.Module, ema: Ema) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a checkpoint, by part (model, optimizer or ema) and by name.

    If the run that saved the checkpoint was sharded, the tensors are sharded as in `model`.
    """
    if not any(path.glob(SHARDS)):
        return {part: load_file(path / f"{part}.safetensors") for part in _PARTS}
    likes: dict[str, Tensor] = {f"ema/{name}": average for name, average in ema.averages.items()}
    likes |= {f"model/{name}": tensor for name, tensor in changing_tensors(model).items()}
    likes |= {f"optimizer/{name}": parameter for name, parameter in model.named_parameters()}
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, tensor in load_shards(path, likes).items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor
    return parts
