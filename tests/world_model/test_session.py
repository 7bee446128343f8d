import gc
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from driving_sim.engine.errors import DriveSimError
from driving_sim.world_model import WorldModel
from driving_sim.world_model.sampling.draw_waves import FrameSampler
from driving_sim.world_model.sampling.sampling import Sampling
from driving_sim.world_model.session import Session
from driving_sim.world_model.transformer import TokenGrid, Transformer
from tests.fixtures.token_drives import COLS, FPS, LEVELS, ROWS, tiny_tokenizer, turning_drive
from tests.fixtures.world_models import WIDE, W, random_model

TOKENS, ACTIONS, _ = turning_drive(60, 0)
KNOWN = 24
PAST, FUTURE = ACTIONS[: KNOWN - 1], ACTIONS[KNOWN - 1 :]


@pytest.fixture(scope="module", params=["compiled", "bf16", "long", "torch"])
def world(request: pytest.FixtureRequest) -> Iterator[WorldModel]:
    """Return a world; "long" has a window of many blocks, as in real models, in bf16."""
    config = replace(WIDE, context_frames=20) if request.param == "long" else WIDE
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setenv("DRIVESIM_NATIVE", "0")
        model = random_model(config, TokenGrid(rows=ROWS, cols=COLS, levels=LEVELS))
        precision = "bf16" if request.param in ("bf16", "long") else "fp32"
        yield WorldModel(
            model, tiny_tokenizer(), fps=FPS, steering_kind="road_wheel", precision=precision
        )


def drive(world: WorldModel, **options: Any) -> Session:
    return world.drive(world.encode_prefix(TOKENS[:KNOWN], PAST), **options)


def steps(session: Session, actions: np.ndarray) -> Tensor:
    return torch.stack([session.step(action).tokens for action in actions], dim=1)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(seed=3), Sampling(temperature=0.7, guidance=2.0), Sampling(top_k=4)],
    ids=["plain", "guided", "truncated"],
)
def test_a_session_makes_the_tokens_and_pictures_of_a_rollout(
    world: WorldModel, sampling: Sampling
) -> None:
    frames = np.random.default_rng(0).integers(256, size=(KNOWN, 48, 64, 3), dtype=np.uint8)
    expected = world.rollout(frames, PAST, FUTURE[:8], samples=2, **vars_of(sampling))
    with world.drive(frames, PAST, samples=2, sampling=sampling) as session:
        for n, action in enumerate(FUTURE[:8]):
            frame = session.step(action)
            assert torch.equal(frame.tokens, expected.tokens[:, n])
            assert torch.equal(frame.tokens, session.tokens)
            assert torch.equal(frame.log_probs, expected.log_probs[:, n])
            assert np.array_equal(frame.pixels, expected.frames[:, n])
            assert np.array_equal(session.pixels, frame.pixels)
            assert frame.seconds > 0
        assert session.frame == 8


def vars_of(sampling: Sampling) -> dict[str, Any]:
    names = ("seed", "temperature", "min_p", "top_k", "top_p", "guidance")
    return {name: getattr(sampling, name) for name in names}


def test_entropy_is_that_of_the_plain_distribution(world: WorldModel) -> None:
    session = drive(world, sampling=Sampling(temperature=0.5, guidance=1.5))
    entropy = session.step(FUTURE[0]).entropy
    assert (entropy >= 0).all()
    assert (entropy <= math.log(9) + 1e-5).all()
    # The expected surprise of a token that is drawn from the plain distribution is its entropy.
    plain = drive(world, samples=400)
    frame = plain.step(FUTURE[0])
    surprise = -frame.log_probs[:, 0, 0].double()
    spread = 4 * float(surprise.std()) / math.sqrt(len(surprise))
    assert abs(float(surprise.mean()) - float(frame.entropy[0, 0, 0])) < spread
    # The first token of a frame has the same distribution in every future.
    assert torch.allclose(entropy[:, 0, 0], frame.entropy[:1, 0, 0], atol=1e-4)


def test_forks_go_on_independently(world: WorldModel) -> None:
    left, right = np.array([5.0, 0.3]), np.array([5.0, -0.3])
    turns = [[left] * 9, [right] * 9]
    alone = [steps(drive(world), np.array([*FUTURE[:5], *turn])) for turn in turns]
    session = drive(world)
    steps(session, FUTURE[:5])
    fork = session.fork()
    taken = [[], []]  # type: ignore[var-annotated]
    for n in range(9):  # alternately, so that neither may write into the other's cache
        taken[0].append(session.step(turns[0][n]).tokens)
        taken[1].append(fork.step(turns[1][n]).tokens)
    for own, expected in zip(taken, alone, strict=True):
        assert torch.equal(torch.stack(own, dim=1), expected[:, 5:])
    assert not torch.equal(alone[0], alone[1])
    fork.close()
    session.step(left)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_saved_session_is_restored_exactly(
    world: WorldModel, samples: int, guidance: float
) -> None:
    session = drive(world, samples=samples, sampling=Sampling(guidance=guidance))
    steps(session, FUTURE[: 2 * W])
    saved, before = session.save(), session.tokens.clone()
    expected = steps(session, FUTURE[2 * W : 4 * W])
    for _ in range(2):
        session.restore(saved)
        assert session.frame == 2 * W
        assert torch.equal(session.tokens, before)
        assert torch.equal(steps(session, FUTURE[2 * W : 4 * W]), expected)
    other = drive(world, samples=samples + 1)
    with pytest.raises(DriveSimError, match=f"has {samples} futures, this one {samples + 1}"):
        other.restore(saved)
    session.rewind(W / FPS)  # what came before the restored moment is remembered as well
    assert torch.equal(steps(session, FUTURE[3 * W : 4 * W]), expected[:, W:])


def test_rewinding_is_exact_wherever_it_goes(world: WorldModel) -> None:
    session = drive(world, history_s=12 / FPS)
    tokens = steps(session, FUTURE[:30])
    for back in (0, 1, W - 1, W, W + 1, 12):
        now = session.frame
        session.rewind(back / FPS)
        assert session.frame == now - back
        assert torch.equal(session.tokens, tokens[:, now - back - 1])
        if back:
            again = steps(session, FUTURE[now - back : now])
            assert torch.equal(again, tokens[:, now - back : now])
        assert session.rewindable_s == 12 / FPS
    session.rewind(5 / FPS)
    other = steps(session, FUTURE[:5])  # another turn
    assert not torch.equal(other, tokens[:, 25:])
    with pytest.raises(DriveSimError, match=r"`seconds` 2: this session can go back 1.5 s"):
        session.rewind(2)
    with pytest.raises(DriveSimError, match="go back"):
        session.rewind(-1)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_fork_can_have_several_branches(world: WorldModel, guidance: float) -> None:
    session = drive(world, samples=2, sampling=Sampling(guidance=guidance))
    steps(session, FUTURE[:6])
    left, right = FUTURE[6:9], -FUTURE[6:9]
    expected = torch.cat([steps(session.fork(), actions) for actions in (left, right)])
    branches = session.fork(2)
    assert branches.futures == 4
    both = np.stack([left, right]).repeat(2, axis=0)  # [4, 3, 2]
    drawn = [branches.step(action).tokens for action in both.swapaxes(0, 1)]
    assert torch.equal(torch.stack(drawn, dim=1), expected)
    branches.rewind(3 / FPS)
    assert branches.rewindable_s == 0
    assert session.futures == 2


def test_only_the_settings_that_are_used_count(world: WorldModel) -> None:
    session, other = drive(world), drive(world)
    steps(session, FUTURE[:4])
    steps(other, FUTURE[:4])
    for guidance in (3.0, 0.0, 1.0):
        session.sampling = Sampling(guidance=guidance)
    assert session.sampling == Sampling()
    assert torch.equal(steps(session, FUTURE[4:8]), steps(other, FUTURE[4:8]))


def test_a_saved_session_has_the_settings_of_its_moment(world: WorldModel) -> None:
    session = drive(world)
    steps(session, FUTURE[:3])
    session.sampling = Sampling(temperature=0.5)
    saved = session.save()
    expected = steps(session, FUTURE[3:6])
    session.sampling = Sampling(temperature=2.0)
    session.restore(saved)
    assert session.sampling.temperature == 0.5
    assert torch.equal(steps(session, FUTURE[3:6]), expected)


def test_a_rewind_crosses_changes_of_the_sampling(world: WorldModel) -> None:
    session = drive(world)
    first = steps(session, FUTURE[:5])
    session.sampling = Sampling(temperature=0.5, guidance=2.0, seed=9)
    steps(session, FUTURE[5:9])
    session.rewind(2 / FPS)
    assert session.sampling.seed == 9
    session.rewind(5 / FPS)
    assert session.sampling == Sampling()
    assert torch.equal(steps(session, FUTURE[2:5]), first[:, 2:5])


def test_guidance_can_begin_and_end_while_driving(world: WorldModel) -> None:
    guided, plain = drive(world), drive(world)
    steps(guided, FUTURE[:4])
    expected = steps(plain, FUTURE[:8])
    guided.sampling = Sampling(guidance=0.0)  # the model without future actions
    unknown = drive(world)
    steps(unknown, FUTURE[:4])
    blind = steps(unknown, np.full((4, 2), np.nan))
    assert torch.equal(steps(guided, FUTURE[4:8]), blind)
    assert not torch.equal(blind, expected[:, 4:])
    guided.rewind(4 / FPS)
    guided.sampling = Sampling(guidance=3.0)
    guided.sampling = Sampling()
    assert torch.equal(steps(guided, FUTURE[4:8]), expected[:, 4:])


def test_a_session_remembers_no_more_than_asked(world: WorldModel) -> None:
    session = drive(world, history_s=10 / FPS)
    counts = []
    for _ in range(100):
        session.step(FUTURE[0])
        counts.append(sum(len(segment.inputs) for segment in session._segments))
    window = world.context_frames
    assert max(counts) < 10 + 2 * window
    assert len(session._segments) <= 10 // window + 2
    without = drive(world, history_s=0)
    without.step(FUTURE[0])
    assert without.rewindable_s == 0
    assert not without._segments


def test_nan_is_unknown_and_actions_are_checked(world: WorldModel) -> None:
    unknown, hidden = drive(world), drive(world)
    nan = unknown.step([np.nan, 0.1])
    assert torch.equal(nan.log_probs, hidden.step([7.0, 0.1], [False, True]).log_probs)
    for wrong in ([1.0], np.zeros((2, 2)), np.zeros((1, 3))):
        with pytest.raises(ValueError, match=r"must be \[2\] or \[1, 2\]"):
            unknown.step(wrong)
    with pytest.raises(DriveSimError, match="inf"):
        unknown.step([np.inf, 0.0])
    both = drive(world, branches=2)
    frame = both.step([[5.0, 0.3], [5.0, -0.3]])
    assert not torch.equal(frame.log_probs[0], frame.log_probs[1])


def test_an_action_beyond_the_training_data_is_said_once(
    world: WorldModel, capsys: pytest.CaptureFixture[str]
) -> None:
    model = world.transformer
    seen = replace(model.statistics, lowest=(0.0, -0.3), highest=(9.0, 0.3))
    told = Transformer(model.config, model.grid, seen)
    told.load_state_dict(model.state_dict())
    own = WorldModel(told, world.tokenizer, fps=FPS, steering_kind="road_wheel")
    session = drive(own)
    session.step([9.0, -0.3])
    session.step([np.nan, 99.0], [False, False])
    assert capsys.readouterr() == ("", "")
    session.step([20.0, 0.1])
    session.fork().step([25.0, 0.1])
    session.step([5.0, -0.5])
    printed = "".join(capsys.readouterr())
    assert printed.count("speed 20 is beyond what the model was trained on (0 to 9)") == 1
    assert printed.count("steering -0.5 is beyond") == 1
    assert len(printed.splitlines()) == 2


def test_a_closed_session_says_so(world: WorldModel) -> None:
    with drive(world) as session:
        saved = session.save()
    for use in (
        lambda: session.step(FUTURE[0]),
        session.fork,
        session.save,
        lambda: session.restore(saved),
        lambda: session.rewind(0),
        lambda: session.tokens,
    ):
        with pytest.raises(DriveSimError, match="session has ended"):
            use()
    session.close()


def test_no_memory_for_a_fork_is_one_line(
    world: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = drive(world)

    def copy(_: FrameSampler) -> FrameSampler:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(FrameSampler, "copy", copy)
    with pytest.raises(DriveSimError, match="no room for a fork"):
        session.fork()
    monkeypatch.undo()
    session.step(FUTURE[0])


def test_500_sessions_leave_nothing_behind(world: WorldModel) -> None:
    prefix = world.encode_prefix(TOKENS[:KNOWN], PAST)
    process, gone = psutil.Process(), []
    for number in range(500):
        session = world.drive(prefix)
        steps(session, FUTURE[:2])
        fork = session.fork()
        fork.step(FUTURE[2])
        if number % 2:
            session.close()
        gone.append(weakref.ref(session._segments or session))
        gone.append(weakref.ref(fork))
        if number == 100:
            del session, fork
            gc.collect()
            before = process.memory_info().rss
    del session, fork
    gc.collect()
    assert not [reference for reference in gone if reference() is not None]
    assert process.memory_info().rss - before < 30e6


def test_draws_are_chosen_one_by_one(world: WorldModel) -> None:
    together = drive(world, samples=3, draws=[5, 0, 2**62])
    tokens = steps(together, FUTURE[:4])
    for row, draw in enumerate([5, 0, 2**62]):
        alone = steps(drive(world, first_draw=draw), FUTURE[:4])
        assert torch.equal(tokens[row], alone[0])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("driven", range(1, 2 * W + 2))
def test_a_future_begins_again_while_the_others_drive_on(
    world: WorldModel, driven: int, guidance: float
) -> None:
    sampling = Sampling(guidance=guidance)
    expected = drive(world, samples=3, sampling=sampling)
    session = drive(world, samples=3, sampling=sampling)
    both = steps(session, FUTURE[:driven]), steps(expected, FUTURE[:driven])
    assert torch.equal(*both)
    span = slice(5, 5 + 2 * world.context_frames)
    context, between = TOKENS[span], ACTIONS[span][:-1]
    session.restart([1], torch.from_numpy(context)[None], between[None], draws=[7])
    assert torch.equal(session.tokens[1], torch.from_numpy(context[-1]))
    frames, others = [], []
    for action in FUTURE[: 3 * W]:
        frames.append(session.step(action))
        others.append(expected.step(action))
    for frame, other in zip(frames, others, strict=True):
        assert torch.equal(frame.tokens[[0, 2]], other.tokens[[0, 2]])
    session.rewind(3 * W / FPS)
    assert torch.equal(session.tokens[1], torch.from_numpy(context[-1]))
    again = steps(session, FUTURE[: 3 * W])
    assert torch.equal(again, torch.stack([frame.tokens for frame in frames], dim=1))
    for _ in range(2):  # twice in a row
        session.restart([0], torch.from_numpy(context)[None], between[None], draws=[1])
    session.step(FUTURE[0])


def test_a_restarted_future_equals_one_that_was_encoded_at_that_frame(world: WorldModel) -> None:
    span = slice(5, 5 + 2 * world.context_frames)
    context, between = torch.from_numpy(TOKENS[span]), ACTIONS[span][:-1]
    session = drive(world, samples=2)
    steps(session, FUTURE[: 2 * W])
    last_frame = session._now.passes.cache.frame
    session.restart([0, 1], context.expand(2, -1, -1, -1), np.stack([between] * 2), draws=[4, 5])
    prefix = world.encode_prefix(context, between, last_frame=last_frame)
    expected = world.drive(prefix, samples=2, first_draw=4)
    restarted, alike = session.step(FUTURE[0]), expected.step(FUTURE[0])
    assert torch.equal(restarted.tokens, alike.tokens)
    torch.testing.assert_close(restarted.log_probs, alike.log_probs, atol=0.05, rtol=0)
    with pytest.raises(DriveSimError, match=f"at least {2 * (world.context_frames - 1)} frames"):
        session.restart([0], context[None, -2:], between[None, -1:], draws=[4])
    with pytest.raises(ValueError, match="2 futures, 1 contexts and 1 draws"):
        session.restart([0, 1], context[None], between[None], draws=[4])
    young = world.drive(world.encode_prefix(context[:1], between[:0]))
    with pytest.raises(DriveSimError, match="frames behind it"):
        young.restart([0], context[None], between[None], draws=[4])


def test_saving_and_changing_the_sampling_again_and_again_keeps_no_caches(
    world: WorldModel,
) -> None:
    for history_s in (0.0, 1.0):
        session = drive(world, history_s=history_s)
        saved = session.save()
        for number in range(30):
            session.restore(saved)
            session.sampling = Sampling(temperature=0.5 + number / 100)
            saved = session.save()
            session.step(FUTURE[0])
        assert len(session._segments) <= 2
        assert len(saved.past) <= 2


def test_an_interrupted_step_ends_the_session(
    world: WorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = drive(world)

    def step(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(FrameSampler, "step", step)
    with pytest.raises(KeyboardInterrupt):
        session.step(FUTURE[0])
    with pytest.raises(DriveSimError, match="has ended"):
        session.step(FUTURE[0])


@pytest.mark.parametrize("wrong", [math.inf, math.nan, -1.0])
def test_times_must_be_finite(world: WorldModel, wrong: float) -> None:
    with pytest.raises(DriveSimError, match="history_s"):
        drive(world, history_s=wrong)
    with pytest.raises(DriveSimError, match="can go back"):
        drive(world).rewind(wrong)


def test_what_a_drive_starts_from_is_checked(world: WorldModel) -> None:
    with pytest.raises(TypeError, match="not from 'noon'"):
        world.drive("noon")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a context has its own"):
        world.drive(world.encode_prefix(TOKENS[:4], ACTIONS[:3]), ACTIONS[:3])
