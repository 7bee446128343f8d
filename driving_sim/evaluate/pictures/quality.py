"""How good rolled-out frames are, the further they lie ahead: beside their floor and a baseline.

The floor is the tokenizer's own reconstruction of the true frames: no model can do better. Where
the true frames are reconstructions themselves, there is none. The baseline repeats the last context
frame.

Axes: N frames of the future, H W pixels, n clips.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from driving_sim.data.arrays import Floats
from driving_sim.evaluate.pictures.features import VideoFeatures
from driving_sim.evaluate.pictures.frechet import frechet_distance
from driving_sim.evaluate.report.intervals import interval
from driving_sim.evaluate.report.section import Media, Section, Table, film, photo, plot
from driving_sim.evaluate.rollouts import Imagined
from driving_sim.tokenizer.metrics import psnr, ssim
from driving_sim.tokenizer.perceptual import PerceptualLoss
from driving_sim.world_model.panels import contact_sheet, side_by_side

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


def evaluate_quality(
    rollouts: Sequence[Imagined],
    fps: float,
    extractor: VideoFeatures,
    perceptual: PerceptualLoss | None = None,
) -> Section:
    """Compare rolled-out clips with what was recorded.

    Curves over the horizon, means with intervals over clips, and pictures.
    """
    curves: dict[str, dict[str, list[Floats]]] = {}
    features: dict[str, list[Floats]] = {}

    def note(name: str, kind: str, values: Tensor) -> None:
        curves.setdefault(name, {}).setdefault(kind, []).append(values.double().numpy())

    for imagined in rollouts:
        clip = imagined.clip
        truth, true_tokens = clip.truth, clip.true_tokens
        copies = np.broadcast_to(clip.context[-1], truth.shape).copy()
        futures = {"model": imagined.frames, "copy_last": copies}
        if clip.footage.recorded is not None:
            futures["floor"] = clip.footage.tokenizer.decode(true_tokens).numpy()
        for kind, frames in futures.items():
            for name, measure in frame_measures(perceptual).items():
                note(name, kind, measure(torch.from_numpy(frames), torch.from_numpy(truth)))
        for kind, tokens in (("model", imagined.tokens), ("copy_last", clip.context_tokens[-1])):
            note(_ACCURACY, kind, (tokens == true_tokens).flatten(1).double().mean(1))
        if len(truth) >= extractor.least_frames:
            for kind, frames in {**futures, "true": truth}.items():
                found = extractor(frames[None]).astype(np.float64)
                features.setdefault(kind, []).append(found)
    # Else the true frames are reconstructions.
    recorded = all(each.clip.footage.recorded is not None for each in rollouts)
    metrics: dict[str, Any] = {"clips": len(rollouts), "recorded": recorded}
    for name, kinds in curves.items():
        # Tokens of another tokenizer are right or wrong about something else.
        always = {"per_tokenizer": True} if name == _ACCURACY else {"floor": None}
        stacked = {kind: np.stack(kinds[kind]) for kind in KINDS if kind in kinds}
        metrics[name] = always | {
            kind: interval(rows.mean(axis=1)) for kind, rows in stacked.items()
        }
        metrics[f"{name}_by_frame"] = always | {
            kind: rows.mean(axis=0).tolist() for kind, rows in stacked.items()
        }
    metrics[extractor.name] = _distances(features, rollouts[0].clip.frames)
    return Section(
        "quality",
        "Rollout quality against the horizon",
        _TEXT.format(name=extractor.name, truth=_RECORDED if recorded else _RECONSTRUCTED),
        metrics,
        (
            _table(metrics, [*curves], extractor.name),
            _plot(metrics, [*curves], fps),
            *_pictures(rollouts, fps, "recorded" if recorded else "reconstructed"),
        ),
    )


def _distances(
    features: Mapping[str, Sequence[Floats]], frames: int
) -> dict[str, float | None] | None:
    """The Fréchet distances of clips of so many frames; None where there are less than two."""
    clips = len(features.get("true", ()))
    if clips < 2:
        return None
    joined = {kind: np.concatenate(found) for kind, found in features.items()}
    true = joined.pop("true")
    distances = {kind: frechet_distance(found, true) for kind, found in joined.items()}
    return {"clips": clips, "frames": frames, **dict.fromkeys(KINDS), **distances}


def _plot(metrics: Mapping[str, Any], names: Sequence[str], fps: float) -> Media:
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    panels = figure.subplots(1, len(names))
    for axes, name in zip(panels, names, strict=True):
        curves = metrics[f"{name}_by_frame"]
        for kind in (kind for kind in KINDS if curves.get(kind)):
            times = (np.arange(len(curves[kind])) + 1) / fps
            axes.plot(times, curves[kind], color=_COLOURS[kind], label=kind.replace("_", " "))
        axes.set(title=name.replace("_", " "), xlabel="seconds ahead")
    # The first panel has every kind that there is; tokens have no floor.
    panels[0].legend(frameon=False)
    return plot(figure, "Mean over clips against the horizon")


def _pictures(rollouts: Sequence[Imagined], fps: float, whose: str) -> list[Media]:
    chosen = np.linspace(0, len(rollouts) - 1, _SHOWN).round().astype(int)
    shown = [rollouts[number] for number in np.unique(chosen)]
    truths, futures = [each.clip.truth for each in shown], [each.frames for each in shown]
    count = len(truths[0])
    columns = np.unique(np.linspace(0, count - 1, _COLUMNS).round().astype(int))
    rows = [
        (f"{each.clip.name}: {kind}", [frames[t] for t in columns])
        for each, truth in zip(shown, truths, strict=True)
        for kind, frames in ((whose, truth), ("model", each.frames))
    ]
    sheet = contact_sheet(rows, [f"{(t + 1) / fps:+.1f} s" for t in columns])
    moments = [
        side_by_side([frames[t] for frames in (*truths, *futures)], columns=len(shown))
        for t in range(count)
    ]
    return [
        photo(sheet, f"Clips from all over the drives: {whose}, and the model's below"),
        film(moments, fps, f"Above: {whose}. Below: the model's"),
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


def _table(metrics: Mapping[str, Any], names: Sequence[str], extractor: str) -> Table:
    named = {name.replace("_", " "): metrics[name] for name in names}
    if distances := metrics[extractor]:
        counts = f"{distances['clips']} clips of {distances['frames']} frames"
        named[f"{extractor}, {counts}"] = distances
    rows = [(label, *map(kinds.get, KINDS)) for label, kinds in named.items()]
    columns = ("", *(kind.replace("_", " ") for kind in KINDS))
    return Table("Means over all frames of all clips, with 95 % intervals", columns, rows)
