"""The options of a training run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """How a model is trained. Give exactly one of `steps` and `minutes`."""

    steps: int | None = None
    """Optimiser steps to take."""
    minutes: float | None = None
    """Minutes to train instead; validation, saving and start-up do not count."""
    min_steps: int | None = None
    """With `minutes`: go on until so many steps are taken, even if it takes longer."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step, on each device. A tokenizer's
    discriminator is weighed anew for each of them."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """What steps kernels of 32 channels or more on both sides, but a discriminator's; all else is
    AdamW's."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    min_learning_rate_ratio: float = 0.05
    """Share of the peak that the cosine ends at."""
    warmup_steps: int = 200
    """Steps of linear warm-up, cut to a tenth of the run where that is shorter."""
    weight_decay: float = 0.05
    """Decoupled weight decay of matrices and kernels."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    grad_clip: float | None = 1.0
    """Largest L2 norm of each family's gradients; None: not clipped."""
    ema_decay: float = 0.999
    """Decay of the averaged weights, which are what is validated and kept; 0: no averaging."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Format of the autocast passes; auto: bf16 where it is faster."""
    log_every: int = 20
    """Steps between logged training metrics."""
    validate_every: int = 500
    """Steps between validations; one more comes at the end."""
    save_every: int = 500
    """Steps between checkpoints; more come at each new best score and at the end."""
    keep_last: int = 2
    """Newest checkpoints that are kept, beside the best."""
    patience: int | None = None
    """Validations without a new best score before the run stops; None: never."""
    seed: int = 0
    """Decides all randomness of the training steps."""
    workers: int = 2
    """Processes that make batches ahead; 0: made by the training process."""
    threads: int | None = None
    """CPU threads of a training process. None: torch's choice; in commands, as many as other
    programs leave cores for, and the last bits of the weights can vary with them."""
    gradient_checkpointing: bool = False
    """Keep blocks' inputs only and compute the rest again backwards: less memory, more time."""
    compile: bool = False
    """Compile the blocks (torch.compile): minutes at the start, faster steps after it."""
    shard: bool = False
    """Spread weights, gradients and optimiser state over the ranks of `torchrun` (FSDP2)."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            found = f"found steps={self.steps}, minutes={self.minutes}"
            raise ValueError(f"exactly one of steps and minutes must be given, {found}")
        self._check("at least 1", lambda value: value >= 1, "steps min_steps accumulate")
        self._check("at least 1", lambda value: value >= 1, "log_every validate_every save_every")
        self._check("at least 1", lambda value: value >= 1, "keep_last patience threads")
        self._check("above 0", lambda value: value > 0, "minutes learning_rate grad_clip")
        self._check("0 or more", lambda value: value >= 0, "warmup_steps weight_decay workers")
        self._check("in 0..2^63-1", lambda value: 0 <= value < 2**63, "seed")
        self._check("in [0, 1]", lambda value: 0 <= value <= 1, "min_learning_rate_ratio")
        self._check("in [0, 1)", lambda value: 0 <= value < 1, "ema_decay")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas}, allowed are two values in [0, 1)")
        if self.optimizer not in ("muon", "adamw"):
            raise ValueError(f"optimizer={self.optimizer!r}, allowed are muon, adamw")
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision={self.precision!r}, allowed are auto, fp32, bf16")

    def _check(self, allowed: str, holds: Callable[[Any], bool], names: str) -> None:
        for name in names.split():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name}={value}, allowed is {allowed}")
