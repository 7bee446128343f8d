"""Trains a tokenizer on drives: the settings of a run, the training and the validation.

Axes: N validation frames, B frames of a batch, H W pixels, K codes in the codebook.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from driving_sim.data.arrays import Pixels
from driving_sim.data.drive import SampledDrive
from driving_sim.data.frame_batches import FrameBatches
from driving_sim.data.split import split_drives
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.config import (
    Count,
    InnerShare,
    NonNegative,
    Share,
    ShareBelowOne,
    config,
    to_dict,
)
from driving_sim.engine.device import resolve_device
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.progress import progress, say
from driving_sim.engine.ranks.distributed import process_group
from driving_sim.engine.run_folder import check_run
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.loop import TrainingResult, train
from driving_sim.engine.training.trainable import Validation
from driving_sim.tokenizer.autoencoder import STRIDE, Autoencoder, AutoencoderConfig
from driving_sim.tokenizer.metrics import codebook_use, psnr, ssim
from driving_sim.tokenizer.objective import TokenizerObjective, TokenizerObjectiveConfig
from driving_sim.tokenizer.perceptual import vgg16_weights
from driving_sim.tokenizer.tokenizer import Tokenizer, frames_from_images, images_from_frames

_GRID_FRAMES = 8
_BATCH = 16


@config
class TokenizerDataConfig:
    """Choice and augmentation of the training frames, and choice of the validation frames."""

    batch_size: Count = 16
    """Number of frames per batch on each device."""
    mirror: bool = True
    """Whether to flip half of the training frames left to right."""
    shift: Annotated[int, Field(ge=0, lt=STRIDE * 2)] = 0
    """Maximum random shift of training frames in pixels; reflection fills the uncovered edges."""
    gain: ShareBelowOne = 0.0
    """Maximum random change of each colour channel's brightness in training frames, as a share."""
    cutmix: Share = 0.0
    """Share of training frames whose right part is taken from another frame of the batch."""
    validation: tuple[str, ...] | None = None
    """Ids of the validation drives. If None, `validation_fraction` of the drives are drawn."""
    validation_fraction: InnerShare = 0.1
    """Share of the drives used for validation if `validation` is None."""
    validation_frames: Count = 128
    """Maximum number of validation frames, spread evenly over the validation drives."""
    cache_gigabytes: NonNegative = 4.0
    """Memory for decoded training frames, in gigabytes. If all fit, each is decoded only once."""


@config
class TokenizerRunConfig:
    """All settings of a training run of a tokenizer."""

    training: TrainingConfig
    """Settings of the training loop."""
    model: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    """Settings of the autoencoder."""
    objective: TokenizerObjectiveConfig = field(default_factory=TokenizerObjectiveConfig)
    """Losses and their weights."""
    data: TokenizerDataConfig = field(default_factory=TokenizerDataConfig)
    """Training and validation frames."""


def train_tokenizer(
    drives: Sequence[SampledDrive],
    config: TokenizerRunConfig,
    run: Path,
    *,
    init_from: Path | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    device: torch.device | str = "auto",
) -> TrainingResult:
    """Train a tokenizer on the frames of `drives`. Save the best one in the folder `run`.

    Validation uses drives that are not trained on, unless there is only one drive. `init_from` is
    the folder of a tokenizer with the same configuration, whose weights the training starts from.
    With `skip_bad`, an additional pass over all frames finds the drives that cannot be decoded
    completely; they are reported and left out.

    Raises:
        DriveSimError: there are no drives; a drive is bad and `skip_bad` is false; `run` or
            `init_from` cannot be used; LPIPS is used and its VGG-16 weights cannot be loaded.
    """
    if not drives:
        raise DriveSimError("no drives to train a tokenizer on; choose other videos")
    run_config = to_dict(config) | {
        "init_from": None if init_from is None else str(init_from),
        "drives": _described(drives),
        "skip_bad": skip_bad,
    }
    check_run(run, run_config, resume)
    vgg16 = vgg16_weights() if config.objective.lpips_weight > 0 else None
    if vgg16 is None:
        say("training without the perceptual loss LPIPS, because objective.lpips_weight is 0")
    size, data = config.model.frame_size, config.data
    if skip_bad:
        drives = _decodable(drives, size, device)
    by_id = {drive.drive.id: drive for drive in drives}
    train_ids, validation_ids = split_drives(
        list(by_id), validation=data.validation, fraction=data.validation_fraction
    )
    held_out = [by_id[name] for name in validation_ids or train_ids]
    dataset = FrameBatches(
        [by_id[name] for name in train_ids],
        size=size,
        batch_size=data.batch_size,
        seed=config.training.seed,
        mirror=data.mirror,
        shift=data.shift,
        gain=data.gain,
        cutmix=data.cutmix,
        cache_bytes=int(data.cache_gigabytes * 1e9),
        shared=config.training.workers > 0,
    )
    validate = Validator(validation_frames(held_out, size, data.validation_frames))
    torch.manual_seed(config.training.seed)
    objective = TokenizerObjective(config.model, config.objective, vgg16)
    if init_from is not None:
        source = Tokenizer.from_run(init_from, "cpu", "fp32")
        if source.config != config.model:
            raise DriveSimError(
                f"`init_from` {init_from}: its configuration differs from this run's "
                f"({source.config} and {config.model}); choose another `init_from`"
            )
        objective.autoencoder.load_state_dict(source.autoencoder.state_dict())
    return train(
        objective,
        dataset=dataset,
        config=config.training,
        run=run,
        validate=validate,
        export=_export,
        run_config=run_config,
        resume=resume,
        device=device,
    )


class Validator:
    """Measures the quality of an autoencoder on fixed validation frames, uint8 [N, H, W, 3]."""

    def __init__(self, frames: Tensor) -> None:
        self.frames = frames

    def __call__(self, model: nn.Module) -> Validation:
        """Return losses, PSNR, SSIM, codebook use and a picture of reconstructions.

        The score, which selects the best checkpoint, is the loss without the discriminator. The
        discriminator improves texture but makes this loss a little worse. Scores are therefore
        provisional until the discriminator has its full weight.
        """
        assert isinstance(model, TokenizerObjective)
        # Validate in float32, even if training runs in bf16.
        with torch.autocast(model.gan_share.device.type, enabled=False):
            batches = [_measure(model, frames) for frames in torch.split(self.frames, _BATCH)]
        columns = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
        tokens, rebuilt = columns.pop("tokens"), columns.pop("rebuilt")
        counts = torch.bincount(tokens, minlength=model.autoencoder.quantiser.codebook_size)
        metrics = {name: float(values.mean()) for name, values in columns.items()}
        metrics |= {f"codebook/{name}": value for name, value in codebook_use(counts).items()}
        chosen = torch.linspace(0, len(rebuilt) - 1, min(_GRID_FRAMES, len(rebuilt))).round().long()
        provisional = model.discriminator is not None and float(model.gan_share) < 1
        return Validation(
            score=metrics["loss"],
            provisional=provisional,
            metrics=metrics,
            images={"reconstructions": reconstruction_grid(self.frames[chosen], rebuilt[chosen])},
        )


def _measure(model: TokenizerObjective, frames: Tensor) -> dict[str, Tensor]:
    """Return measurements [B] of the frames by name, the `rebuilt` frames, and their `tokens`."""
    frames = frames.to(model.gan_share.device)
    images = images_from_frames(frames, model.autoencoder.config.frame_size)
    reconstruction = model.autoencoder(images)
    loss, parts = model.fidelity(reconstruction.images, images)
    rebuilt = frames_from_images(reconstruction.images)
    return {
        **{name: part.repeat(len(frames)) for name, part in {"loss": loss, **parts}.items()},
        "psnr": psnr(rebuilt, frames),
        "ssim": ssim(rebuilt, frames),
        "tokens": reconstruction.tokens.flatten(),
        "rebuilt": rebuilt.cpu(),
    }


def reconstruction_grid(originals: Tensor, rebuilt: Tensor) -> Pixels:
    """Return one picture that shows frames [N, H, W, 3] beside their reconstructions."""
    pairs = torch.stack([originals, rebuilt], dim=1)
    pairs_per_row = 1 if len(pairs) % 2 else 2
    return rearrange(pairs, "(n k) two h w c -> (n h) (k two w) c", k=pairs_per_row).numpy()


def validation_frames(drives: Sequence[SampledDrive], size: FrameSize, most: int) -> Tensor:
    """Decode at most `most` frames, uint8 [N, H, W, 3], spread evenly over the drives. Frames that
    are lost to damage are left out."""
    ends = np.cumsum([len(drive.indices) for drive in drives])
    places = np.linspace(0, ends[-1] - 1, min(most, ends[-1])).round().astype(np.int64)
    frames: list[Pixels] = []
    for drive, end in zip(drives, ends, strict=True):
        own = np.unique(places - end) + len(drive.indices)
        own = own[(own >= 0) & (own < len(drive.indices))]
        streamed = drive.drive.stream_with_losses(size, drive.indices[own])
        frames.extend(frame for frame in streamed if frame is not None)
    if not frames:
        raise DriveSimError("every validation frame is damaged; choose other validation drives")
    return torch.from_numpy(np.stack(frames))


def _described(drives: Sequence[SampledDrive]) -> dict[str, int | str]:
    """Return a summary of the frames, to check that a resumed run uses the same frames."""
    digest = hashlib.sha256()
    for drive in sorted(drives, key=lambda sampled: sampled.drive.id):
        video = drive.drive.video
        size = None if video is None else video.path.stat().st_size
        digest.update(json.dumps([drive.drive.id, size, drive.indices.tolist()]).encode())
        digest.update(drive.timestamps.tobytes())
    return {
        "count": len(drives),
        "frames": sum(len(drive.indices) for drive in drives),
        "sha256": digest.hexdigest(),
    }


def _decodable(
    drives: Sequence[SampledDrive], size: FrameSize, device: torch.device | str
) -> list[SampledDrive]:
    """Return the drives whose frames can all be decoded. Print the errors of the other drives.

    Call this before the drives are split into training and validation, because the split must
    depend only on the drives that are kept. With several ranks, the main rank decodes the frames
    and tells the other ranks which drives to keep.
    """
    total = sum(len(drive.indices) for drive in drives)

    def good() -> list[int]:
        numbers = []
        with progress(total, "check", "frames") as display:
            for number, sampled in enumerate(drives):
                try:
                    for _ in sampled.drive.stream_with_losses(size, sampled.indices):
                        display.advance(1)
                    numbers.append(number)
                except DriveSimError as error:
                    display.say(f"skipped {sampled.drive.id}: {error}")
        return numbers

    with process_group(resolve_device(device)) as (ranks, _):
        kept = [drives[number] for number in ranks.from_main(good)]
    if not kept:
        raise DriveSimError("every drive was skipped: nothing is left to train on")
    return kept


def _export(module: nn.Module, run: Path) -> None:
    assert isinstance(module, Autoencoder)
    # Save a copy, because `Tokenizer` freezes its autoencoder.
    Tokenizer(copy.deepcopy(module)).save(run)
