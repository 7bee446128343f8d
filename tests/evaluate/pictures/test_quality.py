from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from driving_sim.data.arrays import Pixels
from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.data.tokens.store import TokenStore
from driving_sim.evaluate.footage import Clip, Footage, footage_of
from driving_sim.evaluate.pictures import quality
from driving_sim.evaluate.pictures.quality import evaluate_quality
from driving_sim.evaluate.report.section import Media, Table, plot
from driving_sim.evaluate.rollouts import Imagined
from driving_sim.tokenizer.perceptual import PerceptualLoss
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.world_model.panels import contact_sheet
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import FPS, write_store
from tests.fixtures.vgg16 import random_vgg16
from tests.fixtures.world_models import new_world


class MeanColour:
    """Features that a test can compute by itself: the mean colour of a clip."""

    name, fingerprint, least_frames = "mean_colour", "", 2

    def __call__(self, videos: NDArray[np.uint8]) -> NDArray[np.float32]:
        means: NDArray[np.float32] = videos.astype(np.float32).mean(axis=(1, 2, 3))
        return means


class MeanColourOfLongClips(MeanColour):
    """The same features, with a settable minimum length of a clip."""

    def __init__(self, least_frames: int) -> None:
        self.least_frames = least_frames

    def __call__(self, videos: NDArray[np.uint8]) -> NDArray[np.float32]:
        assert videos.shape[1] >= self.least_frames
        return super().__call__(videos)


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


@pytest.fixture(scope="module")
def filmed(world: WorldModel, tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    """Return clips of a drive with its video."""
    folder = tmp_path_factory.mktemp("filmed")
    config = SyntheticConfig(height=48, width=64, fps=FPS)
    write_synthetic_drives(folder / "videos", drives=1, seconds=5, config=config)
    videos = find_drives([folder / "videos"])
    tokenize(videos, world.tokenizer, folder / "tokens")
    drives = TokenStore(folder / "tokens").drives
    (footage,) = footage_of(drives, [sample(videos.drives[0])], world.tokenizer)
    return [Clip(footage=footage, start=start, context_frames=4, frames=10) for start in (5, 20)]


@pytest.fixture(scope="module")
def clips(world: WorldModel, tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    folder = tmp_path_factory.mktemp("quality") / "tokens"
    store = write_store(folder, [60], fingerprint=world.tokenizer.fingerprint)
    footage = Footage(drive=store.drives[0], tokenizer=world.tokenizer)
    return [
        Clip(footage=footage, start=start, context_frames=4, frames=10) for start in (5, 20, 40)
    ]


@contextmanager
def recorded_figures() -> Iterator[list[Figure]]:
    """Record the figures that are plotted inside the context."""
    figures: list[Figure] = []

    def record(figure: Figure, caption: str) -> Media:
        figures.append(figure)
        return plot(figure, caption)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "plot", record)
        yield figures


def imagined(clip: Clip, tokens: torch.Tensor) -> Imagined:
    frames = clip.footage.tokenizer.decode(tokens).numpy()
    return Imagined(clip=clip, tokens=tokens, frames=frames)


def true_rollouts(clips: list[Clip]) -> list[Imagined]:
    return [imagined(clip, clip.true_tokens) for clip in clips]


def copy_last_rollouts(clips: list[Clip]) -> list[Imagined]:
    return [imagined(clip, clip.context_tokens[-1:].repeat(10, 1, 1)) for clip in clips]


def test_a_model_that_knows_the_future_reaches_the_floor(filmed: list[Clip]) -> None:
    section = evaluate_quality(true_rollouts(filmed), FPS, MeanColour())
    metrics = section.metrics
    for name in ("psnr_db", "ssim"):
        assert metrics[name]["model"] == metrics[name]["floor"]
        assert metrics[f"{name}_by_frame"]["model"] == metrics[f"{name}_by_frame"]["floor"]
    assert metrics["psnr_db"]["floor"]["mean"] < 50
    assert metrics["mean_colour"]["model"] == pytest.approx(metrics["mean_colour"]["floor"])
    assert metrics["mean_colour"]["floor"] > 0
    assert metrics["token_accuracy"]["model"]["mean"] == 1.0
    assert len(metrics["psnr_db_by_frame"]["model"]) == 10
    assert metrics["recorded"] is True
    text = " ".join(section.text.split())
    assert "compared with the recorded frames." in text
    assert '"Floor" is' in text


def test_tokens_without_their_videos_have_no_floor(clips: list[Clip]) -> None:
    """Without videos the true frames are reconstructions, so the floor would always be perfect."""
    section = evaluate_quality(true_rollouts(clips), FPS, MeanColour())
    metrics = section.metrics
    for name in ("psnr_db", "ssim", "psnr_db_by_frame", "mean_colour"):
        assert metrics[name]["floor"] is None
        assert metrics[name]["copy_last"] is not None
    assert metrics["psnr_db"]["copy_last"]["mean"] < metrics["psnr_db"]["model"]["mean"]
    assert metrics["mean_colour"]["model"] == pytest.approx(0, abs=1e-6)
    assert metrics["mean_colour"]["copy_last"] > 0.01
    assert metrics["recorded"] is False
    text = " ".join(section.text.split())
    assert "the tokenizer's reconstructions of the recorded frames" in text


def test_every_kind_has_its_own_colour_and_is_in_the_legend(filmed: list[Clip]) -> None:
    copied = copy_last_rollouts(filmed)
    with recorded_figures() as figures:
        evaluate_quality(copied, FPS, MeanColour())
    (figure,) = figures
    colours: dict[str, set[str]] = {}
    for axes in figure.axes:
        for line in axes.lines:
            colours.setdefault(str(line.get_label()), set()).add(str(line.get_color()))
    assert colours.keys() == {"model", "floor", "copy last"}
    assert all(len(used) == 1 for used in colours.values())
    assert len(set.union(*colours.values())) == 3
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == colours.keys()


def test_intervals_and_counts_are_shown(clips: list[Clip]) -> None:
    section = evaluate_quality(
        copy_last_rollouts(clips),
        FPS,
        MeanColour(),
    )
    (table,) = (part for part in section.parts if isinstance(part, Table))
    rows = {row[0]: row for row in table.rows}
    assert rows["PSNR, dB (higher is better)"][1] == section.metrics["psnr_db"]["model"]
    assert section.metrics["psnr_db"]["model"]["low"] is not None
    # The distance depends on the number of clips, so the label must say it.
    label = "mean_colour, 3 clips of 10 frames (lower is better)"
    assert rows[label][1] == section.metrics["mean_colour"]["model"]


def test_the_pictured_clips_are_spread_from_first_to_last(clips: list[Clip]) -> None:
    many = [replace(clips[0], start=start) for start in range(5, 50, 4)]
    known = true_rollouts(many)
    with pytest.MonkeyPatch.context() as patch:
        titles: list[str] = []

        def record(rows: list[tuple[str, list[Pixels]]], headings: list[str]) -> Pixels:
            titles.extend(title for title, _ in rows)
            return contact_sheet(rows, headings)

        patch.setattr(quality, "contact_sheet", record)
        evaluate_quality(known, FPS, MeanColour())
    assert [title.removesuffix(": model") for title in titles[1::2]] == [
        many[number].name for number in (0, 4, 7, 11)
    ]


def test_a_model_that_repeats_the_last_frame_equals_the_baseline(clips: list[Clip]) -> None:
    metrics = evaluate_quality(
        copy_last_rollouts(clips),
        FPS,
        MeanColour(),
    ).metrics
    for name in ("psnr_db", "ssim", "token_accuracy"):
        assert metrics[name]["model"] == metrics[name]["copy_last"]
    assert metrics["mean_colour"]["model"] == pytest.approx(metrics["mean_colour"]["copy_last"])
    expected = np.mean(
        [
            [(clip.context_tokens[-1] == true).float().mean() for true in clip.true_tokens]
            for clip in clips
        ],
        axis=0,
    )
    assert metrics["token_accuracy_by_frame"]["model"] == pytest.approx(expected)


def test_token_accuracy_falls_at_the_first_wrong_frame(clips: list[Clip]) -> None:
    """Roll out five right frames, and then only wrong ones."""
    rollouts = []
    for clip in clips:
        tokens = clip.true_tokens.clone()
        tokens[5:] = (tokens[5:] + 1) % 9
        rollouts.append(imagined(clip, tokens))
    metrics = evaluate_quality(rollouts, FPS, MeanColour()).metrics
    accuracy = metrics["token_accuracy_by_frame"]["model"]
    assert accuracy == [1.0] * 5 + [0.0] * 5


def test_futures_too_short_for_the_features_have_no_distance(clips: list[Clip]) -> None:
    """The other metrics are measured nevertheless. I3D, for example, needs ten frames."""
    for least, measured in ((10, True), (11, False)):
        known = true_rollouts(clips)
        metrics = evaluate_quality(known, FPS, MeanColourOfLongClips(least)).metrics
        assert (metrics["mean_colour"] is not None) == measured
        assert metrics["token_accuracy"]["model"]["mean"] == 1.0


def test_lpips_is_measured_where_its_weights_are(clips: list[Clip]) -> None:
    known = [imagined(clips[0], clips[0].true_tokens)]
    metrics = evaluate_quality(known, FPS, MeanColour(), PerceptualLoss(random_vgg16())).metrics
    assert metrics["lpips"]["model"]["mean"] == pytest.approx(0, abs=1e-6)
    assert metrics["lpips"]["copy_last"]["mean"] > 0
    # The Fréchet distance needs two clips or more.
    assert metrics["mean_colour"] is None
