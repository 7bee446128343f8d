"""Read the size, the training tokens and the bits per token of a world-model run.

Compute is C = 6 N D: for each weight and each token, the forward pass takes 2 floating-point
operations and the backward pass 4 (Kaplan et al., arXiv 2001.08361; GAIA-1 counts in the same way).

N is the number of weights in the matrices that every token is multiplied with. These are the
matrices of the blocks, of the layer that reads the previous frame's neighbouring tokens, and of the
projection to logits. As in both papers, N does not count embeddings, which are lookup tables. Nor
does it count the action layers, which are small and run only once a frame. Unlike in the papers, N
counts the projection to logits. It is a large part of the work of small models, and without it the
losses of the runs do not follow a power law (Porian et al., arXiv 2406.19146).

D is the number of training tokens. A token that is trained on twice counts twice.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import AliasPath, ConfigDict, Field
from pydantic.fields import FieldInfo
from safetensors import SafetensorError, safe_open

from driving_sim.engine.config import Count, from_dict, load_json, load_yaml
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line, parse_json
from driving_sim.engine.run_folder import CONFIG, FINISHED, is_finished

FLOPS_PER_WEIGHT_AND_TOKEN = 6
"""Floating-point operations for one weight and one token, in the forward and backward passes."""

_WEIGHTS = "model.safetensors"
_MODEL = "config.json"
_METRICS = "metrics.jsonl"
_LOGITS = "output.codes"
_MAX_NUMBER = 1e18  # A larger number in a file means that the file is damaged or malicious.


def _in(*keys: str) -> FieldInfo:
    """Return a field that is read from a file. `keys` are the file's name and the keys in it."""
    field: FieldInfo = Field(validation_alias=AliasPath(*keys))
    return field


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingRun:
    """A finished world-model run, as one data point for a scaling law."""

    path: Path
    """Folder of the run."""
    parameters: int
    """N, the number of weights in the matrices that every token is multiplied with."""
    all_parameters: int
    """Number of all trained weights."""
    tokens: int
    """D, the number of training tokens up to the best step. The run keeps that step's weights."""
    bits: float
    """Bits per token on the validation drives at the best step."""
    attention_share: float
    """Compute of attention (multiplying queries, keys and values), as a fraction of 6 N D."""
    best_step: int
    """Step with the lowest bits per token."""
    steps: int
    """Number of steps of the whole run."""
    conditions: Mapping[str, str]
    """Settings by name. The bits of two runs are comparable only if these are equal."""

    @property
    def compute(self) -> float:
        """Training compute C = 6 N D, in floating-point operations."""
        return training_flops(self.parameters, self.tokens)


def training_flops(parameters: float, tokens: float) -> float:
    """Return the training compute 6 N D, in floating-point operations."""
    return float(FLOPS_PER_WEIGHT_AND_TOKEN * parameters * tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """The values that are read from a run's files. All other values in them are ignored."""

    __pydantic_config__: ClassVar = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    content: Annotated[str, _in(CONFIG, "store", "content")]
    tokenizer: Annotated[str, _in(CONFIG, "store", "tokenizer")]
    windows: Annotated[Count, _in(CONFIG, "data", "validation_windows")]
    batch_size: Annotated[Count, _in(CONFIG, "data", "batch_size")]
    context: Annotated[Count, _in(CONFIG, "model", "context_frames")]
    accumulate: Annotated[Count, _in(CONFIG, "training", "accumulate")] = 1
    rows: Annotated[Count, _in(_MODEL, "config", "grid", "rows")]
    cols: Annotated[Count, _in(_MODEL, "config", "grid", "cols")]
    drives: Annotated[tuple[str, ...], _in(_MODEL, "config", "validation_drives")]
    bits: Annotated[float, Field(gt=0, lt=_MAX_NUMBER), _in(FINISHED, "best_score")]
    best_step: Annotated[Count, _in(FINISHED, "best_step")]
    steps: Annotated[Count, _in(FINISHED, "steps")]
    batches: Annotated[Count | None, _in(FINISHED, "batches")] = None


def read_run(path: Path) -> ScalingRun:
    """Read the folder of a finished world-model run.

    Raises DriveSimError if `path` is not such a folder or its files are damaged, if the run started
    from the weights of another run, or if it was validated on its training data.
    """
    record = _read_record(path)
    tokens = _batches(path / _METRICS, record) * record.batch_size
    tokens *= record.context * record.rows * record.cols
    if tokens >= _MAX_NUMBER:
        raise DriveSimError(
            f"{path}: its files claim that it trained on {tokens:.0e} tokens, which is impossible; "
            "copy the run folder again"
        )
    weights = _shapes(path / _WEIGHTS)
    parameters = _token_matrices(weights, path / _WEIGHTS)
    slots = record.context * record.rows * (record.cols + 1)
    return ScalingRun(
        path=path,
        parameters=parameters,
        all_parameters=sum(map(math.prod, weights.values())),
        tokens=round(tokens),
        bits=record.bits,
        attention_share=_attention(weights, slots) / parameters,
        best_step=record.best_step,
        steps=record.steps,
        conditions={
            "store.content": record.content,
            "store.tokenizer": record.tokenizer,
            "data.validation_windows": str(record.windows),
            # Compare only runs of equal context, because a longer context lowers the bits.
            "model.context_frames": str(record.context),
            "list of validation drives": ", ".join(record.drives),
        },
    )


def _read_record(path: Path) -> _Record:
    """Read a run's files, and check that the run is finished and can be used for a law."""
    if not (path / CONFIG).is_file():
        raise DriveSimError(
            f"{path}: not a training run ({CONFIG} is missing); name the folder of a run"
        )
    settings = load_yaml(path / CONFIG)
    if "store" not in settings:
        raise DriveSimError(f"{path}: not the run of a world model; name runs of train-world-model")
    if not is_finished(path):
        raise DriveSimError(f"{path}: unfinished run; finish it with `resume`, or leave it out")
    if settings.get("init_from"):
        raise DriveSimError(
            f"{path}: the run started from the weights of another (`init_from`), whose compute is "
            "unknown; leave it out"
        )
    content = {CONFIG: settings} | {name: load_json(path / name) for name in (_MODEL, FINISHED)}
    try:
        record = from_dict(_Record, content, where="")
    except DriveSimError as error:
        raise DriveSimError(f"{path}: {str(error).lstrip('.')}; train the model again") from error
    if record.best_step > record.steps or (record.batches or record.steps) < record.steps:
        raise DriveSimError(
            f"{path / FINISHED}: best step {record.best_step}, {record.steps} steps and "
            f"{record.batches} batches contradict each other; copy the run folder again"
        )
    if not record.drives:
        raise DriveSimError(
            f"{path}: the run was validated on drives that it was trained on; leave it out"
        )
    return record


def _batches(metrics: Path, record: _Record) -> float:
    """Return the number of batches that all ranks together trained on up to the best step.

    If the metrics do not contain this number, estimate it from the number of batches of the whole
    run. If the record does not contain that number either, assume that there was only one rank.
    """
    best = record.best_step
    for line in metrics.read_bytes().splitlines() if metrics.is_file() else []:
        try:
            row = parse_json(line)
        except ValueError:
            continue  # A killed run can leave an incomplete line.
        if isinstance(row, dict) and (row.get("phase"), row.get("step")) == ("train", best):
            batches = row.get("batches")
            if isinstance(batches, int | float) and 1 <= batches < _MAX_NUMBER:
                return float(batches)
    if record.batches is None:
        return best * record.accumulate
    return best * record.batches / record.steps


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight by name. Reads only the header of the file."""
    try:
        with safe_open(file, "np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DriveSimError(
            f"{file}: not a readable safetensors file ({one_line(error)}); copy it again"
        ) from error


def _token_matrices(weights: Mapping[str, tuple[int, ...]], file: Path) -> int:
    """Return N, the number of weights in the matrices that every token is multiplied with."""
    if _LOGITS not in weights or not any(name.startswith("blocks.") for name in weights):
        raise DriveSimError(f"{file}: not the weights of a world model; copy the run folder again")
    count = sum(
        math.prod(shape)
        for name, shape in weights.items()
        if len(shape) == 2 and (name.startswith("blocks.") or name in ("gather.weight", _LOGITS))
    )
    if not count:
        raise DriveSimError(f"{file}: its matrices are empty; copy the run folder again")
    return count


def _attention(weights: Mapping[str, tuple[int, ...]], slots: int) -> int:
    """Return the number of multiplications per token in the products of queries, keys and values.

    N does not count them, because they use no weights. With a causal mask, a slot attends to half
    of the window's slots on average, so the products take width * slots multiplications per layer.
    """
    layers = [shape for name, shape in weights.items() if name.endswith(".attention.out.weight")]
    return sum(shape[0] for shape in layers if shape) * slots
