"""A short run of the fuzzer; `python -m tests.stress.fuzz` is the long one."""

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from driving_sim.engine.errors import DriveSimError
from tests.stress import fuzz, fuzz_targets

INPUTS = {"checkpoint": 3, "world-model": 10, "tokenizer": 10, "video": 20, "comma2k19": 10}
UNSHOWABLE = {"control": "\x1b[2J", "8-bit control": "a\x9b2J", "delete": "\x7f", "half": "\ud800"}
quick = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=30,
    suppress_health_check=list(HealthCheck),
)
cells = st.one_of(
    st.floats(),
    st.integers(),
    st.text(max_size=8),
    st.sampled_from(["nan", "1e999", "", "-0", '"', "1_0"]),
)
words = st.sampled_from(
    ["speed", "steer", "accel", "=", "1", "-0.5", "1e9", " for ", "2s", ";", " ", "nan", "left"]
)


@pytest.mark.parametrize("target", fuzz_targets.TARGETS)
def test_damaged_input_raises_only_drivesim_errors(target: str) -> None:
    tally = fuzz.run(target, INPUTS.get(target, 25))
    assert tally.failures == []
    assert tally.tried == tally.accepted + tally.refused > 0


@quick
@given(st.lists(st.lists(cells, min_size=4, max_size=4), max_size=6), st.booleans())
def test_any_table_is_read_or_refused(rows: list[list[object]], rising: bool) -> None:
    if rising:
        rows = [[number / 10, *row[1:]] for number, row in enumerate(rows)]
    lines = [",".join(map(str, row)) for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.csv")
        text = "\n".join([fuzz_targets.CSV.splitlines()[0], *lines])
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            fuzz_targets.use_csv(path, path.parent)
        except DriveSimError as error:
            fuzz.check_message(str(error))


@quick
@given(st.one_of(st.text(max_size=60), st.lists(words, max_size=16).map("".join)))
def test_any_script_is_accepted_or_refused(script: str) -> None:
    try:
        fuzz_targets.use_script(script)
    except DriveSimError as error:
        fuzz.check_message(str(error))


def bad(kind: str) -> fuzz_targets.Attempt:
    def attempt(rng: random.Random, work: Path) -> None:
        if kind == "traceback":
            raise KeyError("x")
        if kind == "hang":
            while True:
                pass
        if kind == "half a file":
            (work / ".a.1.partial.mp4").touch()
        if kind == "lines":
            raise DriveSimError("one\ntwo")
        if kind in UNSHOWABLE:
            raise DriveSimError(UNSHOWABLE[kind])

    return attempt


@pytest.mark.parametrize("kind", ["traceback", "hang", "half a file", "lines", *UNSHOWABLE])
def test_the_fuzzer_reports_bad_outcomes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "HANG_S", 0.2)
    monkeypatch.setitem(fuzz_targets.TARGETS, "bad", lambda folder: bad(kind))
    tally = fuzz.run("bad", 2)
    assert len(tally.failures) == 2
    assert (tally.accepted, tally.refused) == (0, 0)


def test_an_input_depends_only_on_its_seed_and_number(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    monkeypatch.setitem(
        fuzz_targets.TARGETS, "draw", lambda folder: lambda rng, work: drawn.append(rng.random())
    )
    fuzz.run("draw", 3)
    fuzz.run("draw", 1, first=2)
    fuzz.run("draw", 1, first=2, seed=1)
    assert drawn[2] == drawn[3]
    assert len(set(drawn)) == 4
