"""`python -m benchmarks.video_rates`: what one core probes and decodes of H.264 at 1080p.

Makes a moving picture with noise, near the 8 Mbit/s of a dashcam, and reads it with one thread: its
packets alone, as `probe` does for every file before the first frame is used; then every frame,
resized to the tokenizer's 256 x 512, as all sources of frames do.
"""

import tempfile
import time
from pathlib import Path

import av
import numpy as np

from driving_sim.data.probe import probe

HEIGHT, WIDTH, FPS, SECONDS = 1080, 1920, 30, 6
_BIT_RATE = 8_000_000


def write_video(path: Path) -> None:
    """A noisy picture that moves sideways."""
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(30, 226, (68, 160, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=FPS, options={"preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.bit_rate, stream.gop_size = _BIT_RATE, 2 * FPS
        for number in range(FPS * SECONDS):
            shown = np.ascontiguousarray(picture[:HEIGHT, 4 * number % 640 :][:, :WIDTH])
            noise = rng.integers(0, 12, (HEIGHT, WIDTH, 1), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown + noise)))
        container.mux(stream.encode())


def decode_seconds(path: Path) -> float:
    """Processor seconds for all frames, decoded and resized by one thread."""
    start = time.process_time()
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        for frame in container.decode(stream):
            frame.reformat(512, 256, "rgb24", threads=1).to_ndarray()
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    frames = FPS * SECONDS
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "drive.mp4"
        write_video(path)
        rate = path.stat().st_size * 8 / SECONDS / 1e6
        print(f"{WIDTH}x{HEIGHT} H.264, {frames} frames at {FPS}/s, {rate:.1f} Mbit/s")
        probe(path)  # the first one also loads libraries
        start = time.process_time()
        probe(path)
        print(f"probe: {time.process_time() - start:.3f} s")
        print(f"decode and resize: {frames / decode_seconds(path):.0f} frames/s and core")


if __name__ == "__main__":
    main()
