"""Train a world model on a token store: the options of a run, its checks, and the training."""

import copy
from collections.abc import Sequence
from dataclasses import field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn

from driving_sim.data.actions.action_log import SteeringKind
from driving_sim.data.split import split_drives
from driving_sim.data.tokens.store import DriveTokens, TokenStore
from driving_sim.data.tokens.windows import TokenWindows
from driving_sim.engine.config import Count, InnerShare, config, to_dict
from driving_sim.engine.device import resolve_device
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.ranks.distributed import process_group
from driving_sim.engine.run_folder import check_run
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.engine.training.loop import TrainingResult, train
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.kernels.library import library
from driving_sim.world_model.training.objective import InputNoiseConfig, WorldModelObjective
from driving_sim.world_model.training.validation import WindowValidation
from driving_sim.world_model.transformer import TokenGrid, Transformer, TransformerConfig
from driving_sim.world_model.world_model import WorldModel

# Approximate number of frames to measure action statistics on; a store can have billions.
_STATISTICS_FRAMES = 2_000_000


@config
class WorldModelDataConfig:
    """Settings of the windows for training and for validation."""

    batch_size: Count = 8
    """Number of windows in a batch on each device; a window has `context_frames` frames."""
    validation: tuple[str, ...] | None = None
    """Ids of the validation drives. If None, a hash of the ids chooses a share of the drives."""
    validation_fraction: InnerShare = 0.1
    """Share of the drives that is held out for validation if `validation` is None."""
    validation_windows: Count = 64
    """Maximum number of windows in a validation."""
    preview: bool = True
    """Whether a validation also makes a video of half a window, as predicted and as recorded."""


@config
class WorldModelRunConfig:
    """All options of a world model's training run."""

    training: TrainingConfig
    """Settings of the training loop and the optimiser."""
    model: TransformerConfig = field(default_factory=TransformerConfig)
    """Size and shape of the transformer."""
    objective: InputNoiseConfig = field(default_factory=InputNoiseConfig)
    """Noise that training adds to the model's input."""
    data: WorldModelDataConfig = field(default_factory=WorldModelDataConfig)
    """Settings of the windows for training and for validation."""


def train_world_model(
    store: Path,
    config: WorldModelRunConfig,
    run: Path,
    *,
    tokenizer: Path,
    init_from: Path | None = None,
    resume: bool = False,
    device: str = "auto",
) -> TrainingResult:
    """Train on the token store `store`, made by `tokenizer`; save the best model in `run`.

    Validates on whole drives that are held out from training. If `init_from` is given, training
    starts from the weights of that run, which must have the same model configuration, tokenizer and
    kind of steering. Raises `DriveSimError` if `store`, `tokenizer` and `init_from` do not match,
    or if `run` cannot be used.
    """
    tokens = TokenStore(store)
    run_config = {
        **to_dict(config),
        "store": {"content": tokens.index.content, "tokenizer": tokens.info.tokenizer_fingerprint},
        "init_from": None if init_from is None else str(init_from),
    }
    check_run(run, run_config, resume)
    with process_group(resolve_device(device)) as (_, own_device):
        frozen = Tokenizer.from_run(tokenizer, own_device, config.training.precision)
        if frozen.fingerprint != tokens.info.tokenizer_fingerprint:
            raise DriveSimError(
                f"{store} was not made by the tokenizer {tokenizer} (fingerprints "
                f"{tokens.info.tokenizer_fingerprint[:12]} and {frozen.fingerprint[:12]}); set "
                "`tokenizer` to the one that made it, or tokenize again"
            )
        training_ids, validation_ids = split_drives(
            tokens.drive_ids,
            validation=config.data.validation,
            fraction=config.data.validation_fraction,
        )
        training = tokens.select(training_ids)
        # If there is only one drive, use it for both training and validation.
        validation = tokens.select(validation_ids or training_ids)
        torch.manual_seed(config.training.seed)
        transformer = _new_transformer(config.model, training, frozen, init_from)

        if own_device.type == "cpu":
            library()  # compile now, so that the time does not count towards `minutes`

        def as_world(model: nn.Module) -> WorldModel:
            assert isinstance(model, Transformer)
            # Copy the module, because WorldModel freezes the module that it is given.
            module = copy.deepcopy(model)
            return WorldModel(
                module,
                frozen,
                fps=tokens.info.fps,
                steering_kind=cast("SteeringKind | None", tokens.info.steering_kind),
                validation_drives=validation_ids,
                device=module.source.device,
            )

        return train(
            WorldModelObjective(config.objective, transformer),
            dataset=TokenWindows(
                training,
                frames=config.model.context_frames,
                batch_size=config.data.batch_size,
                seed=config.training.seed,
            ),
            config=config.training,
            run=run,
            validate=WindowValidation(
                validation,
                frames=config.model.context_frames,
                windows=config.data.validation_windows,
                batch_size=config.data.batch_size,
                as_world=as_world if config.data.preview else None,
            ),
            export=lambda model, folder: as_world(model).save(folder),
            run_config=run_config,
            resume=resume,
            device=own_device,
        )


def action_statistics(drives: Sequence[DriveTokens]) -> ActionStatistics:
    """Measure the actions of all drives or, if the store is large, of every n-th drive."""
    total = sum(len(drive) for drive in drives)
    chosen = drives[:: max(1, total // _STATISTICS_FRAMES)]
    return ActionStatistics.measure(
        np.concatenate([drive.actions for drive in chosen]),
        np.concatenate([drive.action_valid for drive in chosen]),
    )


def _new_transformer(
    config: TransformerConfig,
    drives: Sequence[DriveTokens],
    tokenizer: Tokenizer,
    init_from: Path | None,
) -> Transformer:
    grid = TokenGrid(rows=tokenizer.rows, cols=tokenizer.cols, levels=tokenizer.levels)
    statistics = action_statistics(drives)
    if init_from is None:
        return Transformer(config, grid, statistics)
    source, info = WorldModel.from_run(init_from, "cpu"), drives[0].info
    for name, own, expected in (
        ("configuration", source.config.model, config),
        ("token grid", source.config.grid, grid),
        ("tokenizer", source.tokenizer.fingerprint, tokenizer.fingerprint),
        ("kind of steering", source.steering_kind, info.steering_kind),
    ):
        if own != expected:
            raise DriveSimError(
                f"`init_from` {init_from}: its {name} differs from this run's ({own} and "
                f"{expected}); choose another run or change the settings"
            )
    transformer = Transformer(config, grid, _in_scale_of(source, statistics))
    transformer.load_state_dict(source.transformer.state_dict())
    return transformer


def _in_scale_of(source: WorldModel, measured: ActionStatistics) -> ActionStatistics:
    """Return `measured`, but with the mean and std of `source`.

    The weights of `source` expect actions that are normalised with its mean and std. If a channel
    was missing or constant in the training data of `source`, it keeps its measured mean and std.
    """
    kept = source.statistics
    learned = np.array(source.known_channels) & (np.array(kept.std) > 0)
    mean = np.where(learned, kept.mean, measured.mean).tolist()
    std = np.where(learned, kept.std, measured.std).tolist()
    return replace(measured, mean=(mean[0], mean[1]), std=(std[0], std[1]))
