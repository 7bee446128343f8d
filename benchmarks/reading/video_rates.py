"""`python -m benchmarks.reading.video_rates`: how fast one core demuxes and decodes 1080p H.264.

Makes a video of a moving picture with noise, at about the 8 Mbit/s of a dashcam. First, a decoder
process reads only the video's packets, as `read_facts` does with every file before drivesim uses
the first frame. It also reads the packets of a video ten times as long. The two times give the cost
per file and the cost per packet. Then one thread decodes every frame of the video and resizes it to
256 x 512, the size that the tokenizer takes. drivesim reads the frames of all videos this way.
"""

import resource
import tempfile
import time
from pathlib import Path

import av
import numpy as np

from driving_sim.data.video.decoder_pool import end_all, read_facts

HEIGHT, WIDTH, FPS, SECONDS = 1080, 1920, 30, 6
_BIT_RATE = 8_000_000
_TIMES = 10
"""Length of the long video, as a multiple of the short video's."""
_REPEATS = 10


def write_video(path: Path) -> None:
    """Write a video of a noisy picture that moves sideways."""
    rng = np.random.default_rng(0)
    picture = np.kron(rng.integers(30, 226, (68, 160, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=FPS, options={"preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        stream.bit_rate, stream.gop_size = _BIT_RATE, 2 * FPS
        for number in range(FPS * SECONDS):
            view = np.ascontiguousarray(picture[:HEIGHT, 4 * number % 640 :][:, :WIDTH])
            noise = rng.integers(0, 12, (HEIGHT, WIDTH, 1), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view + noise)))
        container.mux(stream.encode())


def write_longer(source: Path, path: Path) -> None:
    """Write a video that repeats all frames of `source` `_TIMES` times."""
    with av.open(str(path), "w") as container:
        stream = None
        for number in range(_TIMES):
            with av.open(str(source)) as short:
                video = short.streams.video[0]
                stream = stream or container.add_stream_from_template(video)
                assert video.time_base is not None
                shift = round(number * SECONDS / video.time_base)
                for packet in short.demux(video):
                    if packet.dts is not None and packet.pts is not None:
                        packet.dts, packet.pts = packet.dts + shift, packet.pts + shift
                        packet.stream = stream
                        container.mux(packet)


def facts_seconds(path: Path) -> float:
    """Return the processor seconds in which a running decoder process reads the facts of a file."""

    def taken(repeats: int) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        for _ in range(repeats):
            read_facts(path)
        end_all()  # the system reports the time of child processes only after they end
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    return (taken(1 + _REPEATS) - taken(1)) / _REPEATS


def decode_seconds(path: Path) -> float:
    """Return the processor seconds in which one thread decodes and resizes all frames."""
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
        path, longer = Path(folder) / "drive.mp4", Path(folder) / "longer.mp4"
        write_video(path)
        write_longer(path, longer)
        rate = path.stat().st_size * 8 / SECONDS / 1e6
        print(f"{WIDTH}x{HEIGHT} H.264, {frames} frames at {FPS}/s, {rate:.1f} Mbit/s")
        short, long = facts_seconds(path), facts_seconds(longer)
        a_packet = (long - short) / ((_TIMES - 1) * frames)
        print(
            f"facts: {short:.3f} s for {frames} frames, {long:.3f} s for {_TIMES * frames} frames"
        )
        a_file = short - frames * a_packet
        print(f"facts: {a_file:.3f} s per file + {a_packet * 1e6:.1f} µs per packet")
        print(f"decode and resize: {frames / decode_seconds(path):.0f} frames/s per core")


if __name__ == "__main__":
    main()
