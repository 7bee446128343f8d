"""One optimiser step: batches in, gradients, clipping, optimiser, averaged weights."""

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
    """Means since the last reading; they stay on the device until then, so adding never waits."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # of the values, and how many they are

    def add(self, values: Mapping[str, Tensor], skipped: Tensor) -> None:
        """Count scalar tensors, unless `skipped` is 1; a name need not come every time."""
        for name, value in values.items():
            value = value.detach().float().to(skipped.device)
            pair = torch.stack([value, torch.ones_like(value)]).where(skipped == 0, 0.0)
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def read(self, ranks: Ranks) -> dict[str, float]:
        """The means over steps and ranks, which all have to call; and begin anew."""
        if not self._sums:
            return {}
        sums = ranks.sum(torch.stack(list(self._sums.values()))).tolist()
        named = zip(self._sums, sums, strict=True)
        means = {name: total / count for name, (total, count) in named if count}
        self._sums = {}
        return means


class Stepper:
    """Owns what a step changes: the model's weights, the optimiser, the averaged weights."""

    def __init__(
        self, model: Trainable, config: TrainingConfig, ranks: Ranks, device: torch.device
    ) -> None:
        # Validated and exported in place of a sharded model, no device of which holds it whole.
        self._whole = copy.deepcopy(model) if config.shard and ranks.is_main else None
        self.model = model if config.shard else model.to(device)
        self.config, self.ranks, self.device = config, ranks, device
        self.dtype = torch.float32
        self._parallel = parallel(model, config, ranks, device)
        self.ema = Ema(model.ema_module(), config.ema_decay)
        self.optimizers = Optimizers(model, model.players(), config)
        self.learning_rate = 0.0
        """The last step's, before any group's own scale."""
        self.meter = Meter()
        self.skips = torch.zeros(2, dtype=torch.int64)
        """Steps that were skipped: in all, and in a row by now. Reading waits for the device."""
        self._buffers = [*state_buffers(model).values()]
        self._step_before: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._step_before = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @property
    def batches_per_step(self) -> int:
        """How many batches all ranks together take for a step."""
        return self.config.accumulate * self.ranks.size

    def batches(
        self,
        dataset: Dataset[Batch],
        step: int,
        first: int,
        worker_init: Callable[[int], None],
    ) -> Iterator[tuple[int, Batch]]:
        """This rank's numbered batches from `step` on, which begins with batch `first` of the run.

        The ranks take turns, so that more ranks and more accumulation see the same data.
        `worker_init` runs in each data worker.
        """
        left = None if self.config.steps is None else self.config.steps - step
        stop = sys.maxsize if left is None else first + left * self.batches_per_step
        numbers = range(first + self.ranks.rank, stop, self.ranks.size)
        loader = DataLoader(
            _CarryingErrors(dataset),
            batch_size=None,
            sampler=numbers,
            # More workers than cores are slower, and torch warns of them.
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
        """Take step number `step`, `position` (0 to 1) of the way through the run.

        Where loss or gradients are not finite the step is skipped: weights, averages and what the
        optimisers know stay as they are. The device decides it, and `skips` tells. Nothing has
        changed either where `StopNow` is raised inside `interruptible`, which the passes are in.
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
        with self.autocast():  # Muon's matrix products; everything else there is float32
            self.optimizers.step(skipped)
        self.ema.update(skipped)
        for loss, named in outcomes:
            self.meter.add({"loss": loss, **named}, skipped)
        self.meter.add({f"grad_norm/{player}": norm for player, norm in norms.items()}, skipped)
        count = skipped.long()
        self.skips = torch.stack([self.skips[0] + count, (self.skips[1] + 1) * count])
        if self._step_before is not None:
            # The device is at most a step behind, so that a step takes as long as it seems to.
            self._step_before.synchronize()
            self._step_before.record()

    def autocast(self) -> AbstractContextManager[object]:
        """The passes' number format; weights stay float32."""
        # Kept casts of weights would keep what is gathered for a block for the whole pass.
        return autocast(self.device, self.dtype, keep_casts=not self.config.shard)

    @contextmanager
    def averaged(self) -> Iterator[Trainable]:
        """The model in eval mode with averaged weights and no part of it sharded.

        Every rank has to enter; it is the main rank's to use.
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
        """Fill the whole model from the ranks' shares, a tensor at a time."""
        averaged = None if self._whole is None else self._whole.ema_module()
        for tensors, target in (
            (changing_tensors(self.model), self._whole),
            (self.ema.averages, averaged),
        ):
            own = {} if target is None else target.state_dict()
            for name, tensor in tensors.items():
                complete = whole(tensor)
                if target is not None:
                    own[name].copy_(complete)

    def _backward(
        self, batches: Iterator[tuple[int, Batch]], step: int, position: float
    ) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """Leave the mean gradient in the parameters; return each batch's loss and metrics."""
        outcomes = []
        for left in reversed(range(self.config.accumulate)):
            number, batch = next(batches)
            batch = {
                name: value.to(self.device, non_blocking=True) for name, value in batch.items()
            }
            # On the CPU: who looks at them does not wait for the device.
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
        """Of a step that is interrupted, nothing stays: forward passes may write into buffers."""
        before = [buffer.clone() for buffer in self._buffers]
        try:
            yield
        except StopNow:
            for buffer, value in zip(self._buffers, before, strict=True):
                buffer.copy_(value)
            raise

    def _synchronised(self, last: bool) -> AbstractContextManager[object]:
        """Ranks exchange gradients with the last batch of a step only."""
        if self.config.shard:
            self._parallel.set_requires_gradient_sync(last)  # type: ignore[operator]
        elif isinstance(self._parallel, DistributedDataParallel) and not last:
            return self._parallel.no_sync()
        return nullcontext()

    def _is_not_finite(self, scalars: list[Tensor]) -> Tensor:
        """1 where any of the scalars is not finite on any rank, else 0: a float32 scalar."""
        finite = torch.stack([scalar.float() for scalar in scalars]).isfinite().all()
        skipped = (self.ranks.sum((~finite).int()) > 0).float()
        return skipped.cpu() if self.device.type == "mps" else skipped  # it waits in any case


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
    """Hands a user's errors over as values: raised in a worker they come with its traceback."""

    def __init__(self, dataset: Dataset[Batch]) -> None:
        self._dataset = dataset

    def __getitem__(self, number: int) -> Batch | DriveSimError:
        try:
            return self._dataset[number]
        except DriveSimError as error:
            return error


def batch_seed(seed: int, number: int) -> int:
    """The seed of batch `number`'s randomness, as unrelated to its neighbours' as a hash."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_torch(seed: int, device: torch.device) -> None:
    """Seed the CPU's generator and the device's: what `torch.manual_seed` does for all backends.

    That takes a millisecond where one is not in use: it keeps a stack trace for it.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
