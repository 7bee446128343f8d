import random

import pytest

from driving_sim.data.split import MIRROR_SUFFIX, split_drives
from driving_sim.engine.errors import DriveSimError

IDS = [f"drive_{number:02d}" for number in range(20)]


def test_the_split_is_a_partition_in_the_order_given() -> None:
    train, validation = split_drives(IDS, fraction=0.25)
    assert sorted(train + validation) == IDS
    assert (train, validation) == (sorted(train), sorted(validation))
    assert len(validation) == 5


def test_it_depends_on_the_ids_and_the_seed_not_on_their_order() -> None:
    shuffled = random.Random(0).sample(IDS, len(IDS))
    assert sorted(split_drives(shuffled)[1]) == split_drives(IDS)[1]
    assert len({tuple(split_drives(IDS, seed=seed)[1]) for seed in range(10)}) > 1


@pytest.mark.parametrize("seed", range(5))
def test_a_mirrored_drive_stays_with_its_original(seed: int) -> None:
    mirrored = IDS + [name + MIRROR_SUFFIX for name in IDS]
    train, validation = split_drives(mirrored, seed=seed)
    assert split_drives(IDS, seed=seed)[1] == validation[: len(validation) // 2]
    assert {name.removesuffix(MIRROR_SUFFIX) for name in train}.isdisjoint(validation)
    assert len(validation) == 4


def test_few_drives() -> None:
    assert split_drives([]) == ([], [])
    assert split_drives(["a"]) == (["a"], [])
    for fraction in (0.01, 0.99):
        train, validation = split_drives(["a", "b"], fraction=fraction)
        assert len(train) == len(validation) == 1


def test_named_drives_validate() -> None:
    train, validation = split_drives(
        [*IDS, "drive_07" + MIRROR_SUFFIX], validation=["drive_07"], seed=3
    )
    assert validation == ["drive_07", "drive_07" + MIRROR_SUFFIX]
    assert len(train) == 19
    assert split_drives(IDS, validation=[]) == (IDS, [])
    with pytest.raises(DriveSimError, match=r"driv_07.*drive_07"):
        split_drives(IDS, validation=["driv_07"])
    with pytest.raises(DriveSimError, match="none is left"):
        split_drives(IDS[:2], validation=IDS[:2])
