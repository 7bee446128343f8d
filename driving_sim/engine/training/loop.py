"""The training loop, which both models share."""

import json
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import Dataset

from driving_sim.engine.config import from_dict, to_dict
from driving_sim.engine.device import resolve_device
from driving_sim.engine.errors import DriveSimError, Interrupted
from driving_sim.engine.files import disk_errors
from driving_sim.engine.precision import name_of, resolve_precision
from driving_sim.engine.ranks.distributed import process_group
from driving_sim.engine.run_folder import (
    CHECKPOINTS,
    goes_on,
    mark_finished,
    mark_unfinished,
    prepare_run,
)
from driving_sim.engine.threads import fixed_threads
from driving_sim.engine.training.checkpoint import (
    STATE,
    checkpoint_path,
    checkpoints,
    damage,
    load_checkpoint,
    newest_whole,
    prune,
    remove_after,
    save_checkpoint,
)
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.interrupt import StopNow, StopRequest, stop_on_signals
from driving_sim.engine.training.schedule import position_by_steps, position_by_time
from driving_sim.engine.training.step import Stepper, batch_seed, seed_torch
from driving_sim.engine.training.trainable import Batch, Trainable, Validation

if TYPE_CHECKING:
    from driving_sim.engine.training.run_log import RunLog

MAX_SKIPPED_IN_A_ROW = 20
"""Number of successive skipped steps after which the run stops with an error. A step is skipped if
its loss or a gradient is not finite."""
COUNT_SKIPPED_EVERY = 20
"""On a GPU, the loop reads the number of skipped steps at least once in this many steps. Reading it
after every step would make the CPU wait for the GPU."""
FIRST_STEPS = 5
"""Number of steps after which a run prints how long it will take."""
WARM_UP_STEPS = 2
"""Number of steps at the start that the time estimate ignores. They are slower because they also
set up kernels and memory."""
_ADDED_TO_PROVISIONAL = 100.0
"""A checkpoint stores whether its best score is provisional (see `Validation`). Earlier versions of
the program added this number to a provisional score. This version stores `best_provisional`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """The result of a training run."""

    best_score: float
    best_step: int
    steps: int
    batches: int
    """Number of batches that all ranks together used in the run."""
    seconds: float
    """Training time in seconds, without validation."""


Validate = Callable[[Trainable], Validation]
Export = Callable[[nn.Module, Path], None]


def train(
    model: Trainable,
    *,
    dataset: Dataset[Batch],
    config: TrainingConfig,
    run: Path,
    validate: Validate,
    export: Export,
    run_config: Mapping[str, Any],
    resume: bool = False,
    device: torch.device | str = "auto",
) -> TrainingResult:
    """Train `model` and write the results into the folder `run`.

    Under `torchrun`, all ranks train together. `dataset[n]` is batch n, which must depend only on n
    and the seed of the dataset. The loop adds `step` (int64) and `progress` (float32, 0 to 1) to
    each batch. It also seeds torch before each batch, so a resumed run gives the same results as an
    uninterrupted run.

    `validate` receives the model in eval mode with averaged weights. It runs without gradients, and
    with the same autocast as training. `export` writes the averaged module into `run` at each new
    best score. `is_finished(run)` says whether the training has ended. Resuming a finished run
    changes nothing, unless the new settings make the run longer.

    Raises `DriveSimError` if `run` cannot be used, if the loss or the gradients are not finite in
    too many successive steps, or if no score is finite. After SIGTERM or Ctrl-C, saves a checkpoint
    and raises `Interrupted`.
    """
    device = resolve_device(device)
    with (
        disk_errors(run),
        fixed_threads(config.threads),
        process_group(device) as (ranks, own_device),
        stop_on_signals() as request,
    ):
        ranks.require_same(json.dumps(run_config, default=str), "the settings or the drives")
        resume = ranks.from_main(lambda: goes_on(run, resume))
        if ranks.is_main:
            prepare_run(run, run_config, resume)

        def run_loop() -> TrainingResult:
            # Only this function refers to the loop, so Python frees the loop before the process
            # group ends.
            loop = _Loop(Stepper(model, config, ranks, own_device), run, validate, export, request)
            if resume:
                loop.resume()
            loop.choose_precision()
            return loop.run(dataset)

        return run_loop()


@dataclass(kw_only=True, slots=True)
class _State:
    """The progress of a run, which a checkpoint stores in `state.json`."""

    step: int = 0
    batches: int = 0
    seconds: float = 0.0
    step_seconds: float = 0.0
    precision: str = ""
    device: str = ""
    validated_step: int = 0
    best_score: float | None = None
    best_provisional: bool = False
    best_step: int = 0
    validations_since_best: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0

    def improves(self, score: float, provisional: bool) -> bool:
        """Return whether a score is better than the best score so far."""
        if self.best_score is None or not math.isfinite(score):
            return math.isfinite(score)
        return (provisional, score) < (self.best_provisional, self.best_score)


class _Loop:
    def __init__(
        self,
        stepper: Stepper,
        run: Path,
        validate: Validate,
        export: Export,
        request: StopRequest,
    ) -> None:
        self.stepper, self.config, self.ranks = stepper, stepper.config, stepper.ranks
        self.folder, self.validate_model, self.export = run, validate, export
        self.request = request
        # With several ranks, a signal does not interrupt a step, because the other ranks may be
        # waiting for this rank.
        self.interruptible = request.interruptible if self.ranks.size == 1 else nullcontext
        self.state = _State()
        self.unsaved = False
        self.notices: list[str] = []
        self.recent_seconds: deque[float] = deque(maxlen=15)
        self.log: RunLog | None = None

    def resume(self) -> None:
        """Load the newest undamaged checkpoint, if there is one."""
        # Only the main rank looks for damage, because this means reading whole files.
        path, self.notices = self.ranks.from_main(lambda: newest_whole(self.folder / CHECKPOINTS))
        if path is None:
            return
        saved = self._load(path)
        best = saved.get("best_score")
        if "best_provisional" not in saved and best and best >= _ADDED_TO_PROVISIONAL:
            saved |= {"best_score": best - _ADDED_TO_PROVISIONAL, "best_provisional": True}
        self.state = from_dict(_State, saved, where=str(path / STATE))
        skips = [self.state.skipped_steps, self.state.skipped_in_a_row]
        self.stepper.skips = torch.tensor(skips)
        if self.notices:
            self._return_to(path)

    def _load(self, path: Path) -> dict[str, Any]:
        stepper = self.stepper
        return load_checkpoint(
            path, model=stepper.model, optimizers=stepper.optimizers, ema=stepper.ema
        )

    def _return_to(self, path: Path) -> None:
        """Undo what the run did after the checkpoint `path`, because later checkpoints are damaged.

        The exported weights may come from a later step, so the weights of the best step up to the
        checkpoint are exported again.
        """
        best = checkpoint_path(path.parent, self.state.best_step)
        if self.ranks.from_main(lambda: damage(best) is None):
            self._load(best)
            with self.stepper.averaged() as model:
                if self.ranks.is_main:
                    self.export(model.ema_module(), self.folder)
            self._load(path)
        if self.ranks.is_main:
            remove_after(path)

    def choose_precision(self) -> None:
        """Choose the number format. A resumed run on the same kind of device keeps its format."""
        state, device = self.state, self.stepper.device
        is_kept = self.config.precision == "auto" and state.device == device.type
        name = state.precision if is_kept else str(self.config.precision)
        self.stepper.dtype = self.ranks.from_main(lambda: resolve_precision(name, device))
        state.precision, state.device = name_of(self.stepper.dtype), device.type

    def run(self, dataset: Dataset[Batch]) -> TrainingResult:
        """Take steps, log, validate and save until the run is over. Return the result."""
        if not self.ranks.is_main:
            return self._run(dataset)
        # Import run_log here: it imports TensorBoard, which takes 0.1 s. Commands that do not train
        # must not wait for this.
        from driving_sim.engine.training.run_log import run_log

        state = self.state
        with run_log(
            self.folder,
            start_step=state.step,
            validated_step=state.validated_step,
            total=self.config.steps,
        ) as self.log:
            for notice in self.notices:
                self.log.say(notice)
            return self._run(dataset)

    def _run(self, dataset: Dataset[Batch]) -> TrainingResult:
        self.stepper.model.train()
        batches: Iterator[tuple[int, Batch]] | None = None
        while True:
            # All ranks must stop or go on together. So they share the signal that any rank received
            # (0 if none), and the main rank's position in the run.
            position = self._position() if self.ranks.is_main else 0.0
            number, position = self.ranks.largest([float(self.request.signal), position])
            if number:
                self._save()
                name = signal.Signals(int(number)).name
                where = f"stopped after step {self.state.step} in {self.folder}"
                raise Interrupted(f"{name}: {where}; to continue, give `resume`", 128 + int(number))
            try:
                if position > 1.0 or self._due(self.config.validate_every):
                    self._validate()
                patience = self.config.patience
                since_best = self.state.validations_since_best
                over = position > 1.0 or (patience is not None and since_best >= patience)
                is_best = self.state.best_step == self.state.step
                if over or is_best or self._due(self.config.save_every):
                    self._save()
                if over:
                    return self._finish(trained=batches is not None)
                if batches is None:
                    batches = self._batches(dataset)
                self._step(batches, position)
            except StopNow:
                continue  # the interrupted work has changed nothing

    def _batches(self, dataset: Dataset[Batch]) -> Iterator[tuple[int, Batch]]:
        """Mark the run as unfinished, start the data workers, and return the batch iterator."""
        if self.ranks.is_main:
            mark_unfinished(self.folder)
        state = self.state
        batches = self.stepper.batches(dataset, state.step, state.batches, self.request.shield)
        with self.interruptible():
            # Wait for the first batch here, so the time to start the workers is not measured as
            # training time.
            return chain([next(batches)], batches)

    def _position(self) -> float:
        if self.config.steps is not None:
            return position_by_steps(self.state.step, self.config.steps)
        assert self.config.minutes is not None
        state, limit = self.state, 60.0 * self.config.minutes
        by_time = position_by_time(state.seconds, limit, state.step_seconds)
        least = self.config.min_steps
        return by_time if least is None else min(by_time, position_by_steps(state.step, least))

    def _step(self, batches: Iterator[tuple[int, Batch]], position: float) -> None:
        state = self.state
        start = time.perf_counter()
        self.stepper.step(batches, state.step, position, self.interruptible)
        seconds = time.perf_counter() - start
        self.recent_seconds.append(seconds)
        state.step_seconds = statistics.median(self.recent_seconds)
        state.seconds += seconds
        state.step += 1
        state.batches += self.stepper.batches_per_step
        self.unsaved = True
        if self._due(self.config.log_every):
            self._log_training()
        elif self.stepper.skips.device.type == "cpu" or self._due(COUNT_SKIPPED_EVERY):
            self._count_skipped()
        if self.log:
            self._say_how_long(self.log, seconds)
            self.log.advance(position)

    def _say_how_long(self, log: "RunLog", seconds: float) -> None:
        """Print once how long the rest of the run will take. Call this after every step.

        In a run with `steps`, the line is printed after `FIRST_STEPS` steps. In a run with
        `minutes`, it is printed when the minutes are over but `min_steps` requires more steps.
        `seconds` is the duration of the last step.
        """
        state, config = self.state, self.config
        if config.steps is not None and len(self.recent_seconds) == FIRST_STEPS:
            line = time_to_go(config.steps - state.step, [*self.recent_seconds])
            if line:
                log.say(line)
        if config.minutes is None or config.min_steps is None:
            return
        left = config.min_steps - state.step
        if left > 0 and state.seconds - seconds <= 60.0 * config.minutes < state.seconds:
            log.say(
                f"{config.minutes:g} minutes are over after {state.step} steps; this training "
                f"needs {config.min_steps:,} steps: about "
                f"{math.ceil(left * state.step_seconds / 60.0)} min more"
            )

    def _count_skipped(self) -> None:
        """Read the numbers of skipped steps from the device into the state.

        Raises `DriveSimError` if too many successive steps were skipped.
        """
        state = self.state
        state.skipped_steps, state.skipped_in_a_row = self.stepper.skips.tolist()
        if state.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            path = next(reversed(checkpoints(self.folder / CHECKPOINTS)), "none")
            raise DriveSimError(
                "the loss or a gradient was not finite in the last "
                f"{state.skipped_in_a_row} steps, up to step {state.step}; the last checkpoint is "
                f"{path}: continue from it with `resume` and a lower training.learning_rate"
            )

    def _validate(self) -> None:
        """Validate the averaged weights on the main rank, and export them if they are the best."""
        state = self.state
        if state.validated_step == state.step:
            return
        with self.stepper.averaged() as model:
            score, provisional = self.ranks.from_main(lambda: self._validate_and_export(model))
        state.validations_since_best += 1
        if state.improves(score, provisional):
            state.best_score, state.best_provisional = score, provisional
            state.best_step, state.validations_since_best = state.step, 0
        state.validated_step = state.step
        self.unsaved = True

    def _validate_and_export(self, model: Trainable) -> tuple[float, bool]:
        # Use the same random numbers in every validation, so only the weights change the score.
        seed_torch(batch_seed(self.config.seed, -1), self.stepper.device)
        with torch.no_grad(), self.stepper.autocast():
            with self.interruptible():
                validation = self.validate_model(model)
            best = self.state.improves(validation.score, validation.provisional)
            if best:
                self.export(model.ema_module(), self.folder)
        if self.log:
            self.log.add_validation(self.state.step, validation, best=best)
        return validation.score, validation.provisional

    def _save(self) -> None:
        if not self.unsaved:
            return
        self._log_training()
        stepper, state, folder = self.stepper, self.state, self.folder / CHECKPOINTS
        save_checkpoint(
            folder,
            step=state.step,
            model=stepper.model,
            optimizers=stepper.optimizers,
            ema=stepper.ema,
            state=to_dict(state),
            ranks=self.ranks,
        )
        if self.ranks.is_main:
            prune(folder, keep_last=self.config.keep_last, best_step=state.best_step)
        self.unsaved = False

    def _log_training(self) -> None:
        self._count_skipped()
        means = self.stepper.meter.read(self.ranks)
        if not self.log or not means:
            return
        values = {
            **means,
            "learning_rate": self.stepper.learning_rate,
            "skipped_steps": float(self.state.skipped_steps),
            "step_seconds": self.state.step_seconds,
            "training_seconds": self.state.seconds,
            "batches": float(self.state.batches),
            "threads": float(torch.get_num_threads()),
        }
        self.log.add_scalars(self.state.step, "train", values)

    def _due(self, every: int) -> bool:
        return self.state.step > 0 and self.state.step % every == 0

    def _finish(self, *, trained: bool) -> TrainingResult:
        """Mark the run as finished. Print a line if there was nothing left to train."""
        state = self.state
        if state.best_score is None:
            raise DriveSimError(
                f"{self.folder}: no validation score was finite, so no weights were kept; "
                "try a lower training.learning_rate"
            )
        result = TrainingResult(
            best_score=state.best_score,
            best_step=state.best_step,
            steps=state.step,
            batches=state.batches,
            seconds=state.seconds,
        )
        if self.log:
            self.log.say(f"best score {state.best_score:.4g} at step {state.best_step}")
            mark_finished(self.folder, asdict(result))
            if not trained:
                self.log.say(
                    f"{self.folder} was finished at step {state.step}: to train it longer, give "
                    "more steps, minutes or patience"
                )
        return result


def time_to_go(steps: int, first_seconds: Sequence[float]) -> str:
    """Return a line that says how long the remaining `steps` take.

    If they take less than 2 minutes, the line is empty. `first_seconds` are the durations of the
    first steps in this process.
    """
    step = statistics.median(first_seconds[WARM_UP_STEPS:])
    seconds = steps * step
    if seconds < 120:
        return ""
    units = {"days": 86_400, "hours": 3_600, "minutes": 60}
    unit = next(name for name, length in units.items() if seconds >= 2 * length)
    remedy = "; a smaller preset, fewer steps or a GPU take less" if seconds >= 86_400 else ""
    step_text = f"{step:.2g}" if step < 10 else f"{step:,.0f}"
    length = f"{seconds / units[unit]:,.0f} {unit}"
    return f"{steps:,} steps to go at {step_text} s a step: about {length}{remedy}"
