"""One optimiser step: batches in, gradients, clipping, optimiser, averaged weights."""

import copy
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, cast

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
from driving_sim.engine.training.meter import Meter
from driving_sim.engine.training.optimizer import (
    ParameterGroup,
    build_optimizer,
    clip_gradients,
    set_learning_rate,
)
from driving_sim.engine.training.parallel import parallel
from driving_sim.engine.training.schedule import learning_rate_factor

Batch = dict[str, Tensor]


class Trainable(Protocol):
    """What training asks of a model beside being an `nn.Module`.

    `forward(batch)` gives the loss, a mean over the batch, and metrics: scalar tensors by name.
    """

    def parameter_groups(self) -> list[ParameterGroup]:
        """The trainable parameters; see `engine.optimizer`."""
        ...

    def ema_module(self) -> nn.Module:
        """The part that is averaged and exported."""
        ...

    def blocks(self) -> Iterable[nn.Module]:
        """The repeated parts: what is sharded, compiled and recomputed one at a time."""
        ...


class Stepper:
    """Owns what a step changes: the model's weights, the optimiser, the averaged weights."""

    def __init__(
        self, model: nn.Module, config: TrainingConfig, ranks: Ranks, device: torch.device
    ) -> None:
        # Validated and exported in place of a sharded model, no device of which holds it whole.
        self._whole = copy.deepcopy(model) if config.shard and ranks.is_main else None
        self.model = model if config.shard else model.to(device)
        self.config, self.ranks, self.device = config, ranks, device
        self.dtype = torch.float32
        self._parallel = parallel(model, config, ranks, device)
        trainable = cast(Trainable, model)
        self.ema_module = trainable.ema_module()
        self.ema = Ema(self.ema_module, config.ema_decay)
        self.optimizer = build_optimizer(
            model,
            trainable.parameter_groups(),
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=config.betas,
            muon=config.optimizer == "muon",
        )
        self.meter = Meter()
        self._buffers = [*state_buffers(model).values()]

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
    ) -> bool:
        """Take step number `step`, `position` (0 to 1) of the way through the run.

        False where loss or gradients were not finite: then nothing has changed. Nor has it where
        `StopNow` is raised inside `interruptible`, which the passes are in.
        """
        adjust_threads(self.device)
        config = self.config
        self.optimizer.zero_grad()
        with self._keeping_buffers(), interruptible():
            metrics = self._backward(batches, step, position)
            limit = float("inf") if config.grad_clip is None else config.grad_clip
            norms = clip_gradients(self.optimizer, limit)
            finite = self._all_finite([*(loss for loss, _ in metrics), *norms.values()])
        factor = learning_rate_factor(
            step,
            position,
            warmup_steps=config.warmup_steps,
            floor=config.min_learning_rate_ratio,
        )
        set_learning_rate(self.optimizer, config.learning_rate * factor)
        if not finite:
            return False
        with self.autocast():  # Muon's matrix products; everything else there is float32
            self.optimizer.step()
        self.ema.update()
        for loss, named in metrics:
            self.meter.add({"loss": loss, **named})
        self.meter.add({f"grad_norm/{family}": norm for family, norm in norms.items()})
        return True

    def autocast(self) -> AbstractContextManager[object]:
        """The passes' number format; weights stay float32."""
        # Kept casts of weights would keep what is gathered for a block for the whole pass.
        return autocast(self.device, self.dtype, keep_casts=not self.config.shard)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
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
        averaged = None if self._whole is None else cast(Trainable, self._whole).ema_module()
        for tensors, target in (
            (changing_tensors(self.model), self._whole),
            (self.ema.state_dict(), averaged),
        ):
            own = {} if target is None else target.state_dict()
            for name, tensor in tensors.items():
                complete = whole(tensor)
                if target is not None:
                    own[name].copy_(complete)

    def learning_rate(self) -> float:
        """The last step's, before any group's own scale."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"] / group["lr_scale"])

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
            batch["step"] = torch.full((), step, device=self.device)
            batch["progress"] = torch.full((), min(position, 1.0), device=self.device)
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

    def _all_finite(self, scalars: list[Tensor]) -> bool:
        finite = torch.stack([scalar.float() for scalar in scalars]).isfinite().all()
        # The step's one wait for the device; ranks must decide alike.
        return bool(self.ranks.sum((~finite).int()).item() == 0)


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
