from pathlib import Path

import pytest

from driving_sim.data.inner_name import inside, is_inner_name

OUTSIDE = ["", "..", "../a", "a/../b", "a/..", "/a", "\\a", "C:\\a", "c:/a", "a\\..\\b"]


@pytest.mark.parametrize("name", [*OUTSIDE, "a\nb", "a\0", "\x9b", "\ud800"])
def test_names_that_lead_outside_are_refused(name: str, tmp_path: Path) -> None:
    assert not is_inner_name(name)
    with pytest.raises(ValueError):
        inside(tmp_path, name)


@pytest.mark.parametrize("name", ["a", "a/b", "..a", "a..", "a..b/c", "b0c9|2018--06/3", "日本 é"])
def test_names_that_stay_inside_become_paths(name: str, tmp_path: Path) -> None:
    assert inside(tmp_path, name) == tmp_path / name


def test_links_may_not_lead_out(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    (folder / "file").write_text("f")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to(tmp_path)
    (folder / "circle").symlink_to(folder / "circle")
    (folder / "within").symlink_to(folder / "file")
    (folder / "a").mkdir()
    (folder / "a" / "up").symlink_to(tmp_path)
    # The message names the link, not the file behind it.
    links = {"out": "out", "up/secret": "up", "up": "up", "a/up/b/c": "a/up", "./up/secret": "up"}
    for name, link in links.items():
        with pytest.raises(ValueError, match=f"^'{link}' is a link that leads outside"):
            inside(folder, name)
    with pytest.raises(ValueError, match="cannot be resolved"):
        inside(folder, "circle")
    assert inside(folder, "within").read_text() == "f"
    assert inside(folder, "within", folder.resolve()) == folder / "within"
    # A folder that is itself reached through a link is allowed.
    (tmp_path / "link").symlink_to(folder)
    assert inside(tmp_path / "link", "file").read_text() == "f"
