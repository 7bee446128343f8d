"""Roll out every future of every start, and report how near each comes to its own truth.

Axes: S starts, K futures of a start, N frames of a future, H W pixels, r c token rows and columns.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from driving_sim.data.arrays import Pixels
from driving_sim.engine.progress import progress
from driving_sim.evaluate.futures.nearest import (
    DISTANCE,
    EARLY,
    LATE,
    PSNR,
    SOURCES,
    Compare,
    Futures,
    Scores,
    judge,
    score,
    windows,
)
from driving_sim.evaluate.futures.starts import Start, read
from driving_sim.evaluate.report.cell import Cell
from driving_sim.evaluate.report.section import Media, Section, Table
from driving_sim.world_model.panels import contact_sheet
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.world_model import WorldModel

_SHOWN = 3  # number of starts on the contact sheet


def evaluate_futures(
    world: WorldModel, starts: Sequence[Start], *, sampling: Sampling, distance: Compare | None
) -> Section:
    """Compare the rollouts of every start with all its true futures.

    The rollouts of a start are one batch, with the same random numbers. Start n gets the n-th draws
    of `sampling`. `distance` is the perceptual measure, or None to do without. The last part of the
    section is a contact sheet of some starts, as a PNG.
    """
    judged = windows(world.fps, starts[0].frames)
    shown = {*np.linspace(0, len(starts) - 1, _SHOWN).round().astype(int).tolist()}
    rows: list[tuple[str, list[Pixels]]] = []
    scores: list[Scores] = []
    with progress(len(starts), "futures", "starts") as bar:
        for number, start in enumerate(bar.counted(starts)):
            now, futures = roll_out(world, start, sampling, first_draw=number)
            scores.append(score(futures, judged, distance))
            if number in shown:
                rows += _rows(start.name, now, futures, judged, world.fps)
    names = list(starts[0].futures)
    metrics: dict[str, Any] = {
        "starts": len(starts),
        "rollouts": len(starts) * len(names),
        "names": names,
        "seconds": starts[0].frames / world.fps,
        "by_chance": 1 / len(names),
    }
    for measure in scores[0]:
        metrics[measure] = {"per_tokenizer": True} if measure == PSNR else {}
        for window in judged:
            metrics[measure][window] = _judged(scores, names, measure, window)
    text = _TEXT.format(
        count=len(names), names=", ".join(names), distance="" if distance else _NO_DISTANCE
    )
    parts: list[Table | Media] = [*_tables(metrics, names), _sheet(rows, names)]
    return Section("futures", "True futures", text, metrics, parts)


def roll_out(
    world: WorldModel, start: Start, sampling: Sampling, *, first_draw: int = 0
) -> tuple[Pixels, Futures]:
    """Return the last frame of a start's context [H, W, 3], and its true and its predicted futures.

    Besides a rollout for each future, there is one under unknown actions.
    """
    context, past = read(world, start.context), start.context
    prefix = world.encode_prefix(
        world.tokenizer.encode(context), past.actions[:-1], past.action_valid[:-1]
    )
    actions, valid = (np.concatenate([of, np.zeros_like(of[:1])]) for of in start.actions)
    steps = world.generate(prefix, actions, valid, sampling=sampling, first_draw=first_draw)
    tokens = torch.stack([step.tokens for step in steps], dim=1).cpu()
    *model, action_free = (world.tokenizer.decode(future).numpy() for future in tokens)
    recorded = [read(world, future)[1:] for future in start.futures.values()]
    reconstructed = [
        world.tokenizer.decode(world.tokenizer.encode(frames)).numpy() for frames in recorded
    ]
    return context[-1], Futures(
        recorded=np.stack(recorded),
        reconstructed=np.stack(reconstructed),
        model=np.stack(model),
        action_free=action_free,
    )


def _judged(
    scores: Sequence[Scores], names: Sequence[str], measure: str, window: str
) -> dict[str, Any]:
    judged = {}
    for source in SOURCES:
        of_starts = np.stack([of_start[measure][window][source] for of_start in scores])
        judged[source] = judge(of_starts, names, higher_is_nearer=measure == PSNR)
    if measure == PSNR:
        # A reconstruction compared with itself has no PSNR.
        judged["reconstructed"]["own"] = None
        for name in names:
            judged["reconstructed"]["table"][name][name] = None
    return judged


_MEASURES = {
    PSNR: "PSNR through the tokenizer, dB (higher is nearer)",
    DISTANCE: "feature distance (lower is nearer)",
}
_WINDOWS = {EARLY: "from 0.5 to 1.5 s", LATE: "over the last second"}
_WHOSE = {"model": "rollouts", "reconstructed": "true futures after the tokenizer"}

_TEXT = """Question: does each rollout go to its own future? From each start, {count} futures truly
follow: {names}. The model is rolled out under the actions of each, with the same random numbers.
Every rollout is compared with every true future of its start. A model that obeys its actions is
nearest to the future whose actions it was given.

PSNR through the tokenizer compares a rollout with the true frames after they were encoded and
decoded, so the tokenizer's own errors do not count. The feature distance compares it with the
recorded frames. It is drivesim's own measure, and neither LPIPS nor FID: EfficientNet-Lite0,
trained on ImageNet, has features at five depths. At each place, the distance is 1 minus the cosine
between the two pictures' features. It is averaged over the places, the depths and the frames. 0
means equal. It punishes blur, which PSNR forgives.{distance}

How to read it. "Truth after the tokenizer" is the score of the true futures themselves, encoded and
decoded. No model on this tokenizer can be expected to do better. Where its share is below 1, true
futures look alike, or the tokenizer blurs what tells them apart. "Model without actions" is the
same model with unknown actions. It predicts the same for all futures of a start, so it is nearest
to one of them. A pair counts the rollouts of two futures that are nearer to their own than to the
other, which is half of them without actions. "Own" is the mean score with the own future, and
"other" that with all others. All intervals resample the starts.

Limits. A start has one rollout for each future, and what comes into view is a matter of chance.
Futures that differ little are hard to tell apart for any model."""
_NO_DISTANCE = """

The feature distance is not in this report, because its network is not installed."""


def _tables(metrics: Mapping[str, Any], names: Sequence[str]) -> Iterator[Table]:
    places = [
        (metrics[measure][window], _MEASURES[measure], _WINDOWS[window])
        for measure in _MEASURES
        if measure in metrics
        for window in _WINDOWS
    ]
    caption = f"Rollouts nearest to their own future: their number of {metrics['rollouts']}, and "
    caption += f"their share, which is {metrics['by_chance']:.2f} by chance"
    nearest: list[tuple[Cell, ...]] = []
    distances: list[tuple[Cell, ...]] = []
    for judged, measure, window in places:
        shares = (judged[source]["nearest"] for source in SOURCES)
        nearest.append((f"{measure}, {window}", judged["model"]["nearest_count"], *shares))
        for which in ("own", "other"):
            scores = (judged[source][which] for source in SOURCES)
            distances.append((f"{measure}, {window}: {which}", *scores))
    yield Table(caption, ("", "rollouts", *SOURCES.values()), nearest)
    labels = "", *SOURCES.values()
    yield Table("Mean scores with the own and with the other futures", labels, distances)
    for judged, measure, window in places:
        of_pairs = [
            (pair, *(judged[source]["pairs"][pair] for source in SOURCES))
            for pair in judged["model"]["pairs"]
        ]
        caption = f"Pairs: share nearer to their own future than to the other; {measure}, {window}"
        yield Table(caption, labels, of_pairs)
    for judged, measure, window in places:
        for source, whose in _WHOSE.items():
            table = judged[source]["table"]
            caption = f"Mean score of the {whose} (rows) with the true futures (columns); {measure}"
            scores_of_rows = [(row, *table[row].values()) for row in table]
            yield Table(f"{caption}, {window}", ("", *names), scores_of_rows)


def _sheet(rows: Sequence[tuple[str, list[Pixels]]], names: Sequence[str]) -> Media:
    buffer = io.BytesIO()
    Image.fromarray(contact_sheet(rows, ["start", *names])).save(buffer, format="PNG")
    caption = "Some starts, after 1.5 s and at the end. Of two rows, the upper one is what truly "
    caption += "happens, and the lower one what the model predicts. A column is a future"
    return Media(caption=caption, type="image/png", data=buffer.getvalue())


def _rows(
    name: str, now: Pixels, futures: Futures, judged: Mapping[str, slice], fps: float
) -> Iterator[tuple[str, list[Pixels]]]:
    """Yield the rows of a start on the contact sheet: the truth and the model at two times."""
    for window in judged.values():
        time_s = window.stop / fps
        for whose, frames in (("truth", futures.recorded), ("model", futures.model)):
            yield f"{name} {time_s:+.1f} s: {whose}", [now, *frames[:, window.stop - 1]]
