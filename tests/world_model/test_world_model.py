import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from driving_sim.engine import run_folder
from driving_sim.engine.errors import DriveSimError
from driving_sim.tokenizer import Tokenizer
from driving_sim.world_model import WorldModel
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.sampling.draw_waves import FrameSample, FrameSampler
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.transformer import Transformer
from tests.fixtures.token_drives import COLS, FPS, ROWS, tiny_tokenizer, turning_drive
from tests.fixtures.world_models import W, new_world


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


@pytest.fixture(scope="module")
def run(world: WorldModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    world.save(path)
    return path


def stacked(frames: Sequence[FrameSample]) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.stack([frame.tokens for frame in frames], dim=1),
        torch.stack([frame.log_probs for frame in frames], dim=1),
    )


@pytest.mark.parametrize(
    ("speed", "recorded", "known"),
    [(0.0, True, True), (3.0, True, True), (0.0, False, False)],
)
def test_a_recorded_speed_is_known_even_if_the_car_never_moved(
    world: WorldModel, tmp_path: Path, speed: float, recorded: bool, known: bool
) -> None:
    valid = np.tile([recorded, True], (9, 1))
    statistics = ActionStatistics.measure(np.full((9, 2), speed, np.float32), valid)
    model = Transformer(world.config.model, world.config.grid, statistics)
    WorldModel(model, world.tokenizer, fps=FPS, steering_kind="road_wheel").save(tmp_path)
    loaded = WorldModel.from_run(tmp_path, "cpu", "fp32")
    assert loaded.known_channels == (known, True)


def test_a_saved_model_generates_the_same(world: WorldModel, run: Path) -> None:
    loaded = WorldModel.from_run(run, device="cpu", precision="fp32")
    assert loaded.config == world.config
    assert loaded.fingerprint == world.fingerprint
    assert loaded.tokenizer.fingerprint == world.tokenizer.fingerprint
    assert (world.run, loaded.run, copy.deepcopy(loaded).run) == (None, run, run)
    tokens, actions, _ = turning_drive(8, 0)
    futures = []
    for model in (world, loaded):
        prefix = model.encode_prefix(tokens[:4], actions[:3])
        futures.append(stacked(list(model.generate(prefix, actions[3:]))))
    assert torch.equal(futures[0][0], futures[1][0])
    assert torch.equal(futures[0][1], futures[1][1])


def test_a_killed_save_leaves_the_earlier_model_intact(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training saves each new best model over the earlier one."""
    world.save(tmp_path)
    better = new_world()
    better.transformer.row_place.data += 1
    better = WorldModel(better.transformer, better.tokenizer, fps=FPS, steering_kind="road_wheel")
    allowed, replace = 0, Path.replace

    def killed(path: Path, target: Path) -> Path:
        nonlocal allowed
        if not allowed:
            raise KeyboardInterrupt
        allowed -= 1
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    for files in range(4):
        allowed = files
        with pytest.raises(KeyboardInterrupt):
            better.save(tmp_path)
        loaded = WorldModel.from_run(tmp_path, device="cpu", precision="fp32")
        assert loaded.fingerprint == world.fingerprint
    allowed = 4
    better.save(tmp_path)
    loaded = WorldModel.from_run(tmp_path, device="cpu", precision="fp32")
    assert loaded.fingerprint == better.fingerprint != world.fingerprint
    # All files have the same permissions.
    modes = {path.stat().st_mode for path in tmp_path.rglob("*.*")}
    assert len(modes) == 1


def test_branches_and_samples_are_the_single_futures(world: WorldModel) -> None:
    tokens, actions, _ = turning_drive(4, 0)
    prefix = world.encode_prefix(tokens, actions[:3])
    plans = np.zeros((3, 5, 2), np.float32)
    plans[:, :, 0], plans[:, :, 1] = 5.0, np.array([[-0.2], [0.0], [0.2]])
    sampling = Sampling(seed=7)
    together, log_probs = stacked(list(world.generate(prefix, plans, samples=2, sampling=sampling)))
    assert together.shape == log_probs.shape == (6, 5, ROWS, COLS)
    for branch in range(3):
        alone, _ = stacked(
            list(world.generate(prefix, plans[branch], samples=2, sampling=sampling))
        )
        assert torch.equal(alone, together[2 * branch : 2 * branch + 2])
    assert not torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("known", [1, 2, W - 1, W, 2 * W])
def test_log_probs_of_a_future_equal_those_of_the_uncached_sequence(
    world: WorldModel, known: int
) -> None:
    """Only the last W - 1 context frames count, and the frame and actions that lead to them."""
    tokens, actions, valid = turning_drive(known + 4, 1)
    valid = valid.copy()
    valid[known // 2, 1] = False
    prefix = world.encode_prefix(tokens[:known], actions[: known - 1], valid[: known - 1])
    future, log_probs = stacked(
        list(world.generate(prefix, actions[known - 1 : -1], valid[known - 1 : -1]))
    )
    first = max(0, known - W + 1)
    sequence = torch.cat([torch.from_numpy(tokens[first:known])[None], future], dim=1)
    led = np.concatenate([np.zeros((1, 2), np.float32), actions])
    led_valid = np.concatenate([np.zeros((1, 2), np.bool_), valid])
    with torch.no_grad():
        logits = world.transformer(
            sequence,
            torch.from_numpy(tokens[[first - 1 if first else 0]]),
            torch.tensor([first > 0]),
            torch.from_numpy(led[first : known + 4])[None],
            torch.from_numpy(led_valid[first : known + 4])[None],
        )
    expected = logits.log_softmax(-1).gather(-1, sequence.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(log_probs, expected[:, known - first :], atol=1e-4, rtol=0)


class _Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts how often a parameter of the model is cast."""

    def __init__(self, model: Transformer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.parameters = {value.data_ptr() for value in model.parameters()}
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.to, torch.ops.aten._to_copy):
            self.count += args[0].data_ptr() in self.parameters
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_weights_are_cast_to_bf16_only_once(world: WorldModel) -> None:
    tokens, actions, _ = turning_drive(4, 0)
    low = WorldModel(
        world.transformer,
        world.tokenizer,
        fps=FPS,
        steering_kind="road_wheel",
        precision="bf16",
    )
    assert low.fingerprint == world.fingerprint
    assert all(value.dtype is torch.float32 for value in low.transformer.parameters())
    prefix = low.encode_prefix(tokens, actions[:3])
    cache = copy.copy(prefix.cache)
    cache.model = world.transformer
    exact = FrameSampler(cache, prefix.last, samples=torch.arange(1), sampling=Sampling())
    action, known = torch.tensor([[5.0, 0.1]]), torch.ones(1, 2, dtype=torch.bool)
    with _Casts(world.transformer) as casts_in_every_pass:
        expected = exact.step(action, known)
    assert casts_in_every_pass.count > 0
    session = low.drive(prefix)
    with _Casts(prefix.cache.model) as casts:
        sample = session.step(action.numpy())
    assert casts.count == 0
    assert torch.equal(sample.tokens, expected.tokens)
    assert torch.equal(sample.log_probs, expected.log_probs)


def test_a_rollout_is_generated_tokens_decoded(world: WorldModel) -> None:
    frames = np.random.default_rng(0).integers(256, size=(3, 70, 90, 3), dtype=np.uint8)
    past = np.array([[5.0, 0.1], [np.nan, 0.1]])
    actions = np.array([[[5.0, 0.2]] * 4, [[5.0, -0.2]] * 4])
    rollout = world.rollout(frames, past, actions, samples=2, seed=3, top_p=0.9)
    assert rollout.frames.shape == (4, 4, 16 * ROWS, 16 * COLS, 3)
    assert rollout.frames.dtype == np.uint8
    known = ~np.isnan(past)
    prefix = world.encode_prefix(world.tokenizer.encode(frames), past, known)
    sampling = Sampling(seed=3, top_p=0.9)
    tokens, log_probs = stacked(list(world.generate(prefix, actions, samples=2, sampling=sampling)))
    assert torch.equal(rollout.tokens, tokens)
    assert torch.equal(rollout.log_probs, log_probs)
    assert np.array_equal(rollout.frames[2], world.tokenizer.decode(tokens[2]).numpy())
    assert (rollout.sampling_log_probs >= rollout.log_probs - 1e-5).all()


def test_contexts_that_are_encoded_together_continue_as_if_alone(world: WorldModel) -> None:
    drives = [turning_drive(12, seed) for seed in range(3)]
    tokens, actions = (np.stack([drive[i] for drive in drives]) for i in (0, 1))
    valid = np.stack([[True, False]] * 5)[None].repeat(3, 0)
    sampling = Sampling(seed=1, guidance=2.0)
    pair: dict[str, Any] = {"samples": 2, "sampling": sampling}
    together = world.encode_prefix(tokens[:, :6], actions[:, :5], valid)
    tokens_together, log_probs = stacked(list(world.generate(together, actions[:, 5:9], **pair)))
    for number in range(3):
        alone = world.encode_prefix(tokens[number, :6], actions[number, :5], valid[number])
        future = actions[number, 5:9]
        expected = stacked(list(world.generate(alone, future, **pair, first_draw=2 * number)))
        own = slice(2 * number, 2 * number + 2)
        assert torch.equal(tokens_together[own], expected[0])
        torch.testing.assert_close(log_probs[own], expected[1], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="2 branches of 3 contexts"):
        next(world.generate(together, actions[:2, 5:9]))


def test_every_context_has_its_own_draws(world: WorldModel) -> None:
    """The clips of an evaluation must not share draws; branches of one context must."""
    tokens, actions, _ = turning_drive(8, 0)
    plans = np.repeat(actions[None, 3:7], 3, axis=0)
    alike = world.encode_prefix(np.stack([tokens[:4]] * 3), np.stack([actions[:3]] * 3))
    apart, _ = stacked(list(world.generate(alike, plans, samples=2)))
    assert len({future.numpy().tobytes() for future in apart}) == 6
    single = world.encode_prefix(tokens[:4], actions[:3])
    shared, _ = stacked(list(world.generate(single, plans, samples=2)))
    assert torch.equal(shared, shared[:2].repeat(3, 1, 1, 1))
    assert torch.equal(shared[:2], apart[:2])
    later, _ = stacked(list(world.generate(single, plans[0], samples=2, first_draw=4)))
    assert torch.equal(later, apart[4:])


def test_an_action_that_is_nan_is_unknown(world: WorldModel) -> None:
    """In contexts, in futures, and when frames are sampled one by one."""
    tokens, actions, valid = turning_drive(9, 0)
    valid = valid.copy()
    valid[1, 0] = valid[2] = valid[5, 1] = valid[7] = False
    nan = np.where(valid, actions, np.nan)
    expected_prefix = world.encode_prefix(tokens[:4], actions[:3], valid[:3])
    expected = stacked(list(world.generate(expected_prefix, actions[3:8], valid[3:8])))
    prefix = world.encode_prefix(tokens[:4], nan[:3])
    generated = stacked(list(world.generate(prefix, nan[3:8])))
    session = world.drive(prefix)
    stepped = stacked([session.step(nan[t]) for t in range(3, 8)])
    for own_tokens, log_probs in (generated, stepped):
        assert torch.equal(own_tokens, expected[0])
        assert torch.equal(log_probs, expected[1])


@pytest.mark.parametrize("value", [np.inf, -np.inf])
def test_an_infinite_action_is_refused_if_it_is_valid(world: WorldModel, value: float) -> None:
    tokens, actions, valid = turning_drive(6, 0)
    actions, valid = actions.copy(), valid.copy()
    actions[1, 1] = value
    with pytest.raises(DriveSimError, match=rf"past_actions\[1, 1\] is {value}"):
        world.encode_prefix(tokens[:4], actions[:3])
    prefix = world.encode_prefix(tokens[:1], actions[:0])
    with pytest.raises(DriveSimError, match=rf"actions\[0, 1, 1\] is {value}.*NaN"):
        next(world.generate(prefix, actions[None]))
    valid[1, 1] = False
    next(world.generate(prefix, actions, valid))


def test_generating_leaves_inference_mode_between_frames(world: WorldModel) -> None:
    prefix = world.encode_prefix(np.zeros((2, ROWS, COLS), np.int64), np.zeros((1, 2)))
    for _ in world.generate(prefix, np.zeros((2, 2))):
        assert not torch.is_inference_mode_enabled()
        assert torch.ones(1, requires_grad=True).mul(2).requires_grad


def test_tokens_that_do_not_fit_are_refused(world: WorldModel) -> None:
    with pytest.raises(DriveSimError, match="this world model takes"):
        world.encode_prefix(np.zeros((2, ROWS, COLS + 1), np.int64), np.zeros((1, 2)))
    with pytest.raises(DriveSimError, match="below 9"):
        world.encode_prefix(np.full((2, ROWS, COLS), 9), np.zeros((1, 2)))
    with pytest.raises(DriveSimError, match="context is empty"):
        world.encode_prefix(np.zeros((0, ROWS, COLS), np.int64), np.zeros((0, 2)))
    with pytest.raises(ValueError, match="past_actions of shape"):
        world.encode_prefix(np.zeros((2, ROWS, COLS), np.int64), np.zeros((2, 2)))
    prefix = world.encode_prefix(np.zeros((1, ROWS, COLS), np.int64), np.zeros((0, 2)))
    with pytest.raises(ValueError, match="actions of shape"):
        next(world.generate(prefix, np.zeros((4, 3))))


def test_a_rounded_model_is_saved_in_bf16_without_a_change(
    world: WorldModel, run: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="round the weights"):
        world.save(tmp_path / "exact", torch.bfloat16)
    rounded = world.rounded()
    assert world.fingerprint == new_world().fingerprint != rounded.fingerprint
    assert rounded.tokenizer.fingerprint == world.tokenizer.rounded().fingerprint
    assert (rounded.config, rounded.dtype) == (world.config, world.dtype)
    rounded.save(tmp_path, torch.bfloat16)
    loaded = WorldModel.from_run(tmp_path, "cpu", "fp32")
    assert loaded.fingerprint == rounded.fingerprint
    for name, value in loaded.transformer.state_dict().items():
        assert torch.equal(value, rounded.transformer.state_dict()[name])
    for name in ("model.safetensors", "tokenizer/model.safetensors"):
        assert (tmp_path / name).stat().st_size < 0.6 * (run / name).stat().st_size
    context = np.zeros((2, ROWS, COLS), np.int64), np.zeros((1, 2))
    futures = [
        next(model.generate(model.encode_prefix(*context), np.zeros((1, 2))))
        for model in (loaded, rounded)
    ]
    assert torch.equal(futures[0].log_probs, futures[1].log_probs)


def test_a_packaged_model_is_found_by_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "MODELS", tmp_path)
    shutil.copytree(run, tmp_path / "town")
    assert WorldModel.from_run("town").fingerprint == WorldModel.from_run(run).fingerprint
    with pytest.raises(DriveSimError, match=r"holds no world model .* packaged model \(town\)$"):
        WorldModel.from_run("no-such-model")


def test_a_folder_that_is_not_intact_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="holds no world model"):
        WorldModel.from_run(tmp_path)
    world = new_world()
    world.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    weights = load_file(run / "model.safetensors")
    with safe_open(run / "model.safetensors", "pt") as file:
        prints = file.metadata()

    weights["row_place"] = weights["row_place"] + 1
    save_file(weights, tmp_path / "model.safetensors", prints)
    with pytest.raises(DriveSimError, match="fingerprint"):
        WorldModel.from_run(tmp_path)

    del weights["row_place"]
    save_file(weights, tmp_path / "model.safetensors", prints)
    with pytest.raises(DriveSimError, match="not this world model's weights"):
        WorldModel.from_run(tmp_path)

    shutil.copy(run / "model.safetensors", tmp_path)
    WorldModel.from_run(tmp_path)
    tiny_tokenizer(seed=1).save(tmp_path / "tokenizer")
    with pytest.raises(DriveSimError, match="not the tokenizer"):
        WorldModel.from_run(tmp_path)

    config["config"]["model"]["depth"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DriveSimError, match="unknown key 'depth'"):
        WorldModel.from_run(tmp_path)


def test_a_tokenizer_given_as_a_world_model_is_named_and_the_reverse(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(DriveSimError) as caught:
        Tokenizer.from_run(run)
    assert str(caught.value) == (
        f"{run} is a world model, not a tokenizer; its tokenizer is {run / 'tokenizer'}"
    )
    with pytest.raises(DriveSimError) as caught:
        WorldModel.from_run(run / "tokenizer")
    assert str(caught.value) == (
        f"{run / 'tokenizer'} is a tokenizer, not a world model; its world model is {run}"
    )
    tiny_tokenizer().save(tmp_path / "alone")
    with pytest.raises(DriveSimError, match=r"alone is a tokenizer, not a world model; name the "):
        WorldModel.from_run(tmp_path / "alone")
    for load in (Tokenizer.from_run, WorldModel.from_run):
        with pytest.raises(DriveSimError, match="holds no"):
            load(run / "config.json")
