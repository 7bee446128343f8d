"""The speed benchmarks: their arithmetic, the page, and that every command runs in toy sizes."""

import json
import math
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from benchmarks import ROOT, bench
from benchmarks.measuring import peers
from benchmarks.measuring.machine import Limits, flops_of
from benchmarks.measuring.paired import (
    Claim,
    Figure,
    Settings,
    Work,
    alternate,
    read_claims,
    rounded,
    run_command,
    times_faster,
)
from benchmarks.reading import loading
from driving_sim.engine.errors import DriveSimError
from tests.benchmarks import stand_in_peers


def claim(figure: float, **options: object) -> Claim:
    values = {"what": "w", "bar": 10.0, "command": "c", **options}
    return Claim(figure=Figure.of([figure]), **values)  # type: ignore[arg-type]


def test_a_peer_that_is_twice_as_slow_gives_2(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("benchmarks.measuring.paired.time.perf_counter", lambda: clock[0])

    def lasting(seconds: float) -> Work:
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    times = alternate({"own": lasting(1.0), "peer": lasting(2.0)}, Settings(rounds=3))
    assert times_faster(times["peer"], times["own"]).median == 2
    assert times_faster([2.0], [1.0], work=0.5).median == 4  # the peer does half of the work


def test_a_ratio_is_the_median_over_the_rounds() -> None:
    # In the second round, the machine is ten times slower for both.
    assert times_faster([3.0, 30.0, 3.0], [1.0, 10.0, 1.0]) == Figure(3, 3, 3)
    assert times_faster([1.0, 5.0, 2.0], [1.0, 1.0, 1.0]) == Figure(2, 1, 5)


def test_work_is_timed_in_turns_after_a_warm_up_round() -> None:
    order: list[str] = []
    work = {name: lambda name=name: order.append(name) for name in "ab"}
    times = alternate(work, Settings(rounds=3))
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(taken) for taken in times.values()] == [3, 3]


def test_a_bar_is_reached_from_the_right_side() -> None:
    assert claim(10.0).reached
    assert not claim(9.99).reached
    assert claim(0.3, bar=0.3, at_most=True).reached
    assert not claim(0.31, bar=0.3, at_most=True).reached
    assert claim(12.34).figure_text() == "12.3×"
    assert claim(0.25, unit="%").figure_text() == "25.0 %"
    assert claim(0.25, unit="%", bar=0.5, at_most=True).bar_text() == "≤ 50 %"
    assert claim(1.0, bar=None).reached is None
    assert str(claim(1.0, bar=None)) == "w: 1.00×"


def test_numbers_have_three_significant_digits() -> None:
    numbers = (224_665, 999.9, 94.04, 1.0, 0.0787, 0.0, math.inf)
    assert [rounded(n) for n in numbers] == [
        "225,000", "1,000", "94.0", "1.00", "0.0787", "0", "inf"
    ]  # fmt: skip


def test_a_row_holds_the_rates_of_both_or_the_figure_alone() -> None:
    ratio = claim(2.0, against="GPT-2", own="4.00 frames/s", peer="2.00 frames/s", limits="9 %")
    assert ratio.cells() == ["w", "4.00 frames/s", "2.00 frames/s (GPT-2)", "2.00×", "9 %"]
    assert claim(2.0, unit="frames/s").cells() == ["w", "2.00 frames/s", "–", "–", "–"]


def test_limits_are_reported_as_shares() -> None:
    limits = Limits(dtype=torch.float32, flops=1e9, bandwidth=1e8)
    assert limits.share(2.0, flops=1e9, read=1e7) == "50 % of products, 5 % of memory"


def test_operations_are_counted_as_the_formulas_say() -> None:
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert flops_of(lambda: a @ b) == 2 * 3 * 5 * 7
    q = torch.randn(2, 4, 6, 8)

    def attend(causal: bool) -> float:
        attention = torch.nn.functional.scaled_dot_product_attention
        return flops_of(lambda: attention(q, q, q, is_causal=causal))

    assert attend(False) == 2 * 2 * (2 * 4 * 6 * 6 * 8)
    assert attend(True) == attend(False) / 2


@pytest.fixture
def with_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (peers, loading):
        monkeypatch.setattr(module, "package", stand_in_peers.package)


@pytest.mark.usefixtures("with_peers")
# WebDataset itself leaves shards open.
@pytest.mark.filterwarnings(r"ignore:unclosed file.*\.tar'>:ResourceWarning")
@pytest.mark.parametrize(("module", "name"), bench.COMMANDS)
def test_every_command_runs(
    module: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmarks = import_module(f"benchmarks.{module}").BENCHMARKS
    saved = tmp_path / "claims.jsonl"
    options = ["--toy", "--rounds=1", "--threads=1", f"--json={saved}"]
    run_command("", module, benchmarks, [name, *options])
    claims = read_claims(saved)
    printed = capsys.readouterr().out
    assert claims
    for measured in claims:
        assert str(measured) in printed
        assert measured.command == f"python -m benchmarks.{module} {name}"
        assert math.isfinite(measured.figure.median)
        assert measured.figure.least <= measured.figure.median <= measured.figure.most


@pytest.mark.usefixtures("with_peers")
def test_the_compiled_gpt2_is_a_peer_if_torch_can_compile_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(rounds=1, toy=True)
    measure = import_module("benchmarks.rollouts.speed").measure
    assert [made.against for made in measure("tiny", settings)] == ["GPT-2", "GPT-2, compiled", ""]

    def refused(*_: object, **__: object) -> None:
        raise TorchDynamoException("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refused)
    assert [made.against for made in measure("tiny", settings)] == ["GPT-2", ""]
    assert "torch cannot compile GPT-2 here: no compiler\n" in capsys.readouterr().err


@pytest.mark.usefixtures("with_peers")
def test_gpt2_draws_the_same_in_all_its_forms() -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(0)
        return peers.gpt2(layers=1, width=16, heads=1, codes=40, positions=12)

    decoders = peers.gpt2_decoders(
        build, positions=12, context=4, codes=40, settings=Settings(toy=True)
    )
    drawn = []
    for decoder in decoders.values():
        torch.manual_seed(1)
        drawn.append(decoder.draw(8))
    assert len(drawn) >= 3
    assert all((tokens == drawn[0]).all() for tokens in drawn)


def test_a_section_has_a_row_for_each_claim_and_names_missed_bars() -> None:
    claims = [claim(12.0), claim(3.0, what="slow"), claim(7.0, bar=None)]
    text = bench.section("a machine", "2026-01-01, commit abc.", claims)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(claims)
    assert len({row.count("|") for row in rows}) == 1
    assert "\n## a machine\n\n2026-01-01, commit abc.\n" in text
    assert "\n1 of 2 bars reached. Missed: slow, 3.00× (bar ≥ 10×).\n" in text


def test_a_section_is_replaced_or_added_and_the_rest_of_the_page_stays(tmp_path: Path) -> None:
    path = tmp_path / "speed.md"
    path.write_text("# Speed\n", "utf-8")
    for machine, text in (("a", "old"), ("b", "b's"), ("a", "new"), ("c", "c's")):
        bench.update_page(path, machine, bench.section(machine, text, []))
        if machine == "b":
            path.write_text(path.read_text("utf-8") + "\n## What limits it\n", "utf-8")
    page = path.read_text("utf-8")
    assert re.findall("^#+ (.*)", page, re.MULTILINE) == ["Speed", "a", "b", "c", "What limits it"]
    assert "new" in page
    assert "old" not in page
    bench.update_page(path, "a", bench.section("a", "new", []))
    assert path.read_text("utf-8") == page


def test_a_page_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "speed.md"
    path.write_text("page", "utf-8")

    def fail(*_: object) -> str:
        raise OSError

    monkeypatch.setattr(bench, "with_section", fail)
    with pytest.raises(OSError):
        bench.update_page(path, "a", "text")
    assert path.read_text("utf-8") == "page"
    assert list(tmp_path.iterdir()) == [path]


def test_the_page_has_sections_that_can_be_replaced() -> None:
    page = (ROOT / "docs" / "speed.md").read_text("utf-8")
    machines = re.findall("<!-- make bench: (.*) -->", page)
    assert len(machines) >= 3
    for machine in machines:
        assert f"<!-- end of make bench: {machine} -->" in page
        assert f"\n## {machine}\n" in page


def test_a_failed_command_is_named_and_the_others_still_run(
    capfd: pytest.CaptureFixture[str],
) -> None:
    commands = [("startup", "nothing like it"), ("startup", "startup")]
    with pytest.raises(SystemExit, match=r"failed: startup nothing like it; the page \(--out\)"):
        bench.measure(commands, ["--rounds=1", "--toy"])
    assert "drivesim --help" in capfd.readouterr().out


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(SystemExit, match=r"webdataset is not installed; run pip install 'drives"):
        peers.package("webdataset")


def test_claims_survive_the_round_trip_through_a_file(tmp_path: Path) -> None:
    file = tmp_path / "claims.jsonl"
    saved = claim(2.5, details=("one", "two"))

    def measured(_: Settings) -> list[Claim]:
        return [saved]

    run_command("", "x", {"it": measured}, [f"--json={file}", "--device=cpu"])
    file.write_text(json.dumps({**json.loads(file.read_text()), "command": "c"}) + "\n")
    assert read_claims(file) == [saved]
    with pytest.raises(DriveSimError, match="`device` none"):
        run_command("", "x", {"it": measured}, ["--device=none"])


def test_a_section_without_its_end_is_refused() -> None:
    page = bench.with_section("# Speed", "A", bench.section("A", "2026-01-01.", []))
    damaged = page.replace("<!-- end of make bench: A -->", "")
    with pytest.raises(SystemExit, match="end of make bench: A"):
        bench.with_section(f"{damaged}\nThe rest.", "A", "new")


@pytest.mark.parametrize(("seconds", "text"), [(1 / 0.997, "100 %"), (20.0, "5 %"), (2.44, "41 %")])
def test_shares_of_limits_are_plain_numbers(seconds: float, text: str) -> None:
    limits = Limits(dtype=torch.float32, flops=1.0, bandwidth=1.0)
    assert limits.share(seconds, flops=1.0) == f"{text} of products"
