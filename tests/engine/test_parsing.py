import time
from typing import Any

import pytest

from driving_sim.engine.parsing import one_line, parse_json, parse_yaml, shown

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "including aliases"),
        (MERGES, "including aliases"),
        ("a: &a [*a]", "including aliases"),
        ("[" * 10_000, "too deeply"),
        ("- " * 10_000, "too deeply"),
        ("a: " + "9" * 10_000, "4300 digits"),
        ("a: !!timestamp x", "groupdict"),
        ("a: !!timestamp 2001-99-99", "month"),
        ("a: !!bool x", "x"),
        ("a: !!int ''", "index"),
        ("a: !!python/object/apply:os.mkdir [made]", "could not determine a constructor"),
        ("a: \x1b[2J", "special characters"),
        ("{", "line 1"),
    ],
)
def test_hostile_yaml_is_refused_quickly_in_one_line(text: str, reason: str) -> None:
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=reason) as caught:
        parse_yaml(text)
    assert time.perf_counter() - begin < 2
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", ["2001-12-14", "2001-99-99"])
def test_a_string_that_looks_like_a_date_stays_a_string(text: str) -> None:
    assert parse_yaml(f"a: {text}") == {"a": text}


def test_a_few_aliases_are_fine() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: *x\nc: {<<: &y {k: 3}}\nd: *y\n") == {
        "a": [1, 2],
        "b": [1, 2],
        "c": {"k": 3},
        "d": {"k": 3},
    }


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 10_000, "{", "", '{"a": 1} x'])
def test_hostile_json_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError):
        parse_json(text.encode())


@pytest.mark.parametrize(
    "value",
    [10**5000, "x" * 10**6, [[[0] * 999] * 999] * 999, "\ud800\n\x1b"],
    ids=["number", "text", "lists", "controls"],
)
def test_long_values_are_shortened_for_messages(value: Any) -> None:
    assert 0 < len(shown(value)) < 1000
    assert shown(value).isprintable()


def test_small_values_are_shown_as_they_are() -> None:
    for value in (3, "a b", [1, 2], {"a": None}, 0.5):
        assert shown(value) == repr(value)


def test_errors_become_one_line() -> None:
    assert one_line("a\n b\x1b[2J") == "a b\\x1b[2J"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line("x" * 10**6)) < 1000
