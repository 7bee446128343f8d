from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from driving_sim.data.tokens.store import DriveTokens
from driving_sim.evaluate.footage import first_frames
from driving_sim.evaluate.likelihood import coding as entropy_coding
from driving_sim.evaluate.likelihood.coding import Words, coder_weights, evaluate_coding
from driving_sim.world_model.training.bits import streamed_bits_per_token
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.token_drives import COLS, FPS, ROWS, write_store
from tests.fixtures.world_models import W, new_world

FRAMES, GAP = 60, 40
WORD = 32  # Bits in a word. The coder fills up the last word, and may need one more.
HEADER = 8 * (4 + 4 + 8 + 4 + 4 + 2 * 4)
Coded = tuple[Words, float]
compress = partial(entropy_coding.compress, advance=lambda frames: None)
decompress = partial(entropy_coding.decompress, advance=lambda frames: None)


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


@pytest.fixture(scope="module")
def drive(world: WorldModel, tmp_path_factory: pytest.TempPathFactory) -> DriveTokens:
    out = tmp_path_factory.mktemp("coding") / "tokens"
    fingerprint = world.tokenizer.fingerprint
    return write_store(out, [FRAMES], fingerprint=fingerprint, gap_at=GAP).drives[0]


@pytest.fixture(scope="module")
def coded(world: WorldModel, drive: DriveTokens) -> Coded:
    return compress(world, drive)


def test_frequencies_cover_every_code_and_lose_almost_no_bits() -> None:
    torch.manual_seed(0)
    for codes, spread in ((9, 1.0), (1000, 4.0), (15_360, 4.0), (9, 1e5)):
        logits = torch.randn(64, codes) * spread
        assert coder_weights(logits).dtype == np.float32
        frequencies = 1 + coder_weights(logits).astype(np.int64)
        assert frequencies.min() >= 1
        assert (frequencies.sum(-1) == 2**24).all()
        log_probs = logits.double().log_softmax(-1).numpy()
        probs = np.exp(log_probs)
        coded = (probs * (24 - np.log2(frequencies))).sum(-1)
        claimed = -(probs * log_probs / np.log(2)).sum(-1)
        assert coded == pytest.approx(claimed, abs=2e-3)


def test_the_coder_uses_these_weights(
    world: WorldModel, drive: DriveTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The made-up weights are so unlike the model's that the size shows which were used."""
    rng = np.random.default_rng(0)
    cuts = np.sort(rng.choice(np.arange(1, 40), size=8, replace=False))
    rare = np.diff(cuts, prepend=0, append=2**24)
    weights = (rare - 1).astype(np.float32)
    monkeypatch.setattr(
        entropy_coding, "coder_weights", lambda logits: np.tile(weights, (len(logits), 1))
    )
    words, _ = compress(world, drive)
    expected = (24 - np.log2(rare))[drive.tokens].sum()
    assert expected > 10_000
    assert expected <= WORD * len(words) <= expected + 2 * WORD
    assert np.array_equal(decompress(world, drive, words), drive.tokens)


def test_decoding_returns_the_original_tokens(
    world: WorldModel, drive: DriveTokens, coded: Coded
) -> None:
    assert len(drive.entry.segments) == 2
    assert min(end - begin for begin, end in drive.entry.segments) > 2 * W
    words, _ = coded
    decoded = decompress(world, drive, words)
    assert decoded.dtype == np.int64
    assert np.array_equal(decoded, drive.tokens)
    assert np.array_equal(words, compress(world, drive)[0])


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_decoding_needs_the_number_format_of_the_encoder(
    world: WorldModel, drive: DriveTokens, coded: Coded
) -> None:
    low = WorldModel(
        world.transformer,
        world.tokenizer,
        fps=FPS,
        steering_kind="road_wheel",
        precision="bf16",
    )
    assert evaluate_coding(low, drive, seconds=2 * W / FPS).metrics["exact"]
    assert not np.array_equal(decompress(low, drive, coded[0]), drive.tokens)


def test_the_size_is_what_the_model_claims(
    world: WorldModel, drive: DriveTokens, coded: Coded
) -> None:
    words, model_bits = coded
    assert model_bits <= WORD * len(words) <= model_bits * 1.01 + 2 * WORD
    streamed = streamed_bits_per_token(world.transformer, [drive])
    assert model_bits / drive.tokens.size == pytest.approx(streamed.mean, rel=1e-4)
    metrics = evaluate_coding(world, drive, seconds=FRAMES / FPS).metrics
    assert metrics["header_bits"] == HEADER
    size = metrics["coded_bits_per_token"] * drive.tokens.size
    assert size == pytest.approx(HEADER + WORD * len(words))


@pytest.mark.parametrize("frames", [1, GAP, GAP + 1])
def test_the_beginning_of_a_drive_can_be_coded(
    world: WorldModel, drive: DriveTokens, frames: int
) -> None:
    metrics = evaluate_coding(world, drive, seconds=frames / FPS).metrics
    streamed = streamed_bits_per_token(world.transformer, [drive]).bits[:frames]
    assert metrics["exact"] is True
    assert metrics["frames"] == frames
    assert metrics["tokens"] == frames * ROWS * COLS
    assert metrics["model_bits_per_token"] == pytest.approx(streamed.mean(), rel=1e-4)
    assert metrics["raw_bits_per_token"] == pytest.approx(np.log2(9))
    assert metrics["ratio"] == pytest.approx(
        metrics["coded_bits_per_token"] / metrics["model_bits_per_token"]
    )


def test_logits_that_differ_between_encoder_and_decoder_are_noticed(
    world: WorldModel, drive: DriveTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def drifting(logits: torch.Tensor) -> np.ndarray:
        nonlocal calls
        calls += 1
        return coder_weights(logits * (1 + 1e-3 * calls))

    monkeypatch.setattr(entropy_coding, "coder_weights", drifting)
    assert evaluate_coding(world, drive, seconds=8 / FPS).metrics["exact"] is False


def test_decoding_fails_with_damaged_words_or_another_model_or_other_actions(
    world: WorldModel, drive: DriveTokens
) -> None:
    drive = first_frames(drive, 12)
    words, _ = compress(world, drive)
    model = new_world().transformer
    model.row_place.data += 1e-3
    other_world = WorldModel(model, new_world().tokenizer, fps=FPS, steering_kind="road_wheel")
    without_actions = replace(drive, channels=(False, False))
    for arguments in (
        (world, drive, words ^ (np.arange(len(words)) == len(words) // 2)),
        (world, drive, words[:-1]),
        (world, drive, words[:0]),
        (other_world, drive, words),
        (world, without_actions, words),
    ):
        assert not np.array_equal(decompress(*arguments), drive.tokens)


def test_the_report_says_whether_the_check_passed(
    world: WorldModel, drive: DriveTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header does not count: in a file of so short a drive it takes more than 1 %."""
    section = evaluate_coding(world, drive, seconds=4.0)
    metrics = section.metrics
    assert metrics["frames"] == round(4 * FPS)
    claimed = streamed_bits_per_token(world.transformer, [drive]).bits[: round(4 * FPS)].mean()
    assert metrics["claimed_bits_per_token"] == pytest.approx(claimed)
    assert metrics["ratio_to_claimed"] > 1.01
    assert metrics["exact"] is True
    assert metrics["proved"] is True
    assert "passed" in section.title
    assert "The check passed" in section.text
    assert "larger than claimed; the header takes" in section.text
    assert "32 of its 60 frames" in section.parts[0].caption
    monkeypatch.setattr(entropy_coding, "_CLAIM", 0.0)
    section = evaluate_coding(world, drive, seconds=4.0)
    assert section.metrics["proved"] is False
    assert "failed" in section.title
    assert "The check failed: the file is " in section.text
    calls = 0

    def drifting(logits: torch.Tensor) -> np.ndarray:
        nonlocal calls
        calls += 1
        return coder_weights(logits * (1 + 1e-3 * calls))

    monkeypatch.setattr(entropy_coding, "coder_weights", drifting)
    monkeypatch.setattr(entropy_coding, "_CLAIM", 10.0)
    section = evaluate_coding(world, drive, seconds=1.0)
    assert section.metrics["proved"] is False
    assert "the decoded tokens differ from the originals" in section.text
