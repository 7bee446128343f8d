import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    IMAGES,
    EventAccumulator,
)
from tensorboard.summary.writer import event_file_writer  # type: ignore[import-untyped]

from driving_sim.engine.training.run_log import RunLog, run_log
from driving_sim.engine.training.trainable import Validation


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path) -> Any:
    return EventAccumulator(str(run / "tensorboard"), {IMAGES: 0}).Reload()


def test_scalars_are_written_to_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with run_log(tmp_path) as log:
        log.add_scalars(5, "train", {"loss": 1.5, "late": float("nan")})
        assert rows(tmp_path) == [{"step": 5, "phase": "train", "loss": 1.5, "late": None}]
    read = events(tmp_path)
    assert read.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in read.Scalars("train/loss")] == [(5, 1.5)]
    first_line = capsys.readouterr().err.splitlines()[0]
    assert f"results in {tmp_path}" in first_line


def test_resumed_run_drops_what_it_will_log_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorBoard sorts the files of one process and second by their number as text, 10 before 9.
    # Starting the numbers at 0 keeps the files in order.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    with run_log(tmp_path) as log:
        for step in (1, 2, 3):
            log.add_scalars(step, "train", {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "los')
    with run_log(tmp_path, start_step=2) as log:
        log.add_scalars(3, "train", {"loss": 30.0})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    scalars = [(event.step, event.value) for event in events(tmp_path).Scalars("train/loss")]
    assert scalars == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc here")
def test_no_open_file_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows cannot replace an open file."""
    with run_log(tmp_path) as log:
        log.add_scalars(1, "train", {"loss": 1.0})
    replace = Path.replace

    def checked(source: Path, target: Path) -> Path:
        files = {entry.resolve() for entry in Path("/proc/self/fd").iterdir()}
        assert target.resolve() not in files
        return replace(source, target)

    monkeypatch.setattr(Path, "replace", checked)
    with run_log(tmp_path, start_step=1):
        pass


def test_validation_logs_pictures_and_videos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    # The frames have plain grey levels, because a GIF holds only 256 colours.
    video = np.stack([np.full((4, 6, 3), level, np.uint8) for level in (0, 100, 200)])
    validation = Validation(
        score=2.0, metrics={"psnr": 21.0}, images={"grid": picture}, videos={"rollout": video}
    )
    with run_log(tmp_path) as log:
        log.add_validation(7, validation, best=True)
    assert rows(tmp_path) == [{"step": 7, "phase": "validation", "score": 2.0, "psnr": 21.0}]
    read = events(tmp_path)
    (grid,) = read.Images("validation/grid")
    assert (np.asarray(Image.open(io.BytesIO(grid.encoded_image_string))) == picture).all()
    (rollout,) = read.Images("validation/rollout")
    gif = Image.open(io.BytesIO(rollout.encoded_image_string))
    frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
    assert (np.stack(frames) == video).all()
    assert "step 7: score 2, psnr 21 (best)" in capsys.readouterr().err


def test_printed_lines_are_kept_in_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resumed run appends its lines to those of the earlier starts."""
    for step, best in ((1, True), (2, False)):
        with run_log(tmp_path, start_step=step - 1) as log:
            log.add_validation(step, Validation(score=2.0), best=best)
            assert (tmp_path / "log.txt").read_text().splitlines()[-1].startswith(f"step {step}:")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["results", "step", "results", "step"]
    assert set(lines) <= set(capsys.readouterr().err.splitlines())


@pytest.mark.parametrize(
    ("values", "text"),
    [({"loss": 1.5}, "loss 1.5"), ({"loss": 1.5, "bits_per_token": 2.164}, "bits_per_token 2.164")],
)
def test_progress_shows_the_loss_only_in_bits_if_they_are_known(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    values: dict[str, float],
    text: str,
) -> None:
    monkeypatch.setattr("driving_sim.engine.progress.LINE_SECONDS", 0.0)
    with run_log(tmp_path, total=2) as log:
        log.add_scalars(1, "train", values)
        log.advance(0.5)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "1/2 steps" in line]
    assert line.split(", ")[-1] == text
    assert rows(tmp_path) == [{"step": 1, "phase": "train", **values}]


def log_and_fail(log: RunLog) -> None:
    log.add_scalars(1, "train", {"loss": 1.0})
    raise RuntimeError("training failed")


def test_error_closes_the_files(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="training failed"), run_log(tmp_path) as log:
        log_and_fail(log)
    assert [event.step for event in events(tmp_path).Scalars("train/loss")] == [1]
