import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

from driving_sim.evaluate.report.report import KeyFigure
from driving_sim.evaluate.report.section import Media, Table
from tests.fixtures.report_sections import ESTIMATE, HOSTILE, PROTOCOL, sections, written_page


class Page(HTMLParser):
    """Parser that collects the tags of a page, with their attributes, and its text."""

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


def test_the_page_loads_no_other_file(tmp_path: Path) -> None:
    page = Page(written_page(tmp_path / "out", sections=sections(HOSTILE), title=HOSTILE))
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


def test_html_in_a_text_is_escaped(tmp_path: Path) -> None:
    """The page has the same tags for every name of a drive."""

    def page(out: Path, text: str) -> Page:
        figure = KeyFigure(label=text, metric="speed.lpips", beside={text: "speed.lpips"})
        content = {"description": {text: text}, "sections": sections(text), "headline": [figure]}
        return Page(written_page(out, title=text, **content))

    hostile, plain = page(tmp_path / "hostile", HOSTILE), page(tmp_path / "plain", "a")
    assert [name for name, _ in hostile.tags] == [name for name, _ in plain.tags]
    text = "".join(hostile.text)
    escaped = HOSTILE.replace("\udcff", "\\udcff")
    # Twice in the title, the description and the key figure, and 8 times in the section.
    assert text.count(escaped) == 14
    # The protocol shows it once more, as JSON.
    assert escaped.replace('"', '\\"') in text


def test_the_page_shows_every_part(tmp_path: Path) -> None:
    all_sections = sections()
    page = Page(written_page(tmp_path / "out", sections=all_sections))
    text = "".join(page.text)
    for section in all_sections:
        assert section.title in text
        for part in section.parts:
            assert part.caption in text
    sources = [str(tag["src"]) for tag in (*page.all("img"), *page.all("video"))]
    media = [part for section in all_sections for part in section.parts if isinstance(part, Media)]
    decoded = {
        (source[5 : source.index(";")], base64.b64decode(source.partition(",")[2]))
        for source in sources
    }
    assert decoded == {(part.type, part.data) for part in media}
    assert len(page.all("table")) == 2
    assert {"controls", "loop", "muted", "playsinline"} <= page.all("video")[0].keys()
    anchors = [str(tag["href"])[1:] for tag in page.all("a")]
    assert anchors == [section.name for section in all_sections]
    assert [tag["id"] for tag in page.all("h2")] == anchors
    assert PROTOCOL.hash in text
    assert "Measured in 1 min 1 s" in text
    assert "1,234" in text


def test_columns_of_numbers_are_right_aligned(tmp_path: Path) -> None:
    table = Table(
        caption="c",
        columns=("name", "number", "estimate", "text"),
        rows=(("a", -1.5, ESTIMATE, "1 of 2"), ("b", None, None, "")),
    )
    page = written_page(tmp_path / "out", sections=[replace(sections()[0], parts=(table,))])
    cells = re.findall(r"<t[hd]( scope=\"col\")?( class=\"number\")?>([^<]*)</t[hd]>", page)
    assert [text for _, right, text in cells if right] == [
        *("number", "estimate"),
        *("−1.5", "3.21 [3.10, 3.33]"),
        *("–", "–"),
    ]
