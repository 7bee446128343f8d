"""The frozen world model, loaded from a run folder, and the futures that it generates.

Axes: C contexts, T frames in a context, W frames in the model's window, N future frames,
F = branches * samples futures, r c token rows and columns, H W pixels.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from numpy.typing import ArrayLike
from pydantic import Field
from torch import Tensor

from driving_sim.data.actions.action_log import SteeringKind
from driving_sim.data.arrays import Pixels
from driving_sim.data.tokens.store import TokenStore
from driving_sim.data.video.frame_rate import RATE_TOLERANCE
from driving_sim.engine.config import config, from_dict, load_json, save_json, to_dict
from driving_sim.engine.device import resolve_device
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.precision import autocast, name_of
from driving_sim.engine.run_folder import check_complete, find_run, kind_of
from driving_sim.engine.weights import (
    build_with_weights,
    fingerprint,
    round_to_bf16,
    save_weights,
)
from driving_sim.tokenizer.tokenizer import TOKENIZER, Tokenizer
from driving_sim.world_model.actions import ActionStatistics, with_validity
from driving_sim.world_model.cache import encode_frame
from driving_sim.world_model.kernels.decode import FrozenPasses
from driving_sim.world_model.sampling.draw_waves import FrameSampler
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.session import HISTORY_S, Frame, Prefix, Session
from driving_sim.world_model.transformer import TokenGrid, Transformer, TransformerConfig

_WEIGHTS = "model.safetensors"
_CONFIG = "config.json"
_MOST_CONFIG_BYTES = 2**26  # large, because the config lists all validation drives
_MOST_FPS = 1000


@config
class WorldModelConfig:
    """The content of a world model's `config.json`."""

    model: TransformerConfig
    """Size and shape of the transformer."""
    grid: TokenGrid
    """Size and codebook of the tokenizer's token grid."""
    actions: ActionStatistics
    """Statistics of the training data's actions."""
    fps: Annotated[float, Field(gt=0, le=_MOST_FPS)]
    """Frames per second of the training data and of generated futures."""
    steering_kind: SteeringKind | None
    """Kind of the steering channel; None if no training drive had steering."""
    validation_drives: tuple[str, ...]
    """Ids of the held-out drives. The best weights were chosen by validation on them."""


class Beginning(Protocol):
    """Anything that a drive can start from, such as a `Context` from a video."""

    def prefix(self, world: "WorldModel") -> Prefix:
        """Encode the frames and the actions between them."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Futures as frames and as tokens."""

    frames: Pixels
    """uint8 [F, N, H, W, 3]."""
    tokens: Tensor
    """int64 [F, N, r, c]."""
    log_probs: Tensor
    """[F, N, r, c]: log-probabilities of the tokens in nats, under the plain model."""
    sampling_log_probs: Tensor
    """[F, N, r, c]: log-probabilities in nats, under the distribution used for sampling."""


class WorldModel:
    """Generates future tokens from a context and actions, with frozen weights and no dropout.

    `precision` is the number format of the passes: fp32, bf16 or auto. auto chooses bf16 if bf16 is
    faster. On a CPU, bf16 is faster whenever the passes are compiled, because they then read half
    as many bytes as in fp32. Passes can be compiled only for float32 weights.
    """

    def __init__(
        self,
        transformer: Transformer,
        tokenizer: Tokenizer,
        *,
        fps: float,
        steering_kind: SteeringKind | None,
        validation_drives: Sequence[str] = (),
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ) -> None:
        self.device = torch.device(device)
        self.transformer = transformer.eval().requires_grad_(False).to(self.device)
        self.tokenizer = tokenizer
        self.config = WorldModelConfig(
            model=transformer.config,
            grid=transformer.grid,
            actions=transformer.statistics,
            fps=fps,
            steering_kind=steering_kind,
            validation_drives=tuple(validation_drives),
        )
        """Everything that defines the model, except its weights and its tokenizer."""
        self.fps, self.steering_kind = fps, steering_kind
        self.validation_drives = self.config.validation_drives
        self.statistics = transformer.statistics
        """Statistics of the training data's actions."""
        # If the training data had no valid speed, its mean and std have their defaults, 0 and 1.
        has_speed = (self.statistics.mean[0], self.statistics.std[0]) != (0.0, 1.0)
        self.known_channels = (has_speed, steering_kind is not None)
        """Whether the model was trained with speed, and whether it was trained with steering."""
        self.context_frames = transformer.config.context_frames
        """Number of frames in the model's window, including the frame being predicted."""
        self.said_beyond: set[str] = set()
        """Channels of which a session has said that an action was beyond the training data."""
        self._precision = precision
        self._passes = FrozenPasses(self.transformer, precision)
        self.dtype = self._passes.dtype
        self.precisions = {
            "tokenizer": name_of(tokenizer.dtype),
            "world_model": name_of(self.dtype),
        }
        """Number formats (fp32 or bf16) of the tokenizer and of the world model's passes."""
        described = to_dict(self.config)
        # Leave out what older models did not record, so that their fingerprints stay valid.
        described["actions"] = {k: v for k, v in described["actions"].items() if v is not None}
        identity = {"config": described, "tokenizer": tokenizer.fingerprint}
        self.fingerprint = fingerprint(identity, transformer)
        """SHA-256 of weights, config and tokenizer."""
        self.run: Path | None = None
        """Run folder that the model was loaded from, or None."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Tell `copy` and `pickle` to rebuild the model from its weights.

        Compiled passes cannot be copied, because they contain memory addresses.
        """
        facts = {
            name: getattr(self, name) for name in ("fps", "steering_kind", "validation_drives")
        }
        # Pass on "auto" itself: another machine that loads the pickle may choose another format.
        make = partial(type(self), **facts, device=self.device, precision=self._precision)
        return make, (self.transformer, self.tokenizer), {"run": self.run}

    @classmethod
    def from_run(cls, path: Path | str, device: str = "auto", precision: str = "auto") -> Self:
        """Load the run folder `path`, or the packaged model named `path`.

        Raises `DriveSimError` if it is missing, incomplete or inconsistent, or if the folder holds
        a tokenizer.
        """
        folder = find_run(path)
        if kind_of(folder) == "tokenizer":
            its_run = folder.parent if kind_of(folder.parent) == "world-model" else None
            raise DriveSimError(
                f"{folder} is a tokenizer, not a world model; "
                + (f"its world model is {its_run}" if its_run else "name the run of a world model")
            )
        check_complete(folder, (_CONFIG, _WEIGHTS), "world model")
        saved = load_json(folder / _CONFIG, most_bytes=_MOST_CONFIG_BYTES)
        config = from_dict(WorldModelConfig, saved.get("config", {}), str(folder / _CONFIG))
        tokenizer = Tokenizer.from_run(folder / TOKENIZER, device, precision)
        transformer, written = build_with_weights(
            lambda: Transformer(config.model, config.grid, config.actions),
            folder / _WEIGHTS,
            of="this world model",
        )
        world = cls(
            transformer,
            tokenizer,
            fps=config.fps,
            steering_kind=config.steering_kind,
            validation_drives=config.validation_drives,
            device=resolve_device(device),
            precision=precision,
        )
        grid = TokenGrid(rows=tokenizer.rows, cols=tokenizer.cols, levels=tuple(tokenizer.levels))
        if written.get("tokenizer") != tokenizer.fingerprint or config.grid != grid:
            raise DriveSimError(
                f"{folder / TOKENIZER} is not the tokenizer that this world model was trained "
                "with; copy the whole run folder again"
            )
        if written.get("fingerprint") != world.fingerprint:
            raise DriveSimError(
                f"{folder}: config and weights do not belong together (their fingerprint "
                "differs from the saved one); copy the folder again"
            )
        world.run = folder
        return world

    def rounded(self) -> Self:
        """Return a copy whose weights are rounded to bf16, so that `save` can write them in bf16.

        The tokenizer is rounded too. The copies have other fingerprints. So that its token stores
        fit, round a tokenizer before you tokenize with it: rounding it again changes nothing.
        """
        transformer = copy.deepcopy(self.transformer)
        round_to_bf16(transformer)
        return type(self)(
            transformer,
            self.tokenizer.rounded(),
            fps=self.fps,
            steering_kind=self.steering_kind,
            validation_drives=self.validation_drives,
            device=self.device,
            precision=self._precision,
        )

    def save(self, path: Path | str, dtype: torch.dtype = torch.float32) -> None:
        """Write weights, config and tokenizer into the folder `path`.

        With `dtype=torch.bfloat16`, the files of weights take half the space. Raises ValueError if
        the weights are not `rounded`.
        """
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save(folder / TOKENIZER, dtype)
        save_json(folder / _CONFIG, {"kind": "world-model", "config": to_dict(self.config)})
        # The weights and the fingerprints are in one file, so that they are replaced together.
        prints = {"tokenizer": self.tokenizer.fingerprint, "fingerprint": self.fingerprint}
        save_weights(self.transformer, folder / _WEIGHTS, prints, dtype)

    def check_store(self, store: TokenStore) -> None:
        """Raise `DriveSimError` if a store's tokenizer, steering or frame rate does not match."""
        if store.info.tokenizer_fingerprint != self.tokenizer.fingerprint:
            raise DriveSimError(
                f"{store.path} was not made by the model's tokenizer; tokenize the videos with the "
                "tokenizer in the model's run folder"
            )
        kind, fps = store.info.steering_kind, store.info.fps
        if kind and self.steering_kind and kind != self.steering_kind:
            raise DriveSimError(
                f"{store.path}: its steering is {kind}, but the model's is {self.steering_kind}; "
                "tokenize drives with the model's kind of steering"
            )
        if abs(fps / self.fps - 1) > RATE_TOLERANCE:
            raise DriveSimError(
                f"{store.path} has {fps:.3g} frames/s, but the model was trained on "
                f"{self.fps:.3g}; tokenize the videos with `fps={self.fps:.3g}`"
            )

    def format_notice(self, store: TokenStore) -> str | None:
        """Return a notice if a store was tokenized in another number format than this model's.

        Otherwise return None. A different number format is not an error, because it changes only
        about 1 token in 100.
        """
        made_in, own = store.info.precision, name_of(self.tokenizer.dtype)
        if made_in == own:
            return None
        return (
            f"{store.path}: its tokens were made in {made_in}, but this model encodes in {own}, so "
            f"about 1 token in 100 differs; set `precision={made_in}` to compute everything in "
            f"{made_in}"
        )

    def encode_prefix(
        self,
        tokens: ArrayLike | Tensor,
        past_actions: ArrayLike,
        valid: ArrayLike | None = None,
        *,
        last_frame: int | None = None,
    ) -> Prefix:
        """Encode a context: tokens int64 [T, r, c] and the actions [T - 1, 2] between its frames.

        Speed is in m/s, steering in the unit of the model's steering kind (rad, or 1/m for
        curvature), left positive. Tokens [C, T, r, c] and actions [C, T - 1, 2] are C contexts,
        which are encoded together. `valid`, of the same shape as the actions, says which actions
        are known. By default, all actions that are not NaN are known.

        Only the last W - 1 frames are encoded, because together with the next frame they fill the
        model's window. The frame before them and the action that leads from it are used as input.
        Frames are numbered from 0, or so that the last one gets the number `last_frame`, for
        `Session.restart`. The context then needs 2 (W - 1) frames. Raises `DriveSimError` for
        tokens that do not fit the model, for infinite actions, and for too few frames.
        """
        tokens_CTP = self._checked_tokens(tokens).to(self.device)
        contexts, count, _ = tokens_CTP.shape
        actions, known = with_validity("past_actions", past_actions, valid)
        if actions.shape != (*torch.as_tensor(tokens).shape[:-3], count - 1, 2):
            raise ValueError(
                f"past_actions of shape {tuple(actions.shape)}: {count} context frames need "
                f"{count - 1} actions between them, [{count - 1}, 2]"
            )
        window = self.context_frames - 1
        first, encoded = 0, min(count, window)
        if last_frame is not None:
            # The ring begins with a frame whose number is a multiple of W.
            first = (last_frame - window + 1) // self.context_frames * self.context_frames
            encoded = last_frame - first + 1
            if count < 2 * window:
                raise DriveSimError(
                    f"the context has {count} frames, too few to begin again from; give a context "
                    f"of at least {2 * window} frames"
                )
        start = self.no_prefix(contexts, first)
        before = torch.cat([start.last[:, None], tokens_CTP[:, :-1]], dim=1)
        # No action leads to the first frame, so put an unknown action before the others.
        pads = (0, 0, 1, 0)
        led = [F.pad(x.view(contexts, -1, 2), pads).to(self.device) for x in (actions, known)]
        with torch.inference_mode(), autocast(start.cache.device, start.cache.dtype):
            for t in range(count - encoded, count):
                frame = [sequence[:, t] for sequence in (tokens_CTP, before, *led)]
                encode_frame(start.cache, *frame, judge=False)
        return Prefix(start.cache, tokens_CTP[:, -1])

    def no_prefix(self, contexts: int = 1, first: int = 0) -> Prefix:
        """Return empty contexts, whose futures begin with the first frame of a drive.

        That frame gets the number `first`, a multiple of W.
        """
        none = self.transformer.grid.codebook_size
        last = torch.full((contexts, self.transformer.order.tokens), none, device=self.device)
        return Prefix(self._passes.new_cache(contexts, first), last)

    def _checked_tokens(self, tokens: ArrayLike | Tensor) -> Tensor:
        """Return int64 tokens [C, T, r * c]; raise DriveSimError if they do not fit the model."""
        grid = self.transformer.grid
        raw = torch.as_tensor(tokens).long()
        if raw.ndim not in (3, 4) or raw.shape[-2:] != (grid.rows, grid.cols):
            raise DriveSimError(
                f"tokens have shape {list(raw.shape)}, but this world model takes "
                f"[T, {grid.rows}, {grid.cols}]; encode frames with its own tokenizer"
            )
        if not raw.numel():
            raise DriveSimError("the context is empty; give at least one frame")
        if raw.min() < 0 or raw.max() >= grid.codebook_size:
            raise DriveSimError(
                f"tokens go from {raw.min()} to {raw.max()}, but this world model's are "
                f"below {grid.codebook_size}; encode frames with its own tokenizer"
            )
        tokens_CTrc = raw[None] if raw.ndim == 3 else raw
        return rearrange(tokens_CTrc, "k t r c -> k t (r c)")

    def drive(
        self,
        context: Prefix | Beginning | Pixels | Tensor,
        past_actions: ArrayLike | None = None,
        *,
        branches: int = 1,
        samples: int = 1,
        sampling: Sampling | None = None,
        first_draw: int = 0,
        draws: Sequence[int] | None = None,
        history_s: float = HISTORY_S,
    ) -> Session:
        """Start driving after a context: F = branches * samples futures, stepped together.

        The context is a `Context` (see `context_from_drive`), frames uint8 [T, height, width, 3]
        with their `past_actions` [T - 1, 2] (m/s, rad; NaN is unknown; by default, all are), or a
        `Prefix` from `encode_prefix`. The session can be rewound by up to `history_s`; for each
        window of W frames that it goes back, it keeps a copy of the cache.

        Sample s of branch b is future number b * samples + s. The context is a single one for all
        branches, or a `Prefix` of one per branch. With a single context, sample s gets the same
        random numbers in every branch, so that branches differ only by their actions. With one
        context per branch, every future gets its own random numbers.

        A draw is one set of random numbers, which the seed and the draw's number determine. Draws
        are numbered from `first_draw` on. If contexts are split into batches, set `first_draw` to
        the number of draws in all earlier batches. `draws` gives the F futures other numbers.
        """
        prefix = self._prefix(context, past_actions)
        contexts = len(prefix.last)
        if contexts not in (1, branches):
            raise ValueError(
                f"{branches} branches of {contexts} contexts: give one context, or one per branch"
            )
        if draws is not None and len(draws) != branches * samples:
            raise ValueError(
                f"{len(draws)} draws for {branches * samples} futures: give one for each"
            )
        own = torch.arange(branches) if contexts > 1 else torch.zeros(branches, dtype=torch.int64)
        numbers = first_draw + own[:, None] * samples + torch.arange(samples)
        sampler = FrameSampler(
            prefix.cache,
            prefix.last,
            samples=numbers.flatten() if draws is None else torch.tensor(draws),
            sampling=sampling or Sampling(),
            contexts=own.repeat_interleave(samples),
        )
        return Session(self, sampler, history_s=history_s)

    def _prefix(
        self, context: Prefix | Beginning | Pixels | Tensor, past_actions: ArrayLike | None
    ) -> Prefix:
        if not isinstance(context, np.ndarray | Tensor):
            if not isinstance(context, Prefix) and not hasattr(context, "prefix"):
                raise TypeError(
                    f"a drive starts from frames, a context or a prefix, not from {context!r}; "
                    "load_context loads a video"
                )
            if past_actions is not None:
                raise TypeError("past_actions belong to frames; a context has its own")
            return context if isinstance(context, Prefix) else context.prefix(self)
        if past_actions is None:
            past_actions = np.full((max(0, len(context) - 1), 2), np.nan)
        return self.encode_prefix(self.tokenizer.encode(context), past_actions)

    def generate(
        self,
        prefix: Prefix,
        actions: ArrayLike,
        valid: ArrayLike | None = None,
        *,
        samples: int = 1,
        sampling: Sampling | None = None,
        first_draw: int = 0,
    ) -> Iterator[Frame]:
        """Generate F = branches * samples futures; yield the frames of all futures, step by step.

        `actions` are [branches, N, 2] or, for one branch, [N, 2] (m/s, rad). The first action leads
        from the last context frame to the first new frame. `valid`, of the same shape, says which
        actions are known. By default, all actions that are not NaN are known. Infinite actions
        raise `DriveSimError`. For contexts, samples and draws, see `drive`. Memory does not grow
        with N.

        With compiled passes, a future is independent of the other futures, to the last bit. With
        torch's passes, rounding depends on the number of futures. The random numbers stay the same,
        but if one is very close to the boundary between two tokens, that token can change, and with
        it the rest of the future.
        """
        actions_BNA, valid_BNA = with_validity("actions", actions, valid)
        if actions_BNA.ndim == 2:
            actions_BNA, valid_BNA = actions_BNA[None], valid_BNA[None]
        if actions_BNA.ndim != 3 or actions_BNA.shape[2] != 2:
            raise ValueError(
                f"actions of shape {tuple(actions_BNA.shape)}: must be [branches, N, 2] or [N, 2]"
            )
        session = self.drive(
            prefix,
            branches=len(actions_BNA),
            samples=samples,
            sampling=sampling,
            first_draw=first_draw,
            history_s=0,
        )
        pairs = [
            repeat(values, "b n a -> n (b s) a", s=samples).numpy()
            for values in (actions_BNA, valid_BNA)
        ]
        for action, known in zip(*pairs, strict=True):
            yield session.step(action, known)

    def rollout(
        self,
        frames: Pixels | Tensor,
        past_actions: ArrayLike,
        actions: ArrayLike,
        *,
        samples: int = 1,
        seed: int = 0,
        temperature: float = 1.0,
        min_p: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
    ) -> Rollout:
        """Generate the frames that follow `frames` uint8 [T, height, width, 3] under `actions`.

        `past_actions` [T - 1, 2] and `actions` [N, 2] or [branches, N, 2] are speed in m/s and
        steering in the unit of the model's steering kind (rad, or 1/m for curvature), left
        positive. NaN means unknown. All frames stay in memory. For long futures, call `generate`
        and decode its tokens frame by frame.
        """
        sampling = Sampling(
            seed=seed,
            temperature=temperature,
            min_p=min_p,
            top_k=top_k,
            top_p=top_p,
            guidance=guidance,
        )
        prefix = self.encode_prefix(self.tokenizer.encode(frames), past_actions)
        steps = list(self.generate(prefix, actions, samples=samples, sampling=sampling))
        tokens = torch.stack([step.tokens for step in steps], dim=1).cpu()
        decoded = self.tokenizer.decode(rearrange(tokens, "f n r c -> (f n) r c"))
        return Rollout(
            rearrange(decoded, "(f n) h w c -> f n h w c", f=len(tokens)).numpy(),
            tokens,
            torch.stack([step.log_probs for step in steps], dim=1).cpu(),
            torch.stack([step.sampling_log_probs for step in steps], dim=1).cpu(),
        )
