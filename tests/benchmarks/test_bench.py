"""The speed benchmarks: what their arithmetic says, and that every command runs, in toy sizes."""

import json
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from benchmarks import bench
from benchmarks.measuring import peers
from benchmarks.measuring.machine import Limits, flops_of
from benchmarks.measuring.paired import (
    Claim,
    Figure,
    Settings,
    Work,
    alternate,
    read_claims,
    run_command,
    times_faster,
)
from benchmarks.reading import loading
from driving_sim.engine.errors import DriveSimError
from tests.benchmarks import stand_in_peers


def claim(figure: float, **options: object) -> Claim:
    given = {"what": "w", "against": "a", "bar": 10.0, "command": "c", **options}
    return Claim(figure=Figure.of([figure]), **given)  # type: ignore[arg-type]


def test_a_peer_that_is_twice_as_slow_gives_2(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("benchmarks.measuring.paired.time.perf_counter", lambda: clock[0])

    def lasting(seconds: float) -> Work:
        return lambda: clock.__setitem__(0, clock[0] + seconds)

    found = alternate({"own": lasting(1.0), "peer": lasting(2.0)}, Settings(rounds=3))
    assert times_faster(found["peer"], found["own"]).median == 2
    assert times_faster([2.0], [1.0], work=0.5).median == 4  # for half of the work


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    # The machine was ten times slower in the second round, for both.
    assert times_faster([3.0, 30.0, 3.0], [1.0, 10.0, 1.0]) == Figure(3, 3, 3)
    assert times_faster([1.0, 5.0, 2.0], [1.0, 1.0, 1.0]) == Figure(2, 1, 5)


def test_all_take_turns_after_a_round_that_does_not_count() -> None:
    order: list[str] = []
    work = {name: lambda name=name: order.append(name) for name in "ab"}
    found = alternate(work, Settings(rounds=3))
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert [len(times) for times in found.values()] == [3, 3]


def test_a_bar_is_reached_from_the_right_side() -> None:
    assert claim(10.0).reached
    assert not claim(9.99).reached
    assert claim(0.3, bar=0.3, at_most=True).reached
    assert not claim(0.31, bar=0.3, at_most=True).reached
    assert claim(12.34).figure_text() == "12.3×"
    assert claim(0.25, unit="%", bar=0.5, at_most=True).bar_text() == "≤ 50 %"
    assert claim(1.0, bar=None).reached is None
    assert str(claim(1.0, bar=None)) == "w, against a: 1×"


def test_limits_are_shares_of_the_rates() -> None:
    limits = Limits(dtype=torch.float32, flops=1e9, bandwidth=1e8)
    text = limits.reached(2.0, flops=1e9, read=1e8)
    assert text.startswith("50.0% of the matrix-product rate")
    assert "50.0% of the memory bandwidth" in text


def test_operations_are_those_of_the_formulas() -> None:
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
# The peers' own: webdataset leaves shards open.
@pytest.mark.filterwarnings(r"ignore:unclosed file.*\.tar'>:ResourceWarning")
@pytest.mark.parametrize(("module", "name"), bench.COMMANDS)
def test_every_command_runs(
    module: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmarks = import_module(f"benchmarks.{module}").BENCHMARKS
    kept = tmp_path / "claims.jsonl"
    options = ["--toy", "--rounds=1", "--threads=1", f"--json={kept}"]
    run_command("", module, benchmarks, [name, *options])
    claims = read_claims(kept)
    printed = capsys.readouterr().out
    assert claims
    for each in claims:
        assert str(each) in printed
        assert each.command == f"python -m benchmarks.{module} {name}"
        assert math.isfinite(each.figure.median)
        assert each.figure.least <= each.figure.median <= each.figure.most


@pytest.mark.usefixtures("with_peers")
def test_gpt2_is_compared_compiled_where_torch_can(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(rounds=1, toy=True)
    measure = import_module("benchmarks.rollouts.speed").measure
    assert [each.bar for each in measure("tiny", settings)] == [10, 3, None]

    def refused(*_: object, **__: object) -> None:
        raise TorchDynamoException("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refused)
    assert [each.bar for each in measure("tiny", settings)] == [10, 3]
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
    assert all((each == drawn[0]).all() for each in drawn)


def test_the_table_holds_every_claim(tmp_path: Path) -> None:
    claims = [claim(12.0, details=("so it was",)), claim(3.0), claim(7.0, bar=None)]
    path = tmp_path / "BENCHMARKS.md"
    bench.write_table(path, bench.table(claims, "a machine"))
    text = path.read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(claims)
    assert {row.count("|") for row in rows} == {7}
    assert "| 12× | reached |" in rows[2]
    assert "| 3× | **missed** |" in rows[3]
    assert "|  | 7× |  |" in rows[4]
    assert "a machine" in text
    assert "- w: so it was" in text


def test_one_that_fails_is_named_and_the_others_still_run(
    capfd: pytest.CaptureFixture[str],
) -> None:
    commands = [("startup", "nothing like it"), ("startup", "startup")]
    with pytest.raises(SystemExit, match="failed: startup nothing like it; the table was not"):
        bench.measure(commands, ["--rounds=1", "--toy"])
    assert "drivesim --help" in capfd.readouterr().out


def test_a_missing_peer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(SystemExit, match=r"webdataset is not installed: pip install 'drivesim\[b"):
        peers.package("webdataset")


def test_claims_are_kept_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "claims.jsonl"
    saved = claim(2.5, details=("one", "two"))

    def measured(_: Settings) -> list[Claim]:
        return [saved]

    run_command("", "x", {"it": measured}, [f"--json={file}", "--device=cpu"])
    kept = {**json.loads(file.read_text()), "command": "c"}
    file.write_text(json.dumps(kept) + "\n")
    assert read_claims(file) == [saved]
    with pytest.raises(DriveSimError, match="`device` none"):
        run_command("", "x", {"it": measured}, ["--device=none"])
