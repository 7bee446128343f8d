"""How good rolled-out frames are, the further they lie ahead: beside their floor and a baseline.

The floor is the tokenizer's own reconstruction of the true frames: no model can do better. The
baseline repeats the last context frame.

Axes: N frames of the future, H W pixels, n clips.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from driving_sim.evaluate.frechet import frechet_distance
from driving_sim.evaluate.intervals import interval
from driving_sim.evaluate.rollouts import Imagined
from driving_sim.evaluate.section import Media, Section, Table, film, photo, plot
from driving_sim.evaluate.video_features import VideoFeatures
from driving_sim.tokenizer.metrics import psnr, ssim
from driving_sim.tokenizer.perceptual import PerceptualLoss
from driving_sim.world_model.panels import contact_sheet, side_by_side

Frames = NDArray[np.uint8]

KINDS = ("model", "floor", "copy_last")
_SHOWN = 4  # clips in the report's pictures
_COLUMNS = 6


class QualityMeter:
    """Compares rolled-out clips with what was recorded, clip by clip; `section` sums up."""

    def __init__(
        self, fps: float, extractor: VideoFeatures, perceptual: PerceptualLoss | None = None
    ) -> None:
        self.fps, self.extractor = fps, extractor
        self.measures: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "psnr_db": psnr,
            "ssim": ssim,
        }
        if perceptual is not None:
            self.measures["lpips"] = perceptual.frame_distances
        self.curves: dict[str, dict[str, list[NDArray[np.float64]]]] = {
            name: {kind: [] for kind in KINDS} for name in self.measures
        }
        self.accuracy: dict[str, list[NDArray[np.float64]]] = {"model": [], "copy_last": []}
        self.features: dict[str, list[NDArray[np.float64]]] = {
            kind: [] for kind in (*KINDS, "true")
        }
        self.shown: list[tuple[str, Frames, Frames]] = []

    def add(self, imagined: Imagined) -> None:
        """Measure one clip's future."""
        clip = imagined.clip
        truth, true_tokens = clip.truth, clip.true_tokens
        last = clip.context[-1]
        futures = {
            "model": imagined.frames,
            "floor": clip.footage.tokenizer.decode(true_tokens).numpy(),
            "copy_last": np.broadcast_to(last, truth.shape).copy(),
        }
        for name, measure in self.measures.items():
            for kind, frames in futures.items():
                values = measure(torch.from_numpy(frames), torch.from_numpy(truth))
                self.curves[name][kind].append(values.double().numpy())
        last_tokens = clip.context_tokens[-1]
        for kind, tokens in (("model", imagined.tokens), ("copy_last", last_tokens)):
            same = (tokens == true_tokens).flatten(1).double().mean(1)
            self.accuracy[kind].append(same.numpy())
        if len(truth) >= self.extractor.least_frames:
            for kind, frames in {**futures, "true": truth}.items():
                self.features[kind].append(self.extractor(frames[None]).astype(np.float64))
        if len(self.shown) < _SHOWN:
            self.shown.append((clip.name, truth, imagined.frames))

    def section(self) -> Section:
        """Curves over the horizon, means with intervals over clips, and pictures."""
        metrics: dict[str, Any] = {"clips": len(self.accuracy["model"])}
        for name, kinds in {**self.curves, "token_accuracy": self.accuracy}.items():
            stacked = {kind: np.stack(rows) for kind, rows in kinds.items()}
            metrics[name] = {kind: interval(rows.mean(axis=1)) for kind, rows in stacked.items()}
            metrics[f"{name}_by_frame"] = {
                kind: rows.mean(axis=0).tolist() for kind, rows in stacked.items()
            }
        metrics[self.extractor.name] = self._distances()
        return Section(
            name="quality",
            title="Rollout quality against the horizon",
            text=_TEXT.format(name=self.extractor.name),
            metrics=metrics,
            parts=(_table(metrics), self._plot(metrics), *self._pictures()),
        )

    def _distances(self) -> dict[str, float] | None:
        if len(self.features["true"]) < 2:
            return None
        true = np.concatenate(self.features["true"])
        return {kind: frechet_distance(np.concatenate(self.features[kind]), true) for kind in KINDS}

    def _plot(self, metrics: dict[str, Any]) -> Media:
        names = [*self.measures, "token_accuracy"]
        figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
        for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
            for kind, curve in metrics[f"{name}_by_frame"].items():
                times = (np.arange(len(curve)) + 1) / self.fps
                axes.plot(times, curve, label=kind.replace("_", " "))
            axes.set(title=name.replace("_", " "), xlabel="seconds ahead")
        axes.legend(frameon=False)
        return plot(figure, "Mean over clips against the horizon")

    def _pictures(self) -> list[Media]:
        count = len(self.shown[0][1])
        chosen = np.unique(np.linspace(0, count - 1, _COLUMNS).round().astype(int))
        rows = [
            (f"{name}: {kind}", [frames[t] for t in chosen])
            for name, truth, future in self.shown
            for kind, frames in (("recorded", truth), ("model", future))
        ]
        sheet = contact_sheet(rows, [f"{(t + 1) / self.fps:+.1f} s" for t in chosen])
        moments = [
            side_by_side(
                [
                    *(truth[t] for _, truth, _ in self.shown),
                    *(future[t] for _, _, future in self.shown),
                ],
                columns=len(self.shown),
            )
            for t in range(count)
        ]
        return [
            photo(sheet, "Recorded futures above the model's"),
            film(moments, self.fps, "Above: recorded. Below: the model's"),
        ]


_TEXT = """Each clip is rolled out under the actions that were recorded, and compared with the
frames that were recorded. Floor: the tokenizer's reconstruction of those frames, which no model can
beat. Copy last: the last context frame, repeated.

A sampled future is one of many that could have followed: it may be right and still differ from the
recording, so PSNR and SSIM fall with the horizon for a perfect model too. {name} is the Fréchet
distance between the features of rolled-out and recorded clips; its floor is not zero."""


def _table(metrics: dict[str, Any]) -> Table:
    rows = []
    for name, kinds in metrics.items():
        if isinstance(kinds, dict) and not name.endswith("_by_frame"):
            values = [kinds.get(kind) for kind in KINDS]
            rows.append(
                (name, *(each["mean"] if isinstance(each, dict) else each for each in values))
            )
    return Table(
        caption="Means over all frames of all clips",
        columns=("", *(kind.replace("_", " ") for kind in KINDS)),
        rows=tuple(rows),
    )
