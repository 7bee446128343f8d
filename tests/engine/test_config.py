import math
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from driving_sim.engine.config import (
    Count,
    Positive,
    config,
    from_dict,
    load_json,
    load_yaml,
    require,
    resolve,
    save_json,
    save_yaml,
    to_dict,
)
from driving_sim.engine.errors import DriveSimError


@config
class Inner:
    learning_rate: Positive = 0.1
    levels: tuple[int, ...] = (8, 5)
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        require(self, "levels", sum(self.levels) < 100, "of fewer than 100 together")


@config
class Outer:
    name: str
    mode: Literal["fast", "slow"] = "fast"
    steps: Count | None = None
    path: Path | None = None
    flag: bool = False
    number: int | float = 1
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    rates: dict[str, float] = field(default_factory=dict)
    names: list[str] = field(default_factory=list)


FULL = Outer(
    name="a",
    mode="slow",
    steps=3,
    path=Path("x/y"),
    flag=True,
    number=2.5,
    inner=Inner(levels=(4, 4, 4)),
    maybe=Inner(betas=(0.1, 0.2)),
    rates={"a": 1.0},
    names=["b"],
)


@pytest.mark.parametrize("config", [Outer(name="a"), FULL])
def test_a_config_survives_the_round_trip_through_dicts_and_files(
    config: Outer, tmp_path: Path
) -> None:
    assert from_dict(Outer, to_dict(config)) == config
    save_json(tmp_path / "c.json", to_dict(config))
    assert from_dict(Outer, load_json(tmp_path / "c.json")) == config
    save_yaml(tmp_path / "c.yaml", to_dict(config))
    assert from_dict(Outer, load_yaml(tmp_path / "c.yaml")) == config
    assert resolve(Outer(name="b"), file=tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("training.lr", "learning_rate"),
        ("lr", "training.learning_rate"),
        ("training.wd", "weight_decay"),
        ("training.rate", "learning_rate"),
        ("training.warmup", "warmup_steps"),
        ("training.val_every", "validate_every"),
        ("training.stpes", "steps"),
        ("training.ema_decays", "ema_decay"),
        ("data.batch", "batch_size"),
        ("bs", "data.batch_size"),
        ("model.ctx", "context_frames"),
        ("model.nlayers", "layers"),
    ],
)
def test_the_nearest_key_is_found_for_abbreviations(key: str, meant: str) -> None:
    from driving_sim.world_model.training.presets import PRESETS

    with pytest.raises(DriveSimError, match=f"the nearest one is '{meant}'$"):
        resolve(PRESETS["demo"], assignments=[f"{key}=1"])


@given(st.floats(min_value=1e-300, allow_infinity=False))
def test_any_rate_survives_an_assignment(rate: float) -> None:
    # In YAML 1.1, 1e-05 is a string.
    config = resolve(Outer(name="a"), assignments=[f"inner.learning_rate={rate!r}"])
    assert config.inner.learning_rate == rate


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "step": 1}, "config: unknown key 'step'; the nearest one is 'steps'"),
        ({"name": "a", "inner": {"level": []}}, "config.inner: .*'level'.*'levels'"),
        ({"name": "a", "learning_rat": 1}, "nearest one is 'inner.learning_rate'"),
        ({}, "config.name is missing"),
        ({"name": 3}, "config.name: must be a valid string, found 3"),
        ({"name": "a", "steps": True}, "config.steps: must be a valid integer, found True"),
        ({"name": "a", "steps": 1.5}, "config.steps: must be a valid integer, found 1.5"),
        ({"name": "a", "flag": 1}, "config.flag: must be a valid boolean, found 1"),
        ({"name": "a", "mode": "medium"}, "mode: must be 'fast' or 'slow', found 'medium'"),
        ({"name": "a", "inner": 3}, "config.inner: must be a mapping, found 3"),
        (
            {"name": "a", "inner": {"learning_rate": "fast"}},
            "inner.learning_rate: must be a valid number, found 'fast'",
        ),
        ({"name": "a", "inner": {"learning_rate": -1}}, "inner.learning_rate: must .* 0, found -1"),
        ({"name": "a", "inner": {"learning_rate": "1e-3"}}, "must be a valid number, found '1e-3'"),
        ({"name": "a", "inner": {"learning_rate": True}}, "must be a valid number, found True"),
        ({"name": "a", "inner": {"learning_rate": math.nan}}, "must be a finite number, found nan"),
        ({"name": "a", "inner": {"learning_rate": 10**999}}, "must be a finite number, found 1000"),
        ({"name": "a", "inner": {"betas": [1]}}, r"betas\[1\] is missing"),
        ({"name": "a", "inner": {"betas": [1, 1, 1]}}, "betas: Tuple should have at most 2 items"),
        ({"name": "a", "inner": {"levels": [1, "x"]}}, r"levels\[1\]: must be a valid integer"),
        ({"name": "a", "inner": {"levels": 8}}, "levels: must be a list, found 8"),
        ({"name": "a", "inner": {"levels": [99, 1]}}, "inner.levels: must be of fewer than 100"),
        ({"name": "a", "number": "1"}, "config.number: must be a valid integer, found '1'"),
        ({"name": "a", "number": 1e999}, "config.number: must be"),
        ({"name": "a", "rates": {"b": None}}, "rates.b: must be a valid number, found None"),
        ({"name": "a", "maybe": {"levels": 8}}, "maybe.levels: must be a list"),
        ({"name": "a", "steps": 2**63}, "config.steps: must"),
        ({"name": "\ud800"}, "config: .*surrogates not allowed"),
        ({"name": b"a"}, "config: must be a number, text, a list or a mapping, found b'a'"),
        (None, "config: must be a mapping, found None"),
    ],
)
def test_errors_describe_the_mistake(values: object, message: str) -> None:
    with pytest.raises(DriveSimError, match=message) as caught:
        from_dict(Outer, values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "name is missing"),
        ({"name": "a", "stepps": 3}, "unknown key 'stepps'; the nearest one is 'steps'"),
        ({"name": "a", "steps": 0}, "steps: must be greater than or equal to 1, found 0"),
        ({"name": "a", "inner": 3}, "inner: must be an instance of Inner, found 3"),
        ({"name": "a", "mode": "x" * 10**6}, "mode: must be 'fast' or 'slow', found 'xxx"),
        ({"name": "a", "rates": {"b": math.inf}}, "rates.b: must be a finite number, found inf"),
    ],
)
def test_instances_created_in_python_are_checked_too(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        Outer(**values)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 500


def test_a_plain_dataclass_is_read_as_strictly_as_a_config() -> None:
    @dataclass(kw_only=True, slots=True)
    class Plain:
        steps: int
        rate: float = 1.0

    assert from_dict(Plain, {"steps": 3, "rate": 2}) == Plain(steps=3, rate=2.0)
    for values in ({"steps": "3"}, {"steps": 3, "rate": True}, {"steps": 3, "other": 1}):
        with pytest.raises(DriveSimError):
            from_dict(Plain, values)


@given(st.text(st.sampled_from("0123456789eE+-._")))
def test_a_string_that_looks_like_a_number_stays_a_string(text: str) -> None:
    with TemporaryDirectory() as folder:
        save_yaml(Path(folder) / "c.yaml", {"name": text})
        assert load_yaml(Path(folder) / "c.yaml") == {"name": text}


def test_assignments_override_the_file_and_the_file_overrides_the_preset(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("steps: 5\ninner: {learning_rate: 0.2}\n")
    preset = Outer(name="a", steps=1, inner=Inner(learning_rate=0.9, levels=(7,)))
    config = resolve(preset, file=file, assignments=["steps=6", "inner.betas=[0.5, 0.6]"])
    assert config == Outer(
        name="a", steps=6, inner=Inner(learning_rate=0.2, levels=(7,), betas=(0.5, 0.6))
    )
    assert resolve(preset, assignments=["steps=null", "maybe.levels=[1]"]) == Outer(
        name="a", inner=preset.inner, maybe=Inner(levels=(1,))
    )


def test_errors_name_the_file_or_the_option(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("inner: {rate: 1}\n")
    with pytest.raises(DriveSimError, match=r"c\.yaml\.inner: unknown key 'rate'"):
        resolve(FULL, file=file)
    with pytest.raises(DriveSimError, match=r"`assignments`\.inner: unknown key 'rate'"):
        resolve(FULL, assignments=["inner.rate=1"])
    for assignment in ("steps", "=3", "inner..rate=1", "names=[1"):
        with pytest.raises(DriveSimError, match="`assignments` "):
            resolve(FULL, assignments=[assignment])
    with pytest.raises(DriveSimError, match=r"^\.\./c\.yaml\.name is missing"):
        from_dict(Outer, {}, where="../c.yaml")


@pytest.mark.parametrize("text", ["[1, 2]", "{", "3"])
def test_files_that_hold_no_mapping_are_refused(tmp_path: Path, text: str) -> None:
    for name, load in (("c.json", load_json), ("c.yaml", load_yaml)):
        (tmp_path / name).write_text(text)
        with pytest.raises(DriveSimError, match=name):
            load(tmp_path / name)
        with pytest.raises(DriveSimError, match="No such file"):
            load(tmp_path / f"missing-{name}")


def test_json_refuses_nan_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    save_json(path, {"a": 1})
    with pytest.raises(ValueError):
        save_json(path, {"a": float("nan")})
    assert load_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
