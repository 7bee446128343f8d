from dataclasses import replace

import numpy as np
import pytest

from driving_sim.data.synthetic.true_future import replay
from driving_sim.engine.errors import DriveSimError
from driving_sim.play.car import Held
from driving_sim.play.drive import BRANCHES, Drive
from driving_sim.play.replay import checksum
from driving_sim.world_model.sampling.sampling import Sampling
from tests.fixtures.token_drives import FPS

LEFT = Held(wheel=1.0, throttle=1.0)


def drawn(drive: Drive, held: Held, frames: int) -> list[int]:
    """Drive on, and return the checksums of the frames' tokens."""
    for _ in range(frames):
        drive.step(held)
    return [*drive.as_replay(0).checksums[-frames:]]


def test_it_draws_the_tokens_of_a_rollout_with_the_same_actions(drive: Drive) -> None:
    sums = drawn(drive, LEFT, 6)
    steps = drive.world.generate(drive.start.context.prefix(drive.world), drive.actions)
    assert sums == [checksum(step.tokens[0]) for step in steps]


def test_it_begins_at_the_last_frame_of_the_context(drive: Drive) -> None:
    now = drive.now()
    assert now.frame == 0
    last = drive.world.tokenizer.decode(drive.start.context.tokens[-1:])[0]
    np.testing.assert_array_equal(now.pixels, last.numpy())
    recorded = drive.start.context.actions[-1]
    assert drive.car.speed_mps == pytest.approx(float(recorded[0]), abs=1e-6)


def test_going_back_and_driving_the_same_gives_the_same_frames(drive: Drive) -> None:
    drawn(drive, LEFT, 4)
    car = drive.car
    before = drawn(drive, Held(wheel=-1.0), 6)
    assert drive.rewind(6 / FPS) == 6
    assert drive.car == car
    again = drawn(drive, Held(wheel=-1.0), 6)
    assert before == again
    assert drive.as_replay(0).rewinds == ((10, 4),)


def test_it_goes_back_no_further_than_to_the_start(drive: Drive) -> None:
    drawn(drive, LEFT, 3)
    assert drive.rewind(100.0) == 3
    assert drive.frame == 0


def test_a_frame_that_is_shown_again_has_its_entropy(drive: Drive) -> None:
    moments = [drive.step(LEFT) for _ in range(5)]
    drive.rewind(2 / FPS)
    again, before = drive.now().entropy, moments[2].entropy
    assert again is not None
    assert before is not None
    np.testing.assert_array_equal(again, before)
    assert again.shape == drive.start.context.tokens.shape[1:]
    drive.rewind(100.0)
    assert drive.now().entropy is None


def test_settings_go_back_with_the_drive(drive: Drive) -> None:
    drawn(drive, LEFT, 3)
    drive.sampling = Sampling(temperature=0.5)
    drawn(drive, LEFT, 3)
    drive.rewind(2 / FPS)
    assert drive.sampling.temperature == 0.5
    drive.rewind(3 / FPS)
    assert drive.sampling.temperature == 1.0
    assert [change.frame for change in drive.as_replay(0).changes] == [0]


def test_a_plan_holds_the_wheel_until_it_ends(drive: Drive) -> None:
    drive.hand_over("speed=7 steer=0.05 for 1s")
    for _ in range(round(FPS)):
        assert drive.plan
        moment = drive.step(Held(wheel=-1.0))
        assert moment.car.action == pytest.approx([7.0, 0.05], abs=1e-6)
    assert drive.plan is None
    assert drive.step(Held(wheel=-1.0)).car.steering < 0.05


def test_a_plan_can_be_taken_back(drive: Drive) -> None:
    drive.hand_over("left")
    drive.step(Held())
    drive.hand_over(None)
    assert drive.plan is None


def test_a_wrong_plan_leaves_the_wheel_where_it_is(drive: Drive) -> None:
    drive.hand_over("left")
    with pytest.raises(DriveSimError, match="script"):
        drive.hand_over("nonsense")
    assert drive.plan == "left"


@pytest.mark.parametrize("plan", ["pyproject.toml", "/etc/passwd", "x.csv", ""])
def test_a_plan_is_never_a_file(drive: Drive, plan: str) -> None:
    with pytest.raises(DriveSimError, match="script"):
        drive.hand_over(plan)


def test_a_plan_has_a_limit(drive: Drive) -> None:
    with pytest.raises(DriveSimError, match="at most 600 s"):
        drive.hand_over("speed=3 for 86400s")


def test_nothing_recorded_follows_a_context_that_ends(drive: Drive) -> None:
    assert not drive.start.has_recording
    with pytest.raises(DriveSimError, match="recorded"):
        drive.hand_over("recorded")


def test_an_unknown_start_is_refused(drive: Drive) -> None:
    drawn(drive, LEFT, 2)
    with pytest.raises(DriveSimError, match="choose one of a, b"):
        drive.find("c")
    assert drive.frame == 2  # the drive goes on


class TestPossibilities:
    """What would follow from left, straight and right."""

    def test_they_branch_off_the_current_moment(self, drive: Drive) -> None:
        drawn(drive, LEFT, 5)
        shown = list(drive.possibilities())
        assert [possibility.step for possibility in shown] == list(range(1, len(shown) + 1))
        left, straight, right = shown[0].actions[:, 1]
        assert left == -right > straight == 0
        for branch in range(len(BRANCHES)):
            fork = drive._session.fork()
            for possibility in shown[:4]:
                frame = fork.step(possibility.actions[branch])
                np.testing.assert_array_equal(possibility.pixels[branch], frame.pixels[0])

    def test_they_do_not_change_the_drive(self, drive: Drive) -> None:
        twin = Drive(drive.world, "town", drive.starts)
        drawn(drive, LEFT, 3)
        drawn(twin, LEFT, 3)
        list(drive.possibilities())
        following = zip(drawn(drive, LEFT, 3), drawn(twin, LEFT, 3), strict=True)
        assert all(a == b for a, b in following)

    def test_the_truth_is_what_the_simulator_draws(self, drive: Drive) -> None:
        drawn(drive, LEFT, 4)
        shown = list(drive.possibilities())
        truth = drive.start.truth
        assert truth is not None
        for branch, action in enumerate(shown[0].actions):
            driven = np.concatenate([drive.actions, np.tile(action, (len(shown), 1))])
            expected = replay(truth.world, truth.state, driven)[-len(shown) :]
            for possibility, frame in zip(shown, expected, strict=True):
                assert possibility.truths is not None
                np.testing.assert_array_equal(possibility.truths[branch], frame)

    def test_without_a_simulator_there_is_no_truth(self, drive: Drive) -> None:
        drive.start = replace(drive.start, truth=None)
        assert next(drive.possibilities()).truths is None
