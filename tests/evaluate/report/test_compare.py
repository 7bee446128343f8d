import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.footage import Clip, Footage
from driving_sim.evaluate.pictures.features import SeededFeatures
from driving_sim.evaluate.pictures.quality import evaluate_quality
from driving_sim.evaluate.report.compare import compare_reports
from driving_sim.evaluate.report.intervals import number_and_interval
from driving_sim.evaluate.report.protocol_hash import Kind, Protocol
from driving_sim.evaluate.report.report import KeyFigure, write_report
from driving_sim.evaluate.report.section import Section
from driving_sim.evaluate.rollouts import Imagined
from tests.fixtures.token_drives import FPS, write_store
from tests.fixtures.world_models import new_world

SETTINGS = {"drives": {"drive_07": "00"}, "sampling": {"temperature": 1.0}, "seeds": [0, 1]}
HEADLINE = [
    KeyFigure(label="bits per token", metric="likelihood.bits_per_token"),
    KeyFigure(label="PSNR in dB", metric="quality.psnr_db"),
]
REAL_HEADLINE = [
    HEADLINE[0],
    KeyFigure(label="PSNR in dB", metric="quality.psnr_db.model"),
    KeyFigure(label="tokens right", metric="quality.token_accuracy.model"),
]


def report(
    path: Path,
    *,
    kind: Kind = "world-model",
    tokenizer: str = "t1",
    shift: float = 0.0,
    settings: dict[str, Any] = SETTINGS,
    quality: Section | None = None,
) -> Path:
    likelihood = {"per_tokenizer": True, "bits_per_token": 5.25 + shift}
    psnr = {"mean": 20.0 + shift, "low": 19.0, "high": 21.0, "by_frame": [22.0, 20.0 + shift, None]}
    made_up = {
        "psnr_db": psnr,
        "token_accuracy": {"model": 0.5, "by_frame": [0.6, 0.4]},
        "lpips": None,
        "froze": shift > 0,
        "extractor": "seeded",
    }
    sections = [
        Section(name="likelihood", title="Likelihood", text="", metrics=likelihood),
        quality or Section(name="quality", title="Quality", text="", metrics=made_up),
    ]
    write_report(
        path,
        title="A report",
        description={},
        sections=sections,
        protocol=Protocol.of(kind, settings),
        model={"fingerprint": path.name, "tokenizer_fingerprint": tokenizer},
        seconds=1.0,
        headline=HEADLINE if quality is None else REAL_HEADLINE,
    )
    return path


def rows(page: str) -> dict[str, list[str]]:
    """Return the texts of the cells in each row, by the row's label."""
    matches = re.findall(r"<tr><td>([^<]*)</td>(.*)</tr>", page)
    return {label: re.findall(r">([^<]*)</td>", cells) for label, cells in matches}


def curves(page: str) -> dict[str, np.ndarray[Any, Any]]:
    """Return the plots as arrays, by their captions."""
    matches = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', page)
    return {
        caption: np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        for caption, data in matches
    }


def test_metrics_stand_side_by_side(tmp_path: Path) -> None:
    a, b = report(tmp_path / "a"), report(tmp_path / "b", shift=0.5)
    out = tmp_path / "comparison.html"
    text = compare_reports(a, b, out)
    page = out.read_text("utf-8")
    cells = rows(page)
    assert cells["bits_per_token"] == ["5.25", "5.75", "+0.5"]
    assert cells["psnr_db"] == ["20.0 [19.0, 21.0]", "20.5 [19.0, 21.0]", "+0.5"]
    assert cells["token_accuracy.model"] == ["0.5", "0.5", "0"]
    assert cells["lpips"] == ["–", "–", "–"]
    assert cells["froze"] == ["no", "yes", "–"]
    assert "seeded" not in page
    assert cells["PSNR in dB"] == cells["psnr_db"]
    for line in ("bits per token", "5.25", "+0.5", "20.5 [19.0, 21.0]", "under the same protocol"):
        assert line in text
    for path in (a, b):
        assert str(path) in text
        assert f"fingerprint {path.name}" in page
    assert Protocol.load(a / "protocol.json").hash in page
    assert "not compared" not in text + page


def test_a_key_figure_has_the_interval_that_stands_beside_it(tmp_path: Path) -> None:
    for name, mean in (("a", 4.0), ("b", 5.0)):
        metrics = number_and_interval("lasted_s", {"mean": mean, "low": 3.0, "high": 6.0})
        write_report(
            tmp_path / name,
            title="A report",
            description={},
            sections=[Section("stability", "Stability", "", metrics)],
            protocol=Protocol.of("world-model", SETTINGS),
            model={"fingerprint": name},
            seconds=1.0,
            headline=[KeyFigure(label="lasts", metric="stability.lasted_s")],
        )
    text = compare_reports(tmp_path / "a", tmp_path / "b", tmp_path / "page.html")
    assert re.split(" {2,}", text.splitlines()[-1]) == [
        "lasts",
        "4.0 [3.0, 6.0]",
        "5.0 [3.0, 6.0]",
        "+1",
    ]


def test_curves_are_drawn_over_each_other(tmp_path: Path) -> None:
    blue, orange = [0x1F, 0x77, 0xB4], [0xFF, 0x7F, 0x0E]
    a, b = report(tmp_path / "a"), report(tmp_path / "b", shift=0.5)
    compare_reports(a, b, tmp_path / "out.html")
    drawn = curves((tmp_path / "out.html").read_text())
    assert drawn.keys() == {"psnr_db.by_frame", "token_accuracy.by_frame"}
    for colour in (blue, orange):
        assert (drawn["psnr_db.by_frame"] == colour).all(-1).sum() > 200
    compare_reports(a, a, tmp_path / "same.html")
    same = curves((tmp_path / "same.html").read_text())
    assert not np.array_equal(same["psnr_db.by_frame"], drawn["psnr_db.by_frame"])


def test_reports_of_different_protocols_are_refused(tmp_path: Path) -> None:
    a = report(tmp_path / "a")
    cooler = {**SETTINGS, "sampling": {"temperature": 0.8}}
    b = report(tmp_path / "b", settings=cooler)
    with pytest.raises(DriveSimError, match=r"differently .*: sampling\.temperature: 1\.0 / 0\.8;"):
        compare_reports(a, b, tmp_path / "out.html")
    c = report(tmp_path / "c", settings={str(number): 0 for number in range(9)})
    with pytest.raises(
        DriveSimError, match="and 9 more; evaluate both with the same settings"
    ) as raised:
        compare_reports(a, c, tmp_path / "out.html")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out.html").exists()


def test_a_tokenizer_and_a_world_model_are_refused(tmp_path: Path) -> None:
    a, b = report(tmp_path / "a", kind="tokenizer"), report(tmp_path / "b")
    with pytest.raises(DriveSimError, match=r"a is a tokenizer's .*b is a world model's"):
        compare_reports(a, b, tmp_path / "out.html")


def real_quality(folder: Path) -> Section:
    """Return the quality section of a real evaluation, whose rollouts repeat the last frame."""
    world = new_world()
    store = write_store(folder, [20], fingerprint=world.tokenizer.fingerprint)
    footage = Footage(drive=store.drives[0], tokenizer=world.tokenizer)
    rollouts = []
    for start in (5, 12):
        clip = Clip(footage=footage, start=start, context_frames=4, frames=3)
        tokens = clip.context_tokens[-1:].repeat(3, 1, 1)
        frames = world.tokenizer.decode(tokens).numpy()
        rollouts.append(Imagined(clip=clip, tokens=tokens, frames=frames))
    return evaluate_quality(rollouts, FPS, SeededFeatures())


def test_tokens_of_different_tokenizers_are_not_compared(tmp_path: Path) -> None:
    quality = real_quality(tmp_path / "tokens")
    a = report(tmp_path / "a", quality=quality)
    b = report(tmp_path / "b", quality=quality, tokenizer="t2")
    text = compare_reports(a, b, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text("utf-8")
    notice = "not compared: likelihood, quality.token_accuracy, quality.token_accuracy_by_frame."
    assert notice in text
    assert notice in page
    assert "PSNR in dB" in text
    assert "tokens right" not in text
    labels = [*rows(page), *curves(page)]
    assert any("psnr" in label for label in labels)
    assert not [label for label in labels if "token" in label]
    compare_reports(a, a, tmp_path / "same.html")
    assert "token_accuracy.model" in rows((tmp_path / "same.html").read_text("utf-8"))


def test_an_existing_comparison_is_not_overwritten(tmp_path: Path) -> None:
    a = report(tmp_path / "a")
    out = tmp_path / "out.html"
    out.write_text("another")
    with pytest.raises(DriveSimError, match=r"out\.html: exists already; choose another `out`"):
        compare_reports(a, a, out)
    assert out.read_text() == "another"


def test_a_metric_that_one_report_lacks_is_shown_as_a_dash(tmp_path: Path) -> None:
    a, b = report(tmp_path / "a"), report(tmp_path / "b")
    metrics = json.loads((b / "metrics.json").read_text())
    del metrics["likelihood"]
    metrics["quality"]["lpips"] = 0.25
    (b / "metrics.json").write_text(json.dumps(metrics))
    compare_reports(a, b, tmp_path / "out.html")
    cells = rows((tmp_path / "out.html").read_text("utf-8"))
    assert cells["bits_per_token"] == ["5.25", "–", "–"]
    assert cells["lpips"] == ["–", "0.25", "–"]


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    a = report(tmp_path / "a")
    b = report(tmp_path / "b", settings={**SETTINGS, "fps": 5})
    (b / "protocol.json").write_bytes((a / "protocol.json").read_bytes())
    with pytest.raises(DriveSimError, match="not from one evaluation"):
        compare_reports(a, b, tmp_path / "out.html")


def test_a_folder_that_is_not_a_report_is_named_in_the_error(tmp_path: Path) -> None:
    a = report(tmp_path / "a")
    with pytest.raises(DriveSimError, match=r"nothing/protocol\.json"):
        compare_reports(a, tmp_path / "nothing", tmp_path / "out.html")
    with pytest.raises(DriveSimError, match=r"not the name of an HTML file"):
        compare_reports(a, a, tmp_path / "out")
