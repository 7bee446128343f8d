import base64
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.report.page import (
    KeyFigure,
    cell_texts,
    refuse_existing,
    write_report,
)
from driving_sim.evaluate.report.protocol_hash import Protocol
from driving_sim.evaluate.report.section import Media, Section, Table, film, photo, plot

HOSTILE = '<script>alert("1")</script>&amp;<img src="http://example.com/x.png">$title\udcff'
PROTOCOL = Protocol.of("tokenizer", {"drives": {HOSTILE: "00"}, "seed": 0})
ESTIMATE = {"mean": 3.2134, "low": 3.1021, "high": 3.3333}


def line_plot(caption: str = "A plot") -> Media:
    figure = Figure(figsize=(4, 2))
    figure.subplots().plot([0, 1], [1, 0])
    return plot(figure, caption)


def sections(text: str = "one\n\ntwo") -> list[Section]:
    random = np.random.default_rng(0)
    frames = random.integers(0, 255, (4, 32, 64, 3), np.uint8)
    table = Table(
        caption=f"Table {text}", columns=("drive", "dB"), rows=((text, 21.5), ("b", None))
    )
    return [
        Section(
            name="reconstruction",
            title=f"Reconstruction {text}",
            text=text,
            metrics={"psnr_db": 21.5, "bits": ESTIMATE, "by_drive": {text: [1.0, math.nan]}},
            parts=(table, line_plot(f"Plot {text}"), photo(frames[0], f"Photo {text}")),
        ),
        Section(
            name="speed",
            title="Speed",
            text="",
            metrics={"frames_per_s": np.float32(2.5), "lpips": -math.inf, "counts": np.arange(2)},
            parts=(
                film(list(frames), 10, f"Film {text}"),
                Table(caption="C", columns=("x",), rows=()),
            ),
        ),
    ]


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "title": "A tokenizer",
        "description": {"model": "runs/tokenizer", "frames": 1234},
        "sections": sections(),
        "protocol": PROTOCOL,
        "model": {"path": "runs/tokenizer", "fingerprint": "ab" * 32},
        "seconds": 61.4,
        **changes,
    }


def write(out: Path, **changes: Any) -> str:
    write_report(out, **arguments(**changes))
    return (out / "report.html").read_text("utf-8")


class Page(HTMLParser):
    """The tags, with their attributes, and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_the_folder_holds_page_numbers_and_protocol(tmp_path: Path) -> None:
    headline = [KeyFigure(label="PSNR", metric="reconstruction.psnr_db")]
    write(tmp_path / "out", headline=headline, attachments={"probe.bin": b"weights"})
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


def test_the_page_asks_for_nothing(tmp_path: Path) -> None:
    page = Page(write(tmp_path / "out", sections=sections(HOSTILE), title=HOSTILE))
    assert not {name for name, _ in page.tags} & {"script", "link", "iframe", "object", "base"}
    for name, attributes in page.tags:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "srcset", "href", "poster", "data", "action"):
            value = attributes.get(key)
            if value is not None:
                assert value.startswith("#" if name == "a" else "data:")
    style = (tmp_path / "out" / "report.html").read_text().partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_hostile_text_is_text(tmp_path: Path) -> None:
    """Whatever a drive is called, the page has the same tags."""

    def page(out: Path, text: str) -> Page:
        figure = KeyFigure(label=text, metric="speed.lpips", beside={text: "speed.lpips"})
        made = {"description": {text: text}, "sections": sections(text), "headline": [figure]}
        return Page(write(out, title=text, **made))

    one, other = page(tmp_path / "one", HOSTILE), page(tmp_path / "two", "a")
    assert [name for name, _ in one.tags] == [name for name, _ in other.tags]
    text = "".join(one.text)
    shown = HOSTILE.replace("\udcff", "\\udcff")
    # title twice, description twice, figure twice, section 8 times; the protocol shows it as JSON
    assert text.count(shown) == 14
    assert shown.replace('"', '\\"') in text


def test_every_part_is_there(tmp_path: Path) -> None:
    made = sections()
    page = Page(write(tmp_path / "out", sections=made))
    text = "".join(page.text)
    for section in made:
        assert section.title in text
        for part in section.parts:
            assert part.caption in text
    sources = [str(tag["src"]) for tag in (*page.all("img"), *page.all("video"))]
    media = [part for section in made for part in section.parts if isinstance(part, Media)]
    decoded = {
        (source[5 : source.index(";")], base64.b64decode(source.partition(",")[2]))
        for source in sources
    }
    assert decoded == {(part.type, part.data) for part in media}
    assert len(page.all("table")) == 2
    assert {"controls", "loop", "muted", "playsinline"} <= page.all("video")[0].keys()
    anchors = [str(tag["href"])[1:] for tag in page.all("a")]
    assert anchors == [section.name for section in made]
    assert [tag["id"] for tag in page.all("h2")] == anchors
    assert PROTOCOL.hash in text
    assert "Measured in 1 min 1 s" in text
    assert "1,234" in text


def test_key_figures_stand_at_the_head(tmp_path: Path) -> None:
    beside = {"PSNR": "reconstruction.psnr_db", "absent": "reconstruction.absent"}
    headline = [
        KeyFigure(label="bits", metric="reconstruction.bits", beside=beside),
        KeyFigure(label="no number", metric="speed.lpips"),
        KeyFigure(label="not measured", metric="rollout.psnr_db"),
        KeyFigure(label="not measured", metric="reconstruction.psnr"),
    ]
    head = write(tmp_path / "out", headline=headline).partition("<nav")[0]
    assert '<dt>bits</dt><dd class="value">3.21 [3.10, 3.33]</dd>' in head
    assert '<dd class="beside">PSNR 21.5</dd>' in head
    assert '<dt>no number</dt><dd class="value">–</dd>' in head
    assert "not measured" not in head
    assert "absent" not in head
    returned = write_report(tmp_path / "again", **arguments(headline=headline))
    assert returned == {"bits": "3.21 [3.10, 3.33]", "no number": "–"}
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["headline"] == {"bits": "reconstruction.bits", "no number": "speed.lpips"}
    for place in ("reconstruction", "reconstruction.by_drive", "speed.counts"):
        with pytest.raises(ValueError, match=f"headline: {place} is not one number"):
            write(tmp_path / "bad", headline=[KeyFigure(label="x", metric=place)])


@pytest.mark.parametrize(
    ("cells", "texts"),
    [
        ([22.0612, 9.81234, None, 3], ["22.06", "9.81", "–", "3"]),
        ([0.5, 0.25], ["0.50", "0.25"]),
        ([1234567.8, 0.012345, math.nan], ["1,234,568", "0.01235", "–"]),
        ([999.96], ["1,000"]),
        ([0.0000012, 0.0000034], ["1.2e-06", "3.4e-06"]),
        ([0.0, -1.5, math.inf], ["0.0", "-1.5", "–"]),
        ([True, False, "text", 12345], ["yes", "no", "text", "12,345"]),
        ([ESTIMATE], ["3.21 [3.10, 3.33]"]),
        ([{"mean": 1234.5, "low": 1111.1, "high": 1333.3}], ["1,234 [1,111, 1,333]"]),
        ([{"mean": 2.0, "low": 2.0, "high": 2.0}], ["2 [2, 2]"]),
        ([{"mean": 2.0, "low": None, "high": None}], ["2"]),
        ([{"mean": None, "low": None, "high": None}], ["–"]),
    ],
)
def test_numbers_have_sensible_digits(cells: list[Any], texts: list[str]) -> None:
    assert cell_texts(cells) == texts


def test_columns_of_numbers_are_on_the_right(tmp_path: Path) -> None:
    table = Table(
        caption="c",
        columns=("name", "number", "estimate", "text"),
        rows=(("a", -1.5, ESTIMATE, "1 of 2"), ("b", None, None, "")),
    )
    page = write(tmp_path / "out", sections=[replace(sections()[0], parts=(table,))])
    cells = re.findall(r"<t[hd]( scope=\"col\")?( class=\"number\")?>([^<]*)</t[hd]>", page)
    assert [text for _, right, text in cells if right] == [
        *("number", "estimate"),
        *("−1.5", "3.21 [3.10, 3.33]"),
        *("–", "–"),
    ]


def test_an_existing_folder_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse_existing(out)
    out.mkdir()
    refuse_existing(out)
    write(out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    for refuse in (refuse_existing, write):
        with pytest.raises(DriveSimError, match="already holds a report: choose another --out"):
            refuse(out)
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    other = tmp_path / "videos"
    other.mkdir()
    (other / "a.mp4").touch()
    for path in (other, other / "a.mp4", Path()):
        with pytest.raises(DriveSimError, match="exists and is not a report"):
            refuse_existing(path)


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(path: Path, page: str) -> None:
        path.write_text(page[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr("driving_sim.evaluate.report.page.write_page", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["model", "headline", "speed", "a.b", "a b", ""])
def test_section_names_are_keys_of_their_own(tmp_path: Path, name: str) -> None:
    one, other = sections()
    with pytest.raises(ValueError, match="expected an identifier not used yet"):
        write(tmp_path / "out", sections=[other, replace(one, name=name)])
