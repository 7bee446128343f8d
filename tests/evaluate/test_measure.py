"""Tests of the functions that evaluate a run on videos and write a report."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import DriveSet
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.data.tokens.index import frame_bytes
from driving_sim.data.tokens.store import TokenStore
from driving_sim.engine import run_folder
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.training.config import TrainingConfig
from driving_sim.evaluate import measure as measure_module
from driving_sim.evaluate import world_model as evaluation
from driving_sim.evaluate.actions import lessons as probe_lessons
from driving_sim.evaluate.actions.inverse_dynamics import InverseDynamics, ProbeClip, ProbeSource
from driving_sim.evaluate.footage import Clip, Footage, HeldOutStore, recording_digests
from driving_sim.evaluate.measure import TOKENIZER_HEADLINE, measure_tokenizer, measure_world_model
from driving_sim.evaluate.pictures.stability import StabilityConfig
from driving_sim.evaluate.report.compare import compare_reports
from driving_sim.evaluate.report.protocol_hash import Protocol
from driving_sim.evaluate.report.section import Section
from driving_sim.evaluate.world_model import (
    HEADLINE,
    NOT_MEASURED,
    EvaluationConfig,
    Evidence,
    evaluate_world_model,
)
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.tokenizer.tokenizer import Tokenizer
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.contexts import find_for
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.training.train import (
    WorldModelDataConfig,
    WorldModelRunConfig,
    train_world_model,
)
from driving_sim.world_model.transformer import TokenGrid, Transformer
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import COLS, FPS, LEVELS, ROWS, tiny_tokenizer, write_store
from tests.fixtures.world_models import CONFIG

SMALL = EvaluationConfig(
    stride=4,
    shuffles=1,
    coded_seconds=0.5,
    clips=2,
    seconds=1.5,
    sweeps=1,
    long_rollouts=1,
    long_seconds=4.0,
    standing_seconds=2.0,
    probe_steps=2,
    stability=StabilityConfig(block_s=1.0, hop_s=0.5, min_lag_s=0.5, max_lag_s=2.0, loop_s=0.5),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with two training drives, a held-out drive, and an untrained model."""
    folder = tmp_path_factory.mktemp("measure")
    config = SyntheticConfig(height=16 * ROWS, width=16 * COLS, fps=FPS)
    write_synthetic_drives(folder / "videos", drives=3, seconds=6, config=config)
    training = find_drives(sorted((folder / "videos").glob("*.mp4"))[:2])
    tokenizer = tiny_tokenizer()
    tokenizer.save(folder / "tokenizer")
    tokenize(training, tokenizer, folder / "tokens")
    grid = TokenGrid(rows=ROWS, cols=COLS, levels=LEVELS)
    statistics = ActionStatistics(
        mean=(8.0, 0.0), std=(2.0, 0.1), steering_p95=0.2, steering_p99=0.3
    )
    world = WorldModel(
        Transformer(CONFIG, grid, statistics), tokenizer, fps=FPS, steering_kind="road_wheel"
    )
    world.save(folder / "world-model")
    return folder


def measure(place: Path, out: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "run": place / "world-model",
        "data": [place / "videos" / "drive_002.mp4"],
        "training_tokens": place / "tokens",
        "config": SMALL,
        "device": "cpu",
        "precision": "fp32",
    }
    return measure_world_model(out=out, **(options | changes))


class Caught(Exception):  # noqa: N818 - not an error: it carries the evidence out of the call
    def __init__(self, world: WorldModel, evidence: Evidence) -> None:
        self.world, self.evidence = world, evidence


@pytest.fixture
def evidence(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Evidence]:
    """Function that runs an evaluation up to its sections, and returns the evidence for them."""

    def evaluated(world: WorldModel, evidence: Evidence, config: EvaluationConfig) -> None:
        raise Caught(world, evidence)

    def measured(**options: Any) -> Evidence:
        monkeypatch.setattr(measure_module, "evaluate_world_model", evaluated)
        with pytest.raises(Caught) as caught:
            measure(place, tmp_path / "never", **options)
        return caught.value.evidence

    return measured


@pytest.fixture
def nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every slow step fail, so that a test passes only if an error is raised before them."""
    for name in ("tokenize", "evaluate_world_model"):
        monkeypatch.setattr(measure_module, name, None)
    monkeypatch.setattr(InverseDynamics, "fit", None)


def test_two_evaluations_of_a_world_model_give_the_same_numbers(
    place: Path, tmp_path: Path
) -> None:
    figures = measure(place, tmp_path / "a", training_videos=[place / "videos"])
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    sections = {"likelihood", "coding", "action_information", "quality", "fidelity", "sweep"}
    assert sections | {"stability", "standing"} <= set(metrics)
    assert NOT_MEASURED not in metrics
    formats = metrics["model"]["precision"], metrics["model"]["tokenizer_precision"]
    assert formats == ("fp32", "fp32")
    assert metrics["likelihood"]["bits_per_token"]["model"]["mean"] == pytest.approx(
        np.log2(9), abs=1e-4
    )
    assert metrics["coding"]["exact"] is True
    assert metrics["fidelity"]["clips"] == 4  # Two clips and their mirror images.
    assert metrics["sweep"]["truth"] is not None  # Only a synthetic drive has a true future.
    # A key figure with a misspelt metric would silently be left out of the report.
    assert list(metrics["headline"]) == [figure.label for figure in HEADLINE] == list(figures)
    places = {place for figure in HEADLINE for place in figure.beside.values()}
    for name, *path in (place.split(".") for place in places):
        metric = metrics[name]
        for key in path:
            metric = metric[key]
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Action fidelity" in page
    assert "recorded videos" in page
    assert "trained on the training videos" in page
    assert "held-out fp32, training fp32" in page
    # Evaluate again with the probe of the first report, so that the protocols are equal.
    measure(place, tmp_path / "b", probe=tmp_path / "a")
    again = json.loads((tmp_path / "b" / "metrics.json").read_text())
    for name in sections:
        assert again[name] == metrics[name], name
    assert "same protocol" in compare_reports(tmp_path / "a", tmp_path / "b", tmp_path / "c.html")


def test_a_tokenizer_is_measured_and_its_report_is_not_overwritten(
    place: Path, tmp_path: Path
) -> None:
    videos = [place / "videos" / "drive_002.mp4"]
    figures = measure_tokenizer(place / "tokenizer", videos, tmp_path / "report", every=1)
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["reconstruction"]["frames"] == 48
    assert list(figures) == [figure.label for figure in TOKENIZER_HEADLINE]
    with pytest.raises(DriveSimError, match="already holds a report"):
        measure_tokenizer(place / "tokenizer", videos, tmp_path / "report", every=1)


def test_a_store_beside_videos_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="a token store cannot be evaluated together"):
        measure_world_model(
            place / "world-model",
            [place / "tokens", place / "videos"],
            tmp_path / "report",
            training_tokens=place / "tokens",
            config=SMALL,
            device="cpu",
        )


def protocol_of(world: WorldModel, evidence: Evidence, **options: Any) -> Protocol:
    clips = [
        Clip(footage=source, start=6, context_frames=3, frames=5) for source in evidence.footage
    ]
    return evaluation._protocol(world, evidence, {"clips": clips}, replace(SMALL, **options))


def test_everything_that_decides_a_number_is_in_the_protocol(
    place: Path, tmp_path: Path, evidence: Callable[..., Evidence]
) -> None:
    caught = evidence()
    world = WorldModel.from_run(place / "world-model", "cpu", "fp32")
    before = protocol_of(world, caught)
    assert protocol_of(world, caught).hash == before.hash
    assert before.differences(protocol_of(world, caught, clips=1)) == ["settings.clips: 2 / 1"]

    def differences(**changes: Any) -> str:
        statistics = replace(world.statistics, **changes.pop("statistics", {}))
        fixed: dict[str, Any] = {"fps": FPS, "steering_kind": "road_wheel"}
        changed = WorldModel(
            Transformer(world.config.model, world.config.grid, statistics),
            **(fixed | {"tokenizer": world.tokenizer} | changes),
        )
        return " ".join(before.differences(protocol_of(changed, caught)))

    assert differences() == ""
    assert 'precision.world_model: "fp32" / "bf16"' in differences(precision="bf16")
    low = Tokenizer.from_run(place / "world-model" / "tokenizer", "cpu", "bf16")
    assert 'precision.tokenizer: "fp32" / "bf16"' in differences(tokenizer=low)
    assert "learned: 2 entries / 1 entries" in differences(validation_drives=("drive_000",))
    assert "known_channels[1]: true / false" in differences(steering_kind=None)
    for name in ("steering_p95", "steering_p99"):
        assert name in differences(statistics={name: 0.7})
    assert "mean_action[0]" in differences(statistics={"mean": (9.0, 0.0)})
    tokens_only = [replace(source, recorded=None) for source in caught.footage]
    unrecorded = replace(caught, footage=tokens_only)
    assert "recorded: true / false" in before.differences(protocol_of(world, unrecorded))
    # The parts of a split drive share an id, but the protocol lists every part.
    parts = tmp_path / "parts"
    (sampled,) = (source.recorded for source in caught.footage)
    assert sampled is not None
    ten = 10 * frame_bytes(ROWS, COLS)
    tokenize(DriveSet([sampled.drive]), world.tokenizer, parts, shard_bytes=ten)
    footage = [
        Footage(drive=drive, tokenizer=world.tokenizer) for drive in TokenStore(parts).drives[:4]
    ]
    content = protocol_of(world, replace(caught, footage=footage)).content
    assert [(part["id"], part["start"]) for part in content["drives"]] == [
        ("drive_002", start) for start in (0, 10, 20, 30)
    ]
    assert len({part["sha256"] for part in content["drives"]}) == 4
    assert content["clips"] == [["drive_002", start, 6, 5] for start in (0, 10, 20, 30)]


@pytest.mark.usefixtures("nothing_is_done")
def test_a_drive_that_was_trained_on_is_refused_at_once(place: Path, tmp_path: Path) -> None:
    """The drive is recognised as a video, under another name, and in a store with mirror images."""
    video = place / "videos" / "drive_001.mp4"
    renamed = tmp_path / "copies" / "another.mp4"
    renamed.parent.mkdir()
    for suffix in (".mp4", ".csv"):
        shutil.copy(video.with_suffix(suffix), renamed.with_suffix(suffix))
    tokenize(find_drives([renamed]), tiny_tokenizer(), tmp_path / "heldout", mirror=True)
    for data, name in (
        (video, "drive_001"),
        (renamed, "another"),
        (tmp_path / "heldout", "another"),
    ):
        with pytest.raises(
            DriveSimError, match=f"training tokens contain the held-out drive '{name}'"
        ):
            measure(place, tmp_path / "out", data=[data])


def test_a_trained_drive_is_recognised_without_actions(place: Path, tmp_path: Path) -> None:
    world = WorldModel.from_run(place / "world-model", "cpu", "fp32")
    without_actions(world).save(tmp_path / "no-actions")
    with pytest.raises(
        DriveSimError, match="training tokens contain the held-out drive 'drive_001'"
    ):
        measure(
            place,
            tmp_path / "out",
            run=tmp_path / "no-actions",
            data=[place / "videos" / "drive_001.mp4"],
        )


@pytest.mark.usefixtures("nothing_is_done")
def test_tokens_that_the_model_was_not_trained_on_are_refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check reads the config of the run, because the other store has the same tokenizer.

    A copy of the model without that config cannot tell which store it was trained on.
    """
    run, fewer = tmp_path / "run", tmp_path / "tokens"
    config = WorldModelRunConfig(
        model=CONFIG,
        data=WorldModelDataConfig(batch_size=1, validation=("drive_001",), preview=False),
        training=TrainingConfig(steps=1, workers=0),
    )
    train_world_model(place / "tokens", config, run, tokenizer=place / "tokenizer", device="cpu")
    tokenize(find_drives([place / "videos" / "drive_000.mp4"]), tiny_tokenizer(), fewer)
    with pytest.raises(DriveSimError, match=rf"{fewer}: not the token store that .* trained on"):
        measure(place, tmp_path / "out", run=run, training_tokens=fewer)
    monkeypatch.setattr(run_folder, "MODELS", tmp_path)  # so that a name finds the run as well
    with pytest.raises(DriveSimError, match=r"not the token store that run was trained on"):
        measure(place, tmp_path / "out", run=Path("run"), training_tokens=fewer)
    for options in ({"run": run}, {"training_tokens": fewer}):
        with pytest.raises(TypeError):  # The checks pass, and the replaced `tokenize` is called.
            measure(place, tmp_path / "out", **options)


def test_training_tokens_that_are_missing_or_misfit_name_their_option(
    place: Path, tmp_path: Path
) -> None:
    with pytest.raises(DriveSimError, match=r"no such token store;.* use `training_tokens`"):
        measure(place, tmp_path / "out", training_tokens=tmp_path / "none")
    write_store(tmp_path / "other", [20])
    with pytest.raises(DriveSimError, match=r"not made by the model.* use `training_tokens`"):
        measure(place, tmp_path / "out", training_tokens=tmp_path / "other")


def test_tokens_of_another_number_format_are_measured_with_a_notice(
    place: Path,
    tmp_path: Path,
    evidence: Callable[..., Evidence],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There is one notice for each store whose number format is not the model's."""
    low = Tokenizer.from_run(place / "tokenizer", "cpu", "bf16")
    held = tmp_path / "heldout"
    tokenize(find_drives([place / "videos" / "drive_002.mp4"]), low, held)

    def notices(**options: Any) -> list[str]:
        evidence(**options)
        lines = capsys.readouterr().err.splitlines()
        return [line for line in lines if "this model encodes in" in line]

    training = place / "tokens"
    line = (
        "{}: its tokens were made in {made}, but this model encodes in {own}, so about 1 token in "
        "100 differs; set `precision={made}` to compute everything in {made}"
    )
    assert notices() == []
    assert notices(precision="bf16") == [line.format(training, made="fp32", own="bf16")]
    assert notices(data=[held]) == [line.format(held, made="bf16", own="fp32")]


@pytest.mark.usefixtures("nothing_is_done")
def test_frames_of_another_rate_are_refused_at_once(place: Path, tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="drive_002: sampled at 4 frames/s, but"):
        measure(place, tmp_path / "out", every=2)
    with pytest.raises(DriveSimError, match="give a finite rate above 0"):
        measure(place, tmp_path / "out", fps=0.0)


def write_probe(path: Path, **changes: Any) -> Path:
    fixed: dict[str, Any] = {"fps": FPS, "steering_kind": "road_wheel", "drives": ("f00d",)}
    source = ProbeSource(**(fixed | changes))
    rng = np.random.default_rng(0)
    clip = ProbeClip(
        frames=rng.integers(255, size=(5, 16, 32, 3), dtype=np.uint8),
        actions=rng.normal(4, 1, (5, 2)).astype(np.float32),
        action_valid=np.ones((5, 2), np.bool_),
        segments=[(0, 5)],
    )
    path.write_bytes(InverseDynamics.fit([clip], [clip], source=source, steps=1).to_bytes())
    return path


def test_a_probe_that_does_not_fit_the_model_is_refused(
    place: Path, tmp_path: Path, evidence: Callable[..., Evidence]
) -> None:
    tokenize(
        find_drives([place / "videos" / "drive_002.mp4"]), tiny_tokenizer(), tmp_path / "heldout"
    )
    (digest,) = recording_digests(TokenStore(tmp_path / "heldout").drives).values()
    cases: dict[str, dict[str, Any]] = {
        "its frame rate is 16 frames/s, but the model's is 8": {"fps": 2 * FPS},
        "its steering kind is curvature, but the model's is road_wheel": {
            "steering_kind": "curvature"
        },
        "it learned from the held-out drive 'drive_002'": {"drives": ("f00d", digest)},
    }
    probe = tmp_path / "probe.safetensors"
    for message, changes in cases.items():
        write_probe(probe, **changes)
        with pytest.raises(DriveSimError, match=message):
            measure(place, tmp_path / "out", probe=probe)
    write_probe(probe)
    assert evidence(probe=probe).probe is not None


def test_the_probe_never_learns_from_a_held_out_drive(
    place: Path, tmp_path: Path, evidence: Callable[..., Evidence]
) -> None:
    """This holds whether the held-out drive is given as a video or as tokens."""
    held = place / "videos" / "drive_002.mp4"
    tokenize(find_drives([held]), tiny_tokenizer(), tmp_path / "heldout")
    # This held-out drive has the id of a training drive, so a check by id would miss it.
    impostor = tmp_path / "videos" / "drive_001.mp4"
    impostor.parent.mkdir()
    for suffix in (".mp4", ".csv"):
        shutil.copy(held.with_suffix(suffix), impostor.with_suffix(suffix))
    digests = recording_digests(TokenStore(place / "tokens").drives)
    options = {"training_videos": [place / "videos" / "drive_000.mp4", impostor]}
    for data in (held, tmp_path / "heldout"):
        probe = evidence(data=[data], training_videos=[place / "videos"]).probe
        assert probe is not None
        assert set(probe.source.drives) == set(digests.values())
        caught = evidence(data=[data], **options)
        assert caught.probe is None
        assert "two or more training drives" in caught.no_probe
    with pytest.raises(DriveSimError, match="none of `training_videos` is a drive of"):
        evidence(training_videos=[held])


def test_the_footage_of_a_probe_is_capped_and_spread_over_the_drives(
    place: Path, evidence: Callable[..., Evidence], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_lessons, "_SECONDS", 4.0)
    seen: dict[str, Any] = {}
    fit, errors = InverseDynamics.fit, InverseDynamics.errors

    def watched(learned: list[ProbeClip], validation: list[ProbeClip], **options: Any) -> Any:
        seen["clips"] = [*learned, *validation]
        return fit(learned, validation, **options)

    def judged(self: InverseDynamics, clips: list[ProbeClip], **options: Any) -> Any:
        seen.update(held=clips, **options)
        return errors(self, clips, **options)

    monkeypatch.setattr(InverseDynamics, "fit", watched)
    monkeypatch.setattr(InverseDynamics, "errors", judged)
    videos = [place / "videos"]
    for options in ({"training_videos": videos}, dict[str, Any]()):
        caught = evidence(**options)
        assert [len(clip.frames) for clip in seen["clips"]] == [16, 16]
        assert [clip.segments for clip in seen["clips"]] == [[(0, 16)], [(0, 16)]]
        assert caught.training is not None
        for clip, drive in zip(seen["clips"], caught.training.drives, strict=True):
            assert np.array_equal(clip.actions, drive.actions[:16])
        assert [len(clip.frames) for clip in seen["held"]] == [32]
        assert seen["curve"] == 0.1  # Half of the 95th percentile of the training steering.


def test_footage_is_divided_evenly() -> None:
    shared = probe_lessons._shares
    assert shared([10, 1000, 40, 700], 300) == [10, 125, 40, 125]
    assert shared([10, 20], 300) == [10, 20]
    assert shared([5, 5, 5], 7.9) == [2, 2, 3]
    assert shared([], 7) == []
    spread = probe_lessons._evenly_chosen(range(250))
    assert list(spread) == list(range(0, 250, 3))
    assert len(probe_lessons._evenly_chosen(range(100))) == 100


def test_the_time_offset_applies_to_held_out_and_training_videos(
    place: Path, evidence: Callable[..., Evidence], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = []

    def watched(world: WorldModel, videos: list[Path], reading: Reading) -> DriveSet:
        readings.append(reading)
        return find_for(world, videos, reading)

    monkeypatch.setattr(measure_module, "find_for", watched)
    evidence(training_videos=[place / "videos"], reading=Reading(time_offset=0.05))
    assert [reading.time_offset for reading in readings] == [0.05, 0.05]


def test_held_out_frames_are_sampled_at_the_rate_of_the_training_tokens(place: Path) -> None:
    """The requested rate counts, if the model's own rate is close to it."""
    world = WorldModel.from_run(place / "world-model", "cpu", "fp32")
    training: Any = SimpleNamespace(info=SimpleNamespace(requested_fps=FPS * 1.004))
    rate = measure_module._rate
    assert rate(world, training, None, None) == {"fps": FPS * 1.004, "every": None}
    training.info.requested_fps = 2 * FPS  # More than the videos had.
    assert rate(world, training, None, None) == {"fps": FPS, "every": None}
    training.info.requested_fps = None
    assert rate(world, training, None, None) == {"fps": FPS, "every": None}
    assert rate(world, training, None, 3) == {"fps": None, "every": 3}


def without_actions(world: WorldModel) -> WorldModel:
    """Return a copy of the model that learned no actions."""
    plain = Transformer(world.config.model, world.config.grid, ActionStatistics())
    return WorldModel(plain, world.tokenizer, fps=FPS, steering_kind=None)


def test_channels_that_the_model_never_learned_count_as_unknown(
    place: Path, tmp_path: Path, evidence: Callable[..., Evidence]
) -> None:
    world = WorldModel.from_run(place / "world-model", "cpu", "fp32")
    without_actions(world).save(tmp_path / "no-actions")
    tokenize(
        find_drives([place / "videos" / "drive_002.mp4"]), tiny_tokenizer(), tmp_path / "heldout"
    )
    caught = evidence(run=tmp_path / "no-actions", data=[tmp_path / "heldout"])
    assert not caught.footage[0].drive.action_valid.any()
    assert not caught.heldout.drives[0].action_valid.any()
    assert caught.probe is None
    assert "no action that the model learned" in caught.no_probe


def test_a_section_that_cannot_be_measured_is_listed_with_the_reason(
    place: Path, tmp_path: Path, evidence: Callable[..., Evidence]
) -> None:
    """The model knows no actions. The drives are too short for a rollout, or even for a window."""
    caught = evidence()
    world = without_actions(WorldModel.from_run(place / "world-model", "cpu", "fp32"))
    for length, too_short in ((6, set()), (2, {"likelihood", "stability"})):
        out = tmp_path / str(length)
        write_synthetic_drives(
            out,
            drives=1,
            seconds=length / FPS,
            config=SyntheticConfig(height=48, width=64, fps=FPS),
        )
        (video,) = out.glob("*.mp4")
        tokenize(find_drives([video]), world.tokenizer, out / "tokens")
        store = HeldOutStore(out / "tokens", world.known_channels)
        footage = [Footage(drive=drive, tokenizer=world.tokenizer) for drive in store.drives]
        short = replace(
            caught, heldout=store, footage=footage, probe=None, no_probe="because", probe_floor={}
        )
        sections, protocol = evaluate_world_model(world, short, SMALL)
        *measured, last = sections
        left_out = {"action_information", "quality", "fidelity", "sweep", "standing"} | too_short
        assert set(last.metrics) == left_out
        names = {section.name for section in measured}
        assert names == {"likelihood", "coding", "stability"} - too_short
        assert last.metrics["fidelity"] == "because"
        assert "no stretch of 15 frames" in last.metrics["quality"]
        assert "no known action of a kind" in last.metrics["action_information"]
        for starts in ("clips", "sweeps", "standing"):
            assert protocol.content[starts] == []


def test_a_sweep_starts_where_the_car_is_known_to_move(place: Path) -> None:
    world = WorldModel.from_run(place / "world-model", "cpu", "fp32")
    actions, valid = np.zeros((20, 2), np.float32), np.ones((20, 2), np.bool_)
    actions[:, 0] = [0, 1, 1.9, 2, 3, 3, 3, 3, 3, 0] * 2
    valid[5, 0] = False
    drive: Any = SimpleNamespace(actions=actions, action_valid=valid)
    footage = Footage(drive=drive, tokenizer=world.tokenizer)
    clips = [Clip(footage=footage, start=n, context_frames=3, frames=2) for n in range(3, 12)]
    # The action at index start - 2 leads to the last context frame.
    sweeps = evaluation._sweeps(world, clips, 100)
    assert [clip.start for clip in sweeps] == [5, 6, 8, 9, 10]
    assert [clip.start for clip in evaluation._sweeps(world, clips, 2)] == [6, 9]
    with pytest.raises(DriveSimError, match="no clip starts at a known speed of 2 m/s or more"):
        evaluation._sweeps(world, clips[:2], 2)
    with pytest.raises(DriveSimError, match="learned no steering"):
        evaluation._sweeps(without_actions(world), clips, 2)


def test_real_footage_is_no_longer_than_requested(
    place: Path, evidence: Callable[..., Evidence]
) -> None:
    """The held-out drive and both training drives have 48 frames."""
    caught = evidence()
    assert caught.training is not None
    world = WorldModel.from_run(place / "world-model", "cpu", "fp32")
    for seconds, lengths in ((2.0, [16]), (8.0, [48, 16]), (60.0, [48, 48, 48])):
        real = evaluation._real(world, caught, replace(SMALL, real_seconds=seconds))
        assert [len(source.drive) for source in real] == lengths
        assert [source.recorded is not None for source in real] == [True, False, False][: len(real)]
        assert np.array_equal(real[0].drive.tokens, caught.heldout.drives[0].tokens[: lengths[0]])


def test_the_starts_depend_only_on_the_drives_and_the_counts(
    place: Path, evidence: Callable[..., Evidence], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another model, seed or number of clips changes no start of these sections."""
    caught = evidence()
    world = WorldModel.from_run(place / "world-model", "cpu", "fp32")

    def chosen(**changes: Any) -> dict[str, list[Any]]:
        model = changes.pop("model", world)
        options = replace(SMALL, sweeps=2, long_rollouts=3, **changes)
        _, protocol = evaluate_world_model(model, caught, options)
        return {name: protocol.content[name] for name in ("sweeps", "starts", "standing")}

    for section in (
        "likelihood",
        "coding",
        "action_information",
        "quality",
        "fidelity",
        "sweep",
        "stability",
    ):
        empty = Section(section, section, "", {})
        monkeypatch.setattr(evaluation, f"evaluate_{section}", lambda *_, kept=empty, **__: kept)
    first = chosen()
    assert [len(places) for places in first.values()] == [2, 3, 1]
    assert chosen(clips=1) == first
    assert chosen(sampling=Sampling(seed=7, temperature=0.5), long_seconds=2.0) == first
    other = Transformer(world.config.model, world.config.grid, world.statistics)
    other_world = WorldModel(other, world.tokenizer, fps=FPS, steering_kind="road_wheel")
    assert chosen(model=other_world) == first


def test_without_the_training_tokens_the_rest_is_measured(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = {"training_tokens": None, "usual_tokens": tmp_path / "none"}
    figures = measure(place, tmp_path / "a", **missing)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "not at hand" in line)
    assert "baselines and the check" in line
    assert "`training_videos` or `probe`" in line
    metrics = json.loads((tmp_path / "a" / "metrics.json").read_text())
    assert set(metrics[NOT_MEASURED]) == {"baselines", "leak_check", "fidelity", "sweep"}
    assert {"coding", "action_information", "quality", "stability", "standing"} <= set(metrics)
    assert list(metrics["likelihood"]["bits_per_token"]) == ["model"]
    assert metrics["likelihood"]["share_of_copy_last"] is None
    assert "leak_check" in figures["not measured (see the report)"]


def test_without_the_training_tokens_a_probe_learns_from_all_training_videos(
    place: Path, tmp_path: Path, evidence: Callable[..., Evidence]
) -> None:
    """Only the held-out drive is left out. It must also not be the only one."""
    caught = evidence(training_tokens=None, training_videos=[place / "videos"])
    assert caught.training is None
    assert caught.probe is not None
    digests = recording_digests(TokenStore(place / "tokens").drives)
    assert set(caught.probe.source.drives) == set(digests.values())
    with pytest.raises(DriveSimError, match="is a drive that has actions and is not held out"):
        evidence(training_tokens=None, training_videos=[place / "videos" / "drive_002.mp4"])


def test_the_usual_store_is_used_only_if_the_model_was_trained_on_it(
    place: Path,
    tmp_path: Path,
    evidence: Callable[..., Evidence],
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = {"training_tokens": None, "usual_tokens": place / "tokens"}
    # Without a config, as in a packaged model, nothing says that the model learned these tokens.
    assert evidence(**usual).training is None
    run = shutil.copytree(place / "world-model", tmp_path / "world-model")
    content = TokenStore(place / "tokens").index.content
    (run / "config.yaml").write_text(f"store: {{content: {content}}}")
    assert evidence(**usual, run=run).training is not None
    assert "not used" not in capsys.readouterr().err
    other = write_store(tmp_path / "other", [20]).path
    assert evidence(training_tokens=None, usual_tokens=other, run=run).training is None
    assert f"{other} is not used: " in capsys.readouterr().err
    with pytest.raises(DriveSimError, match="use `training_tokens`"):
        evidence(training_tokens=other)


def test_long_rollouts_last_at_least_as_long_as_a_block() -> None:
    with pytest.raises(ValueError, match="long_seconds: must be at least 5, found 4"):
        EvaluationConfig(long_seconds=4.0)
    for name in ("sweeps", "long_rollouts", "standing_seconds"):
        wrong: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=name):
            EvaluationConfig(**wrong)


def test_a_damaged_file_ends_the_evaluation(
    evidence: Callable[..., Evidence], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a lack of data leaves out a section; other errors are raised unchanged."""

    def damaged(*_: object, **__: object) -> None:
        raise DriveSimError("drive_07.mp4 is damaged")

    caught = evidence()
    world = WorldModel.from_run(place / "world-model", "cpu", "fp32")
    monkeypatch.setattr("driving_sim.evaluate.world_model.evaluate_likelihood", damaged)
    with pytest.raises(DriveSimError, match="is damaged"):
        evaluate_world_model(world, caught, SMALL)
