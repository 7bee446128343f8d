import json
from pathlib import Path

import pytest

from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.report.intervals import number_and_interval
from driving_sim.evaluate.report.protocol_hash import Protocol
from driving_sim.evaluate.report.report import KeyFigure, refuse_existing, write_report
from driving_sim.evaluate.report.section import Section
from tests.fixtures.report_sections import (
    ESTIMATE,
    PROTOCOL,
    report_arguments,
    written_page,
)


def test_the_folder_holds_the_page_the_metrics_and_the_protocol(tmp_path: Path) -> None:
    headline = [KeyFigure(label="PSNR", metric="reconstruction.psnr_db")]
    written_page(tmp_path / "out", headline=headline, attachments={"probe.bin": b"weights"})
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"report.html", "metrics.json", "protocol.json", "probe.bin"}
    assert (tmp_path / "out" / "probe.bin").read_bytes() == b"weights"
    assert Protocol.load(tmp_path / "out" / "protocol.json") == PROTOCOL
    text = (tmp_path / "out" / "metrics.json").read_text()
    metrics = json.loads(text, parse_constant=pytest.fail)
    assert metrics == {
        "protocol": PROTOCOL.hash,
        "model": {"path": "runs/tokenizer", "fingerprint": "ab" * 32},
        "seconds": 61.4,
        "headline": {"PSNR": "reconstruction.psnr_db"},
        "reconstruction": {
            "psnr_db": 21.5,
            "bits": ESTIMATE,
            "by_drive": {"one\n\ntwo": [1.0, None]},
        },
        "speed": {"frames_per_s": 2.5, "lpips": None, "counts": [0, 1]},
    }


def test_key_figures_are_at_the_top_of_the_page(tmp_path: Path) -> None:
    beside = {"PSNR": "reconstruction.psnr_db", "absent": "reconstruction.absent"}
    headline = [
        KeyFigure(label="bits", metric="reconstruction.bits", beside=beside),
        KeyFigure(label="no number", metric="speed.lpips"),
        KeyFigure(label="not measured", metric="rollout.psnr_db"),
        KeyFigure(label="not measured", metric="reconstruction.psnr"),
    ]
    head = written_page(tmp_path / "out", headline=headline).partition("<nav")[0]
    assert '<dt>bits</dt><dd class="value">3.21 [3.10, 3.33]</dd>' in head
    assert '<dd class="beside">PSNR 21.5</dd>' in head
    assert '<dt>no number</dt><dd class="value">–</dd>' in head
    assert "not measured" not in head
    assert "absent" not in head
    returned = write_report(tmp_path / "again", **report_arguments(headline=headline))
    assert returned == {"bits": "3.21 [3.10, 3.33]", "no number": "–"}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["headline"] == {"bits": "reconstruction.bits", "no number": "speed.lpips"}


def test_a_key_figure_shows_its_interval_and_its_total(tmp_path: Path) -> None:
    metrics = {
        **number_and_interval("lasted_s", {"mean": 41.3, "low": 30.2, "high": 52.4}),
        **number_and_interval("gain", {"mean": 0.9, "low": None, "high": None}),
        **number_and_interval("none", None),
        "lasted": 3,
        "rollouts": 4,
    }
    headline = [
        KeyFigure(label="s", metric="a.lasted_s", beside={"gain": "a.lasted_s"}),
        *(KeyFigure(label=name, metric=f"a.{name}") for name in ("gain", "none")),
        KeyFigure(label="lasted", metric="a.lasted", total="a.rollouts"),
    ]
    arguments = report_arguments(headline=headline, sections=[Section("a", "A", "", metrics)])
    texts = write_report(tmp_path / "out", **arguments)
    assert texts == {"s": "41 [30, 52]", "gain": "0.9", "none": "–", "lasted": "3 of 4"}
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert '<dd class="beside">gain 41 [30, 52]</dd>' in page
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["a"]["lasted_s"] == 41.3


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse_existing(out)
    out.mkdir()
    refuse_existing(out)
    written_page(out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    for refuse in (refuse_existing, written_page):
        with pytest.raises(DriveSimError, match="already holds a report; choose another `out`"):
            refuse(out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").touch()
    for path in (videos, videos / "a.mp4", Path()):
        with pytest.raises(DriveSimError, match="exists and is not a report"):
            refuse_existing(path)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, **page: object) -> None:
        path.write_text("<!doctype")
        raise KeyboardInterrupt

    monkeypatch.setattr("driving_sim.evaluate.report.report.write_page", interrupted)
    with pytest.raises(KeyboardInterrupt):
        written_page(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
