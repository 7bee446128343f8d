"""Measure how close rolled-out frames are to the true frames, at each distance into the future.

The rollouts are compared with a floor and a baseline. The floor is the tokenizer's reconstruction
of the true frames, because no model can do better. There is no floor if the true frames are
themselves reconstructions. The baseline, copy last, repeats the last context frame.

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
"""Function (frames uint8 [N, H, W, 3], true frames) -> one value for each frame [N]."""

KINDS = ("model", "floor", "copy_last")
_COLOURS = {"model": "#2a5db0", "floor": "#8a8f99", "copy_last": "#d9822b"}
_SHOWN = 4  # number of clips in the report's pictures
_COLUMNS = 6  # number of frames of each clip on the contact sheet
_ACCURACY = "token_accuracy"


def frame_measures(perceptual: PerceptualLoss | None) -> dict[str, Measure]:
    """Return the functions that compare frames with true frames. LPIPS requires `perceptual`."""
    measures: dict[str, Measure] = {"psnr_db": psnr, "ssim": ssim}
    return measures if perceptual is None else measures | {"lpips": perceptual.frame_distances}


def evaluate_quality(
    rollouts: Sequence[Imagined],
    fps: float,
    extractor: VideoFeatures,
    perceptual: PerceptualLoss | None = None,
) -> Section:
    """Compare rollouts of clips with the true frames.

    The section contains curves over the horizon, means with intervals over clips, a Fréchet
    distance, and pictures.
    """
    curves: dict[str, dict[str, list[Floats]]] = {}
    features: dict[str, list[Floats]] = {}

    def add_curve(name: str, kind: str, values: Tensor) -> None:
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
                values = measure(torch.from_numpy(frames), torch.from_numpy(truth))
                add_curve(name, kind, values)
        for kind, tokens in (("model", imagined.tokens), ("copy_last", clip.context_tokens[-1])):
            add_curve(_ACCURACY, kind, (tokens == true_tokens).flatten(1).double().mean(1))
        if len(truth) >= extractor.least_frames:
            for kind, frames in {**futures, "true": truth}.items():
                clip_features = extractor(frames[None]).astype(np.float64)
                features.setdefault(kind, []).append(clip_features)
    # If a clip has no video, its true frames are reconstructions.
    recorded = all(rollout.clip.footage.recorded is not None for rollout in rollouts)
    metrics: dict[str, Any] = {"clips": len(rollouts), "recorded": recorded}
    for name, kinds in curves.items():
        # Token accuracy can be compared only for the same tokenizer, and it has no floor.
        extra_keys = {"per_tokenizer": True} if name == _ACCURACY else {"floor": None}
        stacked = {kind: np.stack(kinds[kind]) for kind in KINDS if kind in kinds}
        metrics[name] = extra_keys | {
            kind: interval(rows.mean(axis=1)) for kind, rows in stacked.items()
        }
        metrics[f"{name}_by_frame"] = extra_keys | {
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
    """Return the Fréchet distance between the true clips and each kind of futures in `KINDS`.

    Returns None if there are fewer than two clips. `frames` is the length of the clips, which is
    reported with the distances.
    """
    clips = len(features.get("true", ()))
    if clips < 2:
        return None
    joined = {kind: np.concatenate(of_clips) for kind, of_clips in features.items()}
    true = joined.pop("true")
    distances = {kind: frechet_distance(of_kind, true) for kind, of_kind in joined.items()}
    return {"clips": clips, "frames": frames, **dict.fromkeys(KINDS), **distances}


def _plot(metrics: Mapping[str, Any], names: Sequence[str], fps: float) -> Media:
    figure = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    panels = figure.subplots(1, len(names))
    for axes, name in zip(panels, names, strict=True):
        curves = metrics[f"{name}_by_frame"]
        for kind in (kind for kind in KINDS if curves.get(kind)):
            times = (np.arange(len(curves[kind])) + 1) / fps
            axes.plot(times, curves[kind], color=_COLOURS[kind], label=kind.replace("_", " "))
        axes.set(title=_LABELS[name], xlabel="seconds ahead")
    # Put the legend in the first panel, which shows all kinds of curves. The last panel lacks the
    # floor, because token accuracy has none.
    panels[0].legend(frameon=False)
    return plot(
        figure,
        "Mean over the clips, for each time after the start. The curve of a good model is close to "
        "the floor, if there is one, and better than the curve of copy last. Single clips can be "
        "far from the mean",
    )


def _pictures(rollouts: Sequence[Imagined], fps: float, whose: str) -> list[Media]:
    chosen = np.linspace(0, len(rollouts) - 1, _SHOWN).round().astype(int)
    pictured = [rollouts[number] for number in np.unique(chosen)]
    truths, futures = [r.clip.truth for r in pictured], [r.frames for r in pictured]
    count = len(truths[0])
    columns = np.unique(np.linspace(0, count - 1, _COLUMNS).round().astype(int))
    rows = [
        (f"{rollout.clip.name}: {kind}", [frames[t] for t in columns])
        for rollout, truth in zip(pictured, truths, strict=True)
        for kind, frames in ((whose, truth), ("model", rollout.frames))
    ]
    sheet = contact_sheet(rows, [f"{(t + 1) / fps:+.1f} s" for t in columns])
    moments = [
        side_by_side([frames[t] for frames in (*truths, *futures)], columns=len(pictured))
        for t in range(count)
    ]
    return [
        photo(
            sheet,
            f"Clips spread over the drives. Each clip has two rows: the {whose} frames, and below "
            "them the model's. The headings are times after the start",
        ),
        film(moments, fps, f"The same clips as a video. Top row: {whose}. Bottom row: model"),
    ]


_TEXT = """Question: how close are the rollouts to the true frames, and for how long? A clip is a
short piece of a held-out drive. It is rolled out under the recorded actions and compared with
{truth} "Copy last" is a baseline that repeats the last context frame. A useful model is better than
this baseline.

How to read it. PSNR, SSIM (at most 1) and token accuracy are better if higher. Token accuracy is
the share of tokens that are exactly right. LPIPS, if its weights are installed, and {name} are
better if lower. {name} is the Fréchet distance between the features of all rolled-out clips and the
features of all true clips. It tells whether the rollouts look and move like real clips, not whether
they match frame by frame.

Limits. A rollout is one of many possible futures. It may be realistic and still differ from the
recording, so PSNR, SSIM and token accuracy fall with the horizon even for a perfect model. The
Fréchet distance is biased upwards for few clips. Compare it only between reports with the same
number of clips and frames, and not with published values. Compare token accuracy only between
models with the same tokenizer. Intervals are over clips, whose futures do not overlap."""
_RECORDED = """the recorded frames. "Floor" is the tokenizer's reconstruction of these frames. No
model can have a better PSNR or SSIM; a Fréchet distance below the floor is possible by chance."""
_RECONSTRUCTED = """the tokenizer's reconstructions of the recorded frames, because the held-out
drives are tokens without videos. So these numbers do not include the tokenizer's own errors, and
there is no floor."""
_LABELS = {
    "psnr_db": "PSNR, dB (higher is better)",
    "ssim": "SSIM (higher is better)",
    "lpips": "LPIPS (lower is better)",
    _ACCURACY: "token accuracy (higher is better)",
}


def _table(metrics: Mapping[str, Any], names: Sequence[str], extractor: str) -> Table:
    by_label = {_LABELS[name]: metrics[name] for name in names}
    if distances := metrics[extractor]:
        counts = f"{distances['clips']} clips of {distances['frames']} frames"
        by_label[f"{extractor}, {counts} (lower is better)"] = distances
    rows = [(label, *map(kinds.get, KINDS)) for label, kinds in by_label.items()]
    columns = ("", *(kind.replace("_", " ") for kind in KINDS))
    caption = "Means over all frames of all clips, with 95 % intervals over clips. The Fréchet "
    caption += 'distance has no interval; "–" means not measured'
    return Table(caption, columns, rows)
