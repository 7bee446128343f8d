"""One training step: compute and clip gradients, update the weights and their averages."""

import copy
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.precision import autocast
from driving_sim.engine.ranks.distributed import Ranks
from driving_sim.engine.ranks.sharding import whole
from driving_sim.engine.threads import adjust_threads, usable_cores
from driving_sim.engine.training.checkpoint import changing_tensors, state_buffers
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.ema import Ema
from driving_sim.engine.training.interrupt import StopNow
from driving_sim.engine.training.optimizer import Optimizers
from driving_sim.engine.training.parallel import parallel
from driving_sim.engine.training.schedule import learning_rate_factor
from driving_sim.engine.training.trainable import Batch, Trainable


class Meter:
    """Averages metrics between two reads. Adding a value does not wait for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # sum and count of the values, by name

    def add(self, values: Mapping[str, Tensor], skipped: Tensor) -> None:
        """Add scalar tensors by name, unless the scalar `skipped` is 1.

        Different calls may pass different names.
        """
        for name, value in values.items():
            value = value.detach().float().to(skipped.device)
            pair = torch.stack([value, torch.ones_like(value)]).where(skipped == 0, 0.0)
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self, ranks: Ranks) -> dict[str, float]:
        """Return the means over steps and ranks, and reset the sums. All ranks have to call it."""
        if not self._sums:
            return {}
        sums = ranks.sum(torch.stack(list(self._sums.values()))).tolist()
        named = zip(self._sums, sums, strict=True)
        means = {name: total / count for name, (total, count) in named if count}
        self._sums = {}
        return means


class Stepper:
    """Takes training steps, and owns what they change: model, optimisers and averaged weights."""

    def __init__(
        self, model: Trainable, config: TrainingConfig, ranks: Ranks, device: torch.device
    ) -> None:
        # A sharded model is complete on no device, so the main rank validates and exports a copy.
        self._whole = copy.deepcopy(model) if config.shard and ranks.is_main else None
        self.model = model if config.shard else model.to(device)
        self.config, self.ranks, self.device = config, ranks, device
        self.dtype = torch.float32
        self._parallel = parallel(model, config, ranks, device)
        self.ema = Ema(model.ema_module(), config.ema_decay)
        self.optimizers = Optimizers(model, model.players(), config)
        self.learning_rate = 0.0
        """Learning rate of the last step, before the scaling of each parameter group."""
        self.meter = Meter()
        self.skips = torch.zeros(2, dtype=torch.int64)
        """Number of all skipped steps, and number of steps skipped since the last successful step.
        Reading them waits for the device."""
        self._buffers = [*state_buffers(model).values()]
        self._step_before: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._step_before = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @property
    def batches_per_step(self) -> int:
        """Number of batches that all ranks together use in one step."""
        return self.config.accumulate * self.ranks.size

    def batches(
        self,
        dataset: Dataset[Batch],
        step: int,
        first: int,
        worker_init: Callable[[int], None],
    ) -> Iterator[tuple[int, Batch]]:
        """Yield this rank's batches with their numbers, from `step` to the end of the run.

        `first` is the number of the first batch in `step`. The ranks take batches in turn, so N
        ranks use the same batches in a step as one rank that accumulates N times as many.
        `worker_init` runs in each data worker.
        """
        left = None if self.config.steps is None else self.config.steps - step
        stop = sys.maxsize if left is None else first + left * self.batches_per_step
        numbers = range(first + self.ranks.rank, stop, self.ranks.size)
        loader = DataLoader(
            _CarryingErrors(dataset),
            batch_size=None,
            sampler=numbers,
            # More workers than cores would be slower, and torch would print a warning.
            num_workers=min(self.config.workers, usable_cores()),
            worker_init_fn=worker_init,
            pin_memory=self.device.type == "cuda",
        )
        for number, batch in zip(numbers, loader, strict=True):
            if isinstance(batch, DriveSimError):
                raise batch
            yield number, batch

    def step(
        self,
        batches: Iterator[tuple[int, Batch]],
        step: int,
        position: float,
        interruptible: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Take step number `step`, at `position` (0 to 1) in the run.

        If the loss or a gradient is not finite, the device skips the step: weights, averages and
        optimiser states do not change, and `skips` counts the step. The forward and backward
        passes run inside `interruptible`, which may raise `StopNow`. Then the step has changed
        nothing.
        """
        adjust_threads(self.device)
        config = self.config
        self.model.zero_grad()
        with self._keeping_buffers(), interruptible():
            outcomes = self._backward(batches, step, position)
            limit = float("inf") if config.grad_clip is None else config.grad_clip
            norms = self.optimizers.clip_gradients(limit)
            skipped = self._is_not_finite([*(loss for loss, _ in outcomes), *norms.values()])
        self.learning_rate = config.learning_rate * learning_rate_factor(
            step,
            position,
            warmup_steps=config.warmup_steps,
            floor=config.min_learning_rate_ratio,
        )
        self.optimizers.set_learning_rate(self.learning_rate)
        with self.autocast():  # only affects Muon's matrix products; the rest is float32
            self.optimizers.step(skipped)
        self.model.limit_parameters()
        self.ema.update(skipped)
        for loss, named in outcomes:
            self.meter.add({"loss": loss, **named}, skipped)
        self.meter.add({f"grad_norm/{player}": norm for player, norm in norms.items()}, skipped)
        count = skipped.long()
        self.skips = torch.stack([self.skips[0] + count, (self.skips[1] + 1) * count])
        if self._step_before is not None:
            # Let the CPU wait if it is more than one step ahead of the GPU. Otherwise the measured
            # step times would be wrong.
            self._step_before.synchronize()
            self._step_before.record()

    def autocast(self) -> AbstractContextManager[object]:
        """Return an autocast context with the chosen number format. Weights stay float32."""
        # Do not keep casts of a sharded model: they would keep all gathered weights in memory.
        return autocast(self.device, self.dtype, keep_casts=not self.config.shard)

    @contextmanager
    def averaged(self) -> Iterator[Trainable]:
        """Yield the complete model in eval mode with averaged weights.

        Every rank has to enter this context, but only the main rank may use the model.
        """
        if not self.config.shard:
            with self.ema.swapped(), _evaluating(self.model):
                yield self.model
            return
        self._gather()
        model = self.model if self._whole is None else self._whole.to(self.device)
        with _evaluating(model):
            yield model
        if self._whole is not None:
            self._whole.cpu()

    @torch.no_grad()
    def _gather(self) -> None:
        """Fill the complete model from the shares of all ranks, one tensor at a time."""
        averaged = None if self._whole is None else self._whole.ema_module()
        for tensors, target in (
            (changing_tensors(self.model), self._whole),
            (self.ema.averages, averaged),
        ):
            target_state = {} if target is None else target.state_dict()
            for name, tensor in tensors.items():
                complete = whole(tensor)
                if target is not None:
                    target_state[name].copy_(complete)

    def _backward(
        self, batches: Iterator[tuple[int, Batch]], step: int, position: float
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Compute gradients, averaged over the batches. Return each batch's loss and metrics."""
        outcomes = []
        for left in reversed(range(self.config.accumulate)):
            number, batch = next(batches)
            batch = {
                name: value.to(self.device, non_blocking=True) for name, value in batch.items()
            }
            # Leave these scalars on the CPU, so the model can read them without waiting for a GPU.
            batch |= {"step": torch.tensor(step), "progress": torch.tensor(min(position, 1.0))}
            seed_torch(batch_seed(self.config.seed, number), self.device)
            with self._synchronised(left == 0):
                with self.autocast():
                    loss, metrics = self._parallel(batch)
                (loss / self.config.accumulate).backward()
            outcomes.append((loss.detach(), metrics))
        return outcomes

    @contextmanager
    def _keeping_buffers(self) -> Iterator[None]:
        """After `StopNow`, restore the model's buffers, which a forward pass may have changed."""
        before = [buffer.clone() for buffer in self._buffers]
        try:
            yield
        except StopNow:
            for buffer, value in zip(self._buffers, before, strict=True):
                buffer.copy_(value)
            raise

    def _synchronised(self, last: bool) -> AbstractContextManager[object]:
        """Return a context in which ranks exchange gradients only for the last batch of a step."""
        if self.config.shard:
            self._parallel.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(self._parallel, DistributedDataParallel) and not last:
            return self._parallel.no_sync()
        return nullcontext()

    def _is_not_finite(self, scalars: list[Tensor]) -> Tensor:
        """Return a float32 scalar: 1 if any of `scalars` is not finite on any rank, otherwise 0."""
        finite = torch.stack([scalar.float() for scalar in scalars]).isfinite().all()
        skipped = (self.ranks.sum((~finite).int()) > 0).float()
        # On MPS, the optimisers are not fused and cannot skip a step on the device. The CPU has to
        # read the value.
        return skipped.cpu() if self.device.type == "mps" else skipped


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


class _CarryingErrors(Dataset[Batch | DriveSimError]):
    """A dataset that returns a user's error as an item, to be raised in the training process.

    If a data worker raised the error, torch would add a traceback to its message.
    """

    def __init__(self, dataset: Dataset[Batch]) -> None:
        self._dataset = dataset

    def __getitem__(self, number: int) -> Batch | DriveSimError:
        try:
            return self._dataset[number]
        except DriveSimError as error:
            return error


def batch_seed(seed: int, number: int) -> int:
    """Return the random seed of batch `number`. It is a hash, so different seeds are unrelated."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the random generators of the CPU and of the device.

    `torch.manual_seed` would seed all backends. For a backend that is not in use, it stores a stack
    trace, which takes a millisecond.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
