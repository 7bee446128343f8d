"""Settings of a training run."""

from typing import Literal

from driving_sim.engine.config import (
    Count,
    Natural,
    NonNegative,
    Positive,
    Share,
    ShareBelowOne,
    config,
)


@config
class TrainingConfig:
    """Settings of a training run. Set exactly one of `steps` and `minutes`."""

    steps: Count | None = None
    """Number of optimiser steps."""
    minutes: Positive | None = None
    """Training time in minutes, without validation, saving and start-up."""
    min_steps: Count | None = None
    """Minimum number of steps of a run with `minutes`, even if the run then takes longer."""
    accumulate: Count = 1
    """Number of batches that each device uses in one step. Their gradients are averaged. The
    tokenizer computes the weight of its GAN loss for each batch separately."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """Optimiser of linear and convolution weights with at least 32 input and 32 output channels,
    except those of a discriminator. AdamW updates all other parameters."""
    learning_rate: Positive = 3e-4
    """Peak learning rate."""
    min_learning_rate_ratio: Share = 0.05
    """Final learning rate of the cosine schedule, as a share of the peak."""
    warmup_steps: Natural = 200
    """Number of steps of linear warm-up. Warm-up takes at most a tenth of the run."""
    weight_decay: NonNegative = 0.05
    """Decoupled weight decay of matrices and convolution kernels."""
    betas: tuple[ShareBelowOne, ShareBelowOne] = (0.9, 0.95)
    """Decay rates of the first and second moments in AdamW."""
    grad_clip: Positive | None = 1.0
    """Maximum L2 norm of the gradients of a model. In a GAN, the gradients of the generator and of
    the discriminator are clipped separately. If None, gradients are not clipped."""
    ema_decay: ShareBelowOne = 0.999
    """Decay of the averaged weights, which are validated and exported. 0 turns averaging off."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number format of forward and backward passes. auto means bf16 if it is faster."""
    log_every: Count = 20
    """Steps between two logs of training metrics."""
    validate_every: Count = 500
    """Steps between two validations. The run also validates at its end."""
    save_every: Count = 500
    """Steps between two checkpoints. The run also saves at each new best score and at its end."""
    keep_last: Count = 2
    """Number of newest checkpoints to keep. The best checkpoint is always kept."""
    patience: Count | None = None
    """Number of validations without a new best score after which the run stops. If None, the run
    does not stop early."""
    seed: Natural = 0
    """Seed of all random numbers in the training steps."""
    workers: Natural = 2
    """Number of processes that prepare batches. With 0, the training process prepares them."""
    threads: Count | None = None
    """Number of CPU threads of each training process. If None, torch chooses the number, and
    commands adapt it to the cores that other programs leave free. This can change the last bits of
    the weights."""
    gradient_checkpointing: bool = False
    """Store only the inputs of blocks, and recompute the rest in the backward pass. This takes less
    memory and more time."""
    compile: bool = False
    """Compile the blocks with torch.compile. This takes minutes at the start, but speeds up the
    steps."""
    shard: bool = False
    """Split weights, gradients and optimiser state over the ranks of `torchrun` (FSDP2)."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            values = f"steps={self.steps}, minutes={self.minutes}"
            raise ValueError(f"steps: set exactly one of steps and minutes, found {values}")
