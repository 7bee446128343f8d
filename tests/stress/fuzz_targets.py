"""The targets of the fuzzer: each one damages valid inputs and passes them to their readers."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from driving_sim.data.actions.action_file import read_action_file, write_action_file
from driving_sim.data.actions.alignment import align
from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import Drive, sample
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic.true_future import load_synthetic_drive
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.data.tokens.store import TokenStore
from driving_sim.data.tokens.windows import sequential_windows
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.config import load_json, resolve, to_dict
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.actions.inverse_dynamics import InverseDynamics, ProbeSource, _Network
from driving_sim.scaling.report import fit_runs, scale
from driving_sim.scaling.run import read_run
from driving_sim.tokenizer import Tokenizer
from driving_sim.tokenizer import presets as tokenizer_presets
from driving_sim.world_model import WorldModel
from driving_sim.world_model.action_plan import Situation, make_plans
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.training import presets as world_presets
from driving_sim.world_model.transformer import TokenGrid, Transformer, TransformerConfig
from tests.data.sources.recordings import (
    write_kitti,
    write_nuscenes_with_can_bus,
    write_picture_drives,
    write_tub_v1,
    write_tub_v2,
)
from tests.fixtures.tiny_training import EXPORTED, tiny_train
from tests.fixtures.token_drives import (
    COLS,
    FPS,
    LEVELS,
    ROWS,
    tiny_tokenizer,
    turning_drive,
    write_store,
)
from tests.stress import mutations

Attempt = Callable[[random.Random, Path], None]
"""Function of a random generator and a folder. It writes a damaged input there and reads it."""

_SEPARATORS = {".csv": ",\n", ".txt": " \n", ".catalog": " ,\n"}
QUIET = {"x265-params": "log-level=error"}
SIZE = FrameSize(height=16, width=32)
CSV = "timestamp_s,speed_mps,road_wheel_rad,note\n" + "".join(
    f"{n / 10:.1f},{5 + n / 9:.3f},{(n % 7 - 3) / 40:.4f},x\n" for n in range(20)
)
_ROWS = [(n, 5 + n / 9, (n % 7 - 3) / 40) for n in range(20)]
CSVS = (
    CSV,
    "sep=;\nt;speed_kmh;steering_deg\n"
    + "".join(f"{n / 10};{v};{100 * s}\n" for n, v, s in _ROWS).replace(".", ","),
    "time\tSpeed (km/h)\tangle\n" + "".join(f"{n / 10}\t{v}\t{s}\n" for n, v, s in _ROWS),
    "timestamp_ms,speed,road_wheel_rad\n"
    + "".join(f"{1.7e12 + 100 * n:.0f},{v if n % 5 == 0 else ''},{s}\n" for n, v, s in _ROWS),
    "frame,speed_mps,steering_deg\n"
    + "".join(f"{n},{v},{(20 * n + 180) % 360 - 180}\n" for n, v, _ in _ROWS),
)
READINGS = (
    Reading(steering_kind="road_wheel"),
    Reading(),
    Reading(speed="Speed (km/h)", speed_unit="kmh", steering="angle", steering_kind="curvature"),
    Reading(steering="ANGLE", steering_unit="deg", steering_kind="steering_wheel", time_offset=0.3),
)
RECORDING_READINGS = (
    Reading(),
    Reading(video_fps=10),
    Reading(steering_kind="curvature", time_offset=0.3),
)
SCRIPTS = (
    "speed=8 steer=0.1 for 2s; steer=0 for 1s",
    "accel=-4 for 1.5s;speed=3",
    "straight",
    "left",
    "steer=-0.02 for 0.3s; speed=9 steer=0.2 for 0.1s; accel=2 for 3s; steer=0",
    "recorded",
    "way.csv",
)
SITUATION = Situation(
    fps=10.0,
    steering_kind="road_wheel",
    steering_limit=0.2,
    known_channels=(True, True),
    last_action=np.array([6.0, 0.05], np.float32),
    last_valid=np.array([True, True]),
    recorded=None,
)


def _damage(rng: random.Random, source: Path, work: Path) -> Path:
    """Copy a folder, and damage a random file of the copy in a way that suits its type."""
    copied = Path(shutil.copytree(source, work / source.name))
    files = sorted(path for path in copied.rglob("*") if path.is_file())
    path = rng.choice(files)
    data = path.read_bytes()
    if rng.random() < 0.03:
        path.unlink()
    elif path.suffix == ".json" and _is_json(data):
        path.write_bytes(mutations.changed_json_text(rng, data))
    elif path.suffix == ".safetensors":
        path.write_bytes(mutations.changed_safetensors(rng, data))
    elif path.suffix in _SEPARATORS and rng.random() < 0.7:
        text = mutations.changed_text(
            rng, data.decode("utf-8", "replace"), _SEPARATORS[path.suffix]
        )
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(mutations.changed_bytes(rng, data))
    return copied


def _is_json(data: bytes) -> bool:
    """Return whether bytes are one JSON value: other JSON files have one in each line."""
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def use_csv(path: Path, work: Path, reading: Reading = READINGS[0]) -> None:
    """Read an action file, align it with frames, and write the actions to another file."""
    frame_times = np.arange(20) / 10
    log = read_action_file(path, reading, frame_times=frame_times)
    if any("\n" in line or not line.isprintable() for line in log.notices):
        raise AssertionError(f"a notice is not one printable line: {log.notices}")
    actions, valid = align(log, frame_times)
    if not (np.isfinite(actions[valid]).all() and actions.shape == valid.shape == (20, 2)):
        raise AssertionError("valid actions are not finite, or have the wrong shape")
    write_action_file(work / "again.csv", frame_times, actions, "road_wheel")


def csv_target(folder: Path) -> Attempt:
    """Fuzz action files."""

    def attempt(rng: random.Random, work: Path) -> None:
        path = work / "a.csv"
        original = rng.choice(CSVS)
        if rng.random() < 0.5:
            path.write_bytes(mutations.changed_bytes(rng, original.encode()))
        else:
            text = mutations.changed_text(rng, original, separators=",;\t\n")
            path.write_bytes(text.encode("utf-8", "surrogatepass"))
        use_csv(path, work, rng.choice(READINGS))

    return attempt


def use_script(script: str) -> None:
    """Make an action plan from an argument of `--actions`."""
    (plan,) = make_plans([script], SITUATION)
    if not np.isfinite(plan.actions).all():
        raise AssertionError("actions are not finite")


def script_target(folder: Path) -> Attempt:
    """Fuzz the arguments of `--actions`: scripts, names and file names."""

    def attempt(rng: random.Random, work: Path) -> None:
        script = rng.choice(SCRIPTS)
        if rng.random() < 0.3:
            script = mutations.changed_bytes(rng, script.encode()).decode("utf-8", "replace")
        else:
            script = mutations.changed_text(rng, script, separators=" =;s")
        use_script(script)

    return attempt


def config_target(folder: Path) -> Attempt:
    """Fuzz config files and `--set` assignments, which change the presets of both models."""
    configs: list[Any] = [tokenizer_presets.PRESETS["tiny"], world_presets.PRESETS["tiny"]]

    def attempt(rng: random.Random, work: Path) -> None:
        config = rng.choice(configs)
        values = to_dict(config)
        path = work / "c.yaml"
        text = yaml.safe_dump(values, sort_keys=False)
        kind = rng.randrange(4)
        if kind == 0:
            path.write_bytes(mutations.changed_bytes(rng, text.encode()))
        elif kind == 1:
            path.write_text(json.dumps(mutations.changed_json(rng, values)))
        elif kind == 2:
            changed = mutations.changed_text(rng, text, separators=" :\n")
            path.write_bytes(changed.encode("utf-8", "surrogatepass"))
        else:
            path.write_bytes(mutations.changed_json_text(rng, json.dumps(values).encode()))
        if kind == 2 and rng.random() < 0.5:
            lines = path.read_text("utf-8", "replace").splitlines()
            resolve(config, assignments=[line.replace(": ", "=") for line in lines[:5]])
        resolve(config, file=path)
        if kind == 3:
            load_json(path)

    return attempt


def _use_drives(paths: list[Path], reading: Reading = RECORDING_READINGS[0]) -> None:
    source = find_drives(paths, reading)
    for drive in source.drives:
        _use_drive(drive)
    if source.skipped:
        raise DriveSimError(source.skipped[0].reason)


def _use_drive(drive: Drive) -> None:
    for line in drive.notices:
        if not line.isprintable():
            raise AssertionError(f"a notice is not one printable line: {line!r}")
    sampled = sample(drive)
    count = len(drive.timestamps)
    drive.frames([0, count - 1, count // 2], SIZE)
    for frame, _ in zip(drive.stream(SIZE), range(30), strict=False):
        if frame.shape != (SIZE.height, SIZE.width, 3):
            raise AssertionError(f"a frame has shape {frame.shape}")
    if not np.isfinite(sampled.actions).all():
        raise AssertionError("actions are not finite")


def udacity_target(folder: Path) -> Attempt:
    """Fuzz recordings of the Udacity simulator."""
    recording = folder / "recording"
    (recording / "IMG").mkdir(parents=True)
    names = [f"center_2020_01_01_10_00_0{n // 10}_{n % 10}00.jpg" for n in range(12)]
    rows = [f"C:\\car\\IMG\\{name},l,r,{n / 100},0.5,0,{n}" for n, name in enumerate(names)]
    for number, name in enumerate(names):
        Image.new("RGB", (48, 24), (20 * number, 90, 30)).save(recording / "IMG" / name)
    (recording / "driving_log.csv").write_text("\n".join(rows) + "\n")

    def attempt(rng: random.Random, work: Path) -> None:
        if rng.random() < 0.5:
            _use_drives([_damage(rng, recording, work)])
            return
        copied = Path(shutil.copytree(recording, work / "recording"))
        log = copied / "driving_log.csv"
        text = mutations.changed_text(rng, log.read_text(), separators=",\n\\_")
        log.write_bytes(text.encode("utf-8", "surrogatepass"))
        _use_drives([copied])

    return attempt


def _recording_target(write: Callable[[Path], None]) -> Callable[[Path], Attempt]:
    """Return a target that damages a few files of a recording, which `write` writes."""

    def target(folder: Path) -> Attempt:
        write(folder / "recording")

        def attempt(rng: random.Random, work: Path) -> None:
            copied = folder / "recording"
            for number in range(rng.choice((1, 1, 1, 3))):
                (work / str(number)).mkdir()
                copied = _damage(rng, copied, work / str(number))
            _use_drives([copied], rng.choice(RECORDING_READINGS))

        return attempt

    return target


def video_target(folder: Path) -> Attempt:
    """Fuzz videos in several containers, which the decoder processes read."""
    videos = _small_videos(folder)

    def attempt(rng: random.Random, work: Path) -> None:
        source = rng.choice(videos)
        path = work / source.name
        path.write_bytes(mutations.changed_bytes(rng, source.read_bytes()))
        _use_drives([path])

    return attempt


def _small_videos(folder: Path) -> list[Path]:
    from tests.fixtures.video_files import write_numbered

    return [
        write_numbered(folder / "a.mp4", count=12),
        write_numbered(folder / "b.mkv", count=12),
        write_numbered(folder / "c.ts", count=12),
        write_numbered(folder / "d.webm", count=6, codec="libvpx-vp9"),
        write_numbered(folder / "e.mp4", count=6, codec="libx265", codec_options=QUIET),
    ]


def comma2k19_target(folder: Path) -> Attempt:
    """Fuzz segments of comma2k19: NumPy arrays beside a raw video."""
    from tests.fixtures.video_files import write_numbered

    segment = folder / "segment"
    can = segment / "processed_log" / "CAN"
    times = np.arange(8) / 20 + 1000.0
    arrays = {segment / "global_pose" / "frame_times": times}
    for name in ("speed", "steering_angle"):
        arrays[can / name / "t"] = times
        arrays[can / name / "value"] = np.linspace(0, 9, 8)[:, None]
    for path, array in arrays.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.save(file, array)
    write_numbered(
        segment / "video.hevc", count=8, codec="libx265", codec_options=QUIET, container="hevc"
    )

    def attempt(rng: random.Random, work: Path) -> None:
        copied = Path(shutil.copytree(segment, work / "segment"))
        path = copied / rng.choice(sorted(arrays)).relative_to(segment)
        path.write_bytes(_changed_array(rng, path.read_bytes()))
        _use_drives([copied])

    return attempt


def _changed_array(rng: random.Random, data: bytes) -> bytes:
    if rng.random() < 0.4:
        return mutations.changed_bytes(rng, data)
    words = (b"<f8", b"False", b"(8,", b"descr", b"fortran_order", b"shape", b"{", b")")
    shapes = (
        b"(999999999999,",
        b"(-1,",
        b"(0,",
        b"((((((",
        b"(2**99,",
        b"O",
        b"|O",
        b"<M8[s]",
        b"V8",
    )
    return data.replace(rng.choice(words), rng.choice(shapes), 1)


def store_target(folder: Path) -> Attempt:
    """Fuzz token stores, which are opened and read as a training does."""
    write_store(folder / "tokens", (12, 9, 20), gap_at=6)

    def attempt(rng: random.Random, work: Path) -> None:
        path = _damage(rng, folder / "tokens", work)
        if rng.random() < 0.5:
            _settle_sizes(path)
        store = TokenStore(path)
        for drive in store.drives:
            assert len(drive.tokens) == len(drive.timestamps) == len(drive)
        for _ in sequential_windows(store.drives, frames=3, batch_size=4):
            pass

    return attempt


def _settle_sizes(store: Path) -> None:
    """Write the actual sizes of the shards into the index.

    Otherwise drivesim would refuse most damaged stores because of the sizes, before other checks.
    """
    try:
        index = json.loads((store / "index.json").read_bytes())
        for number, shard in enumerate(index["shards"]):
            shard["bytes"] = (store / f"shard-{number:05d}.safetensors").stat().st_size
        (store / "index.json").write_text(json.dumps(index))
    except (ValueError, TypeError, KeyError, OSError, RecursionError):
        pass


def tokenizer_target(folder: Path) -> Attempt:
    """Fuzz tokenizer folders."""
    tiny_tokenizer().save(folder / "tokenizer")

    def attempt(rng: random.Random, work: Path) -> None:
        tokenizer = Tokenizer.from_run(_damage(rng, folder / "tokenizer", work), "cpu")
        tokenizer.decode(np.zeros((1, tokenizer.rows, tokenizer.cols), np.int64))

    return attempt


def world_model_target(folder: Path) -> Attempt:
    """Fuzz run folders of world models with their tokenizers."""
    config = TransformerConfig(layers=1, width=32, heads=2, kv_heads=1, context_frames=3)
    grid = TokenGrid(rows=ROWS, cols=COLS, levels=LEVELS)
    transformer = Transformer(config, grid, ActionStatistics())
    world = WorldModel(transformer, tiny_tokenizer(), fps=FPS, steering_kind="road_wheel")
    world.save(folder / "run")
    tokens, actions, _ = turning_drive(4, 0)

    def attempt(rng: random.Random, work: Path) -> None:
        loaded = WorldModel.from_run(_damage(rng, folder / "run", work), "cpu", "fp32")
        prefix = loaded.encode_prefix(tokens[:3], actions[:2])
        list(loaded.generate(prefix, actions[2:3]))

    return attempt


def probe_target(folder: Path) -> Attempt:
    """Fuzz files of inverse-dynamics probes."""
    source = ProbeSource(fps=FPS, steering_kind="road_wheel", drives=("a",))
    (folder / "probe").mkdir()
    content = InverseDynamics(_Network(), source).to_bytes()
    (folder / "probe" / "probe.safetensors").write_bytes(content)

    def attempt(rng: random.Random, work: Path) -> None:
        path = _damage(rng, folder / "probe", work) / "probe.safetensors"
        InverseDynamics.load(path)

    return attempt


def synthetic_target(folder: Path) -> Attempt:
    """Fuzz the world files that `drivesim synth` writes beside its videos."""
    config = SyntheticConfig(height=48, width=96)
    write_synthetic_drives(folder / "made", drives=1, seconds=1.0, config=config)
    (folder / "drive").mkdir()
    shutil.copy(folder / "made" / "drive_000.json", folder / "drive")

    def attempt(rng: random.Random, work: Path) -> None:
        path = _damage(rng, folder / "drive", work) / "drive_000.json"
        load_synthetic_drive(path)

    return attempt


def checkpoint_target(folder: Path) -> Attempt:
    """Fuzz the newest checkpoint of a run; the run must resume from the one before it."""
    tiny_train(folder / "run", steps=22)
    finished = (folder / "run" / EXPORTED).read_bytes()

    def attempt(rng: random.Random, work: Path) -> None:
        run = Path(shutil.copytree(folder / "run", work / "run"))
        newest = max((run / "checkpoints").glob("step-*"))
        damaged = _damage(rng, newest, work)
        shutil.rmtree(newest)
        damaged.rename(newest)
        tiny_train(run, steps=22, resume=True)
        if (run / EXPORTED).read_bytes() != finished:
            raise AssertionError(
                "the resumed run ends with other weights than the uninterrupted run"
            )

    return attempt


def scaling_target(folder: Path) -> Attempt:
    """Fuzz finished runs to which a scaling law is fitted."""
    from tests.fixtures.scaling_runs import write_run

    runs = [
        write_run(folder / f"w{width}", width, 50 * width, layers=1) for width in (8, 12, 16, 24)
    ]
    for run in runs:
        rows = [{"step": step, "phase": "train", "batches": step} for step in (200, 400, 600)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def attempt(rng: random.Random, work: Path) -> None:
        number = rng.randrange(len(runs))
        damaged = [*runs[:number], _damage(rng, runs[number], work), *runs[number + 1 :]]
        if rng.random() < 0.1:  # rarely, because `scale` also draws, which takes most of the time
            str(scale(damaged, work / "law"))
        else:
            report = fit_runs([read_run(run) for run in damaged])
            json.dumps(report.to_dict(), allow_nan=False)

    return attempt


TARGETS: dict[str, Callable[[Path], Attempt]] = {
    "csv": csv_target,
    "script": script_target,
    "config": config_target,
    "store": store_target,
    "tokenizer": tokenizer_target,
    "world-model": world_model_target,
    "probe": probe_target,
    "synthetic": synthetic_target,
    "udacity": udacity_target,
    "comma2k19": comma2k19_target,
    "pictures": _recording_target(write_picture_drives),
    "tub-v1": _recording_target(write_tub_v1),
    "tub-v2": _recording_target(write_tub_v2),
    "kitti": _recording_target(write_kitti),
    "nuscenes": _recording_target(write_nuscenes_with_can_bus),
    "checkpoint": checkpoint_target,
    "scaling": scaling_target,
    "video": video_target,
}
"""All targets by name. A target writes a valid input into a folder and returns an `Attempt`."""
