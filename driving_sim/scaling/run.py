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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from driving_sim.engine.config import load_json, load_yaml
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.parsing import one_line, parse_json, shown
from driving_sim.engine.run_folder import CONFIG, FINISHED, is_finished

FLOPS_PER_WEIGHT_AND_TOKEN = 6
"""Forward and backward."""

_WEIGHTS = "model.safetensors"
_MODEL = "config.json"
_METRICS = "metrics.jsonl"
_LOGITS = "output.codes"
_CONTEXT, _BATCH = "model.context_frames", "data.batch_size"
_MOST = 1e18  # of anything: what is beyond is damage, or made to do harm


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


def read_run(path: Path) -> ScalingRun:
    """Read a finished run's folder; `DriveSimError` where it is none, or says nothing of scaling.

    A run started from other weights, or validated on what it trained on, is refused.
    """
    settings = _settings(path)
    finished, model = load_json(path / FINISHED), load_json(path / _MODEL)
    bits = float(_number(finished, "best_score", path / FINISHED))
    context = _count(settings, _CONTEXT, path / CONFIG)
    rows, cols = (_count(model, f"config.grid.{key}", path / _MODEL) for key in ("rows", "cols"))
    windows = _batches(path, finished, settings) * _count(settings, _BATCH, path / CONFIG)
    tokens = windows * context * rows * cols
    if tokens >= _MOST:
        raise DriveSimError(f"{path}: trained on {tokens:.0e} tokens, it says: copy it again")
    weights = _shapes(path / _WEIGHTS)
    parameters = _token_matrices(weights, path / _WEIGHTS)
    return ScalingRun(
        path=path,
        parameters=parameters,
        all_parameters=sum(map(math.prod, weights.values())),
        tokens=round(tokens),
        bits=bits,
        attention_share=_attention(weights, context * rows * (cols + 1)) / parameters,
        best_step=_count(finished, "best_step", path / FINISHED),
        steps=_count(finished, "steps", path / FINISHED),
        conditions=_conditions(settings, model, path),
    )


def _settings(path: Path) -> dict[str, Any]:
    """The run's resolved settings, if its loss is the work of its own training alone."""
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
    return settings


def _conditions(
    settings: Mapping[str, Any], model: Mapping[str, Any], path: Path
) -> dict[str, str]:
    drives = _value(model, "config.validation_drives", path / _MODEL)
    if not isinstance(drives, list) or not all(isinstance(each, str) for each in drives):
        raise DriveSimError(
            f"{path / _MODEL}: 'config.validation_drives' is {shown(drives)}, not a list of names"
        )
    if not drives:
        raise DriveSimError(f"{path} was validated on frames that it trained on: leave it out")
    # The longer the past that a token is predicted from, the fewer bits it takes.
    same = ("store.content", "store.tokenizer", "data.validation_windows", _CONTEXT)
    values = {key: _value(settings, key, path / CONFIG) for key in same}
    found = {key: each if isinstance(each, str) else shown(each) for key, each in values.items()}
    return {**found, "validation drives": ", ".join(drives)}


def _value(mapping: Any, dotted: str, file: Path) -> Any:
    for key in dotted.split("."):
        if not isinstance(mapping, Mapping) or key not in mapping:
            raise DriveSimError(f"{file}: '{dotted}' is missing; train the model again")
        mapping = mapping[key]
    return mapping


def _number(mapping: Any, dotted: str, file: Path) -> int | float:
    value = _value(mapping, dotted, file)
    if type(value) not in (int, float) or not 0 < value < _MOST:
        raise DriveSimError(f"{file}: '{dotted}' is {shown(value)}, not a number above 0")
    return value  # type: ignore[no-any-return]


def _count(mapping: Any, dotted: str, file: Path) -> int:
    value = _number(mapping, dotted, file)
    if value != int(value):
        raise DriveSimError(f"{file}: '{dotted}' is {value}, not a count")
    return int(value)


def _batches(path: Path, finished: Mapping[str, Any], settings: Mapping[str, Any]) -> float:
    """Batches that all ranks took up to the best step; without a count of them, of one process."""
    best, steps = (_count(finished, key, path / FINISHED) for key in ("best_step", "steps"))
    if best > steps:
        raise DriveSimError(f"{path / FINISHED}: the best of {steps} steps is not step {best}")
    for row in _training_rows(path / _METRICS):
        if row.get("step") == best and "batches" in row:
            return _count(row, "batches", path / _METRICS)
    if "batches" in finished:
        batches = _count(finished, "batches", path / FINISHED)
        if batches < steps:
            raise DriveSimError(f"{path / FINISHED}: {batches} batches are less than one a step")
        return best * batches / steps
    return best * _count(settings, "training.accumulate", path / CONFIG)


def _training_rows(file: Path) -> Iterator[dict[str, Any]]:
    if not file.is_file():
        return
    for line in file.read_bytes().splitlines():
        try:
            row = parse_json(line)
        except ValueError:
            continue  # cut off when a run was killed
        if isinstance(row, dict) and row.get("phase") == "train":
            yield row


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
