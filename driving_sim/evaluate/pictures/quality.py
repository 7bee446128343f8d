"""How good rolled-out frames are, the further they lie ahead: beside their floor and a baseline.

The floor is the tokenizer's own reconstruction of the true frames: no model can do better. Where
the true frames are reconstructions themselves, there is none. The baseline repeats the last context
frame.

Axes: N frames of the future, H W pixels, n clips.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from driving_sim.evaluate.footage import Clip
from driving_sim.evaluate.pictures.features import VideoFeatures
from driving_sim.evaluate.pictures.frechet import frechet_distance
from driving_sim.evaluate.report.intervals import interval
from driving_sim.evaluate.report.section import Media, Section, Table, film, photo, plot
from driving_sim.evaluate.rollouts import Imagined
from driving_sim.tokenizer.metrics import psnr, ssim
from driving_sim.tokenizer.perceptual import PerceptualLoss
from driving_sim.world_model.panels import contact_sheet, side_by_side

Frames = NDArray[np.uint8]
Measure = Callable[[Tensor, Tensor], Tensor]

KINDS = ("model", "floor", "copy_last")
_COLOURS = {"model": "#2a5db0", "floor": "#8a8f99", "copy_last": "#d9822b"}
_SHOWN = 4  # clips in the report's pictures
_COLUMNS = 6
_ACCURACY = "token_accuracy"


def frame_measures(perceptual: PerceptualLoss | None) -> dict[str, Measure]:
    """What frames are compared by: functions of uint8 frames [N, H, W, 3] and true ones to [N]."""
    measures: dict[str, Measure] = {"psnr_db": psnr, "ssim": ssim}
    return measures if perceptual is None else measures | {"lpips": perceptual.frame_distances}


class QualityMeter:
    """Compares rolled-out clips with what was recorded, clip by clip; `section` sums up."""

    def __init__(
        self, fps: float, extractor: VideoFeatures, perceptual: PerceptualLoss | None = None
    ) -> None:
        self.fps, self.extractor = fps, extractor
        self.measures = frame_measures(perceptual)
        self.curves: dict[str, dict[str, list[NDArray[np.float64]]]] = {}
        self.features: dict[str, list[NDArray[np.float64]]] = {}
        self.rollouts: list[tuple[Clip, Tensor]] = []

    @property
    def is_recorded(self) -> bool:
        """Whether the true frames come from videos; else they are reconstructions."""
        return all(clip.footage.recorded is not None for clip, _ in self.rollouts)

    def add(self, imagined: Imagined) -> None:
        """Measure one clip's future."""
        clip = imagined.clip
        self.rollouts.append((clip, imagined.tokens))
        truth, true_tokens = clip.truth, clip.true_tokens
        copies = np.broadcast_to(clip.context[-1], truth.shape).copy()
        futures = {"model": imagined.frames, "copy_last": copies}
        if clip.footage.recorded is not None:
            futures["floor"] = clip.footage.tokenizer.decode(true_tokens).numpy()
        for kind, frames in futures.items():
            for name, measure in self.measures.items():
                values = measure(torch.from_numpy(frames), torch.from_numpy(truth))
                self._note(name, kind, values)
        for kind, tokens in (("model", imagined.tokens), ("copy_last", clip.context_tokens[-1])):
            self._note(_ACCURACY, kind, (tokens == true_tokens).flatten(1).double().mean(1))
        if len(truth) >= self.extractor.least_frames:
            for kind, frames in {**futures, "true": truth}.items():
                found = self.extractor(frames[None]).astype(np.float64)
                self.features.setdefault(kind, []).append(found)

    def _note(self, name: str, kind: str, values: Tensor) -> None:
        self.curves.setdefault(name, {}).setdefault(kind, []).append(values.double().numpy())

    def section(self) -> Section:
        """Curves over the horizon, means with intervals over clips, and pictures."""
        metrics: dict[str, Any] = {"clips": len(self.rollouts), "recorded": self.is_recorded}
        for name, kinds in self.curves.items():
            # Tokens of another tokenizer are right or wrong about something else.
            always = {"per_tokenizer": True} if name == _ACCURACY else {"floor": None}
            stacked = {kind: np.stack(kinds[kind]) for kind in KINDS if kind in kinds}
            metrics[name] = always | {
                kind: interval(rows.mean(axis=1)) for kind, rows in stacked.items()
            }
            metrics[f"{name}_by_frame"] = always | {
                kind: rows.mean(axis=0).tolist() for kind, rows in stacked.items()
            }
        name = self.extractor.name
        metrics[name] = self._distances()
        return Section(
            name="quality",
            title="Rollout quality against the horizon",
            text=_TEXT.format(name=name, truth=_RECORDED if self.is_recorded else _RECONSTRUCTED),
            metrics=metrics,
            parts=(_table(metrics, name), self._plot(metrics), *self._pictures()),
        )

    def _distances(self) -> dict[str, float | None] | None:
        clips = len(self.features.get("true", []))
        if clips < 2:
            return None
        joined = {kind: np.concatenate(found) for kind, found in self.features.items()}
        true = joined.pop("true")
        distances = {kind: frechet_distance(found, true) for kind, found in joined.items()}
        counts = {"clips": clips, "frames": self.rollouts[0][0].frames}
        return {**counts, **dict.fromkeys(KINDS), **distances}

    def _plot(self, metrics: dict[str, Any]) -> Media:
        figure = Figure(figsize=(4 * len(self.curves), 3.2), layout="constrained")
        panels = figure.subplots(1, len(self.curves))
        for axes, name in zip(panels, self.curves, strict=True):
            curves = metrics[f"{name}_by_frame"]
            for kind in (kind for kind in KINDS if curves.get(kind)):
                times = (np.arange(len(curves[kind])) + 1) / self.fps
                label = kind.replace("_", " ")
                axes.plot(times, curves[kind], color=_COLOURS[kind], label=label)
            axes.set(title=name.replace("_", " "), xlabel="seconds ahead")
        # The first panel has every kind that there is; tokens have no floor.
        panels[0].legend(frameon=False)
        return plot(figure, "Mean over clips against the horizon")

    def _pictures(self) -> list[Media]:
        chosen = np.linspace(0, len(self.rollouts) - 1, _SHOWN).round().astype(int)
        shown = [self.rollouts[number] for number in np.unique(chosen)]
        truths = [clip.truth for clip, _ in shown]
        futures = [clip.footage.tokenizer.decode(tokens).numpy() for clip, tokens in shown]
        whose = "recorded" if self.is_recorded else "reconstructed"
        count = len(truths[0])
        columns = np.unique(np.linspace(0, count - 1, _COLUMNS).round().astype(int))
        rows = [
            (f"{clip.name}: {kind}", [frames[t] for t in columns])
            for (clip, _), truth, future in zip(shown, truths, futures, strict=True)
            for kind, frames in ((whose, truth), ("model", future))
        ]
        sheet = contact_sheet(rows, [f"{(t + 1) / self.fps:+.1f} s" for t in columns])
        moments = [
            side_by_side([frames[t] for frames in (*truths, *futures)], columns=len(shown))
            for t in range(count)
        ]
        return [
            photo(sheet, f"Clips from all over the drives: {whose}, and the model's below"),
            film(moments, self.fps, f"Above: {whose}. Below: the model's"),
        ]


_TEXT = """Each clip is rolled out under the actions that were recorded, and compared with
{truth} Copy last: the last context frame, repeated. Intervals are over clips, whose futures share
no frame.

A sampled future is one of many that could have followed: it may be right and still differ from the
recording, so PSNR and SSIM fall with the horizon for a perfect model too. {name} is the Fréchet
distance between the features of rolled-out and true clips; its floor is not zero. Few clips put it
too high, the fewer the more: it compares only with that of as many clips of as many frames, and
with no published one."""
_RECORDED = """the frames that were recorded. Floor: the tokenizer's reconstruction of those frames,
which no model can beat."""
_RECONSTRUCTED = """the tokenizer's reconstructions of the frames that were recorded: the held-out
drives are tokens without their videos. What the tokenizer loses is not in these numbers, and they
have no floor."""


def _table(metrics: dict[str, Any], extractor: str) -> Table:
    named = {
        name.replace("_", " "): metrics[name] for name in metrics if f"{name}_by_frame" in metrics
    }
    if distances := metrics[extractor]:
        counts = f"{distances['clips']} clips of {distances['frames']} frames"
        named[f"{extractor}, {counts}"] = distances
    rows = [(label, *map(kinds.get, KINDS)) for label, kinds in named.items()]
    columns = ("", *(kind.replace("_", " ") for kind in KINDS))
    return Table("Means over all frames of all clips, with 95 % intervals", columns, rows)
