"""What a scaling law needs of a world-model run: its size, what it was trained on, its bits.

Compute is C = 6 N D: each weight and token costs 2 floating-point operations forward and 4 backward
(Kaplan et al., arXiv 2001.08361; GAIA-1 counts the same). N are the weights of the matrices that
every token passes through: those of the blocks, of the previous frame's neighbourhood and of the
projection to logits. Embeddings are looked up, not multiplied with, and do not count, as in both
papers; what runs once a frame (the actions) is too little to count. The logits do count, unlike
there: they are much of the work of models as small as these, and leaving them out bends the law
(Porian et al., arXiv 2406.19146). D are the tokens trained on, new or seen before.
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
"""Forward and backward."""

_WEIGHTS = "model.safetensors"
_MODEL = "config.json"
_METRICS = "metrics.jsonl"
_LOGITS = "output.codes"
_MOST = 1e18  # of anything: what is beyond is damage, or made to do harm


def _in(*keys: str) -> FieldInfo:
    """Where a field stands: the file and the keys in it."""
    found: FieldInfo = Field(validation_alias=AliasPath(*keys))
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingRun:
    """A finished world-model run as a point of a scaling law."""

    path: Path
    """Its folder."""
    parameters: int
    """N: weights of the matrices that every token passes through."""
    all_parameters: int
    """Everything that is trained."""
    tokens: int
    """D: tokens trained on up to the best validation, whose weights are kept."""
    bits: float
    """Bits per token of the validation drives, the best of the run."""
    attention_share: float
    """What attention's own products add to 6 N D, as a share of it."""
    best_step: int
    """The step with these bits."""
    steps: int
    """Steps of the whole run."""
    conditions: Mapping[str, str]
    """What must be the same for two runs' bits to be comparable, by what it is."""

    @property
    def compute(self) -> float:
        """C = 6 N D, in floating-point operations."""
        return training_flops(self.parameters, self.tokens)


def training_flops(parameters: float, tokens: float) -> float:
    """The 6 N D of a training."""
    return float(FLOPS_PER_WEIGHT_AND_TOKEN * parameters * tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """What counts of a run's files; the rest of them is not the same in all versions."""

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
    bits: Annotated[float, Field(gt=0, lt=_MOST), _in(FINISHED, "best_score")]
    best_step: Annotated[Count, _in(FINISHED, "best_step")]
    steps: Annotated[Count, _in(FINISHED, "steps")]
    batches: Annotated[Count | None, _in(FINISHED, "batches")] = None


def read_run(path: Path) -> ScalingRun:
    """Read a finished run's folder; `DriveSimError` where it is none, or says nothing of scaling.

    A run started from other weights, or validated on what it trained on, is refused.
    """
    record = _read_record(path)
    tokens = _batches(path / _METRICS, record) * record.batch_size
    tokens *= record.context * record.rows * record.cols
    if tokens >= _MOST:
        raise DriveSimError(f"{path}: trained on {tokens:.0e} tokens, it says: copy it again")
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
            # The longer the past that a token is predicted from, the fewer bits it takes.
            "model.context_frames": str(record.context),
            "validation drives": ", ".join(record.drives),
        },
    )


def _read_record(path: Path) -> _Record:
    """Read a run's files, if its loss is the work of its own training alone."""
    if not (path / CONFIG).is_file():
        raise DriveSimError(f"{path}: no training run ({CONFIG} is missing)")
    settings = load_yaml(path / CONFIG)
    if "store" not in settings:
        raise DriveSimError(f"{path}: not a world model's run; name runs of train-world-model")
    if not is_finished(path):
        raise DriveSimError(f"{path} is unfinished: finish it with `resume`, or leave it out")
    if settings.get("init_from"):
        raise DriveSimError(
            f"{path} was started from other weights (`init_from`), whose compute is not in it: "
            "leave it out"
        )
    written = {CONFIG: settings} | {name: load_json(path / name) for name in (_MODEL, FINISHED)}
    try:
        record = from_dict(_Record, written, where="")
    except DriveSimError as error:
        raise DriveSimError(f"{path}: {str(error).lstrip('.')}; train the model again") from error
    if record.best_step > record.steps or (record.batches or record.steps) < record.steps:
        raise DriveSimError(
            f"{path / FINISHED}: step {record.best_step} as the best of {record.steps} steps, with "
            f"{record.batches} batches, cannot be; copy the run again"
        )
    if not record.drives:
        raise DriveSimError(f"{path} was validated on frames that it trained on: leave it out")
    return record


def _batches(metrics: Path, record: _Record) -> float:
    """Batches that all ranks took up to the best step; without a count of them, of one process."""
    best = record.best_step
    for line in metrics.read_bytes().splitlines() if metrics.is_file() else []:
        try:
            row = parse_json(line)
        except ValueError:
            continue  # cut off when a run was killed
        if isinstance(row, dict) and (row.get("phase"), row.get("step")) == ("train", best):
            batches = row.get("batches")
            if isinstance(batches, int | float) and 1 <= batches < _MOST:
                return float(batches)
    if record.batches is None:
        return best * record.accumulate
    return best * record.batches / record.steps


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The weights' shapes, from the file's header alone."""
    try:
        with safe_open(file, "np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DriveSimError(
            f"{file}: no weights in safetensors ({one_line(error)}); copy it again"
        ) from error


def _token_matrices(weights: Mapping[str, tuple[int, ...]], file: Path) -> int:
    """N: the weights that every token is multiplied with."""
    if _LOGITS not in weights or not any(name.startswith("blocks.") for name in weights):
        raise DriveSimError(f"{file}: not a world model's weights; copy the run folder again")
    count = sum(
        math.prod(shape)
        for name, shape in weights.items()
        if len(shape) == 2 and (name.startswith("blocks.") or name in ("gather.weight", _LOGITS))
    )
    if not count:
        raise DriveSimError(f"{file}: its matrices are empty; copy the run folder again")
    return count


def _attention(weights: Mapping[str, tuple[int, ...]], slots: int) -> int:
    """Multiplications of attention's own products for a token, as `parameters` counts weights.

    A slot's query meets half of the window's keys on average, and as many values: width * slots
    multiplications a layer.
    """
    layers = [shape for name, shape in weights.items() if name.endswith(".attention.out.weight")]
    return sum(shape[0] for shape in layers if shape) * slots
