"""`python -m benchmarks.training.cost`: compute the tables of docs/scaling.md.

`--write` writes them into the page. Next to each number in this file is its source, or the command
that measured it.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks import ROOT

PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = (
    "<!-- tables: python -m benchmarks.training.cost --write -->",
    "<!-- end of the tables -->",
)

# GAIA-1, arXiv 2309.17080, sections 3 and 4.
HOURS, SOURCE_FPS, FPS, FRAMES = 4_700, 25, 6.25, 26
STEPS, WINDOWS, GPUS, DAYS = 100_000, 128, 64, 15
GAIA_PARAMETERS, GAIA_WIDTH, GAIA_TOKENS, GAIA_SEQUENCE = 6.5e9, 4096, 576, 26 * (576 + 32 + 2)
TOKENIZER_FRAMES = 200_000 * 160

# Dense bf16 operations per second, from NVIDIA's data sheets of the SXM modules with 80 GB.
A100, H100 = 312e12, 989e12
NETWORK = 25e9
"""Network bandwidth of a GPU in bytes per second: 200 Gbit/s in a DGX A100 (data sheet)."""

# DECODED and the constants that begin with SCAN or INDEX were measured on one core of an AMD EPYC.
DECODED = 131.0
"""Decoded 1080p H.264 frames per second, from python -m benchmarks.reading.video_rates."""
SCAN_FILE, SCAN_FRAME = 0.16, 10e-6
"""Seconds to scan a 1080p file, plus seconds for each of its packets, from video_rates."""
SCANS_AT_ONCE = 8
"""Number of decoder processes that a rank uses to scan many files."""
INDEX_SECONDS, INDEX_MEMORY, INDEX_BYTES = 18.4e-6, 0.92e3, 276.0
"""For each drive of a token store: start-up seconds, bytes of memory, and bytes in the index.

Measured with python -m benchmarks.reading.store_index.
"""
CPU_FLOPS = 52e9
"""Operations per second of a training on two cores that other programs used as well.

The training is the largest run of python -m benchmarks.training.scaling_runs. Its operations are
6 N D (N weights, D training tokens) plus those of attention.
"""

# The following numbers were counted with torch.utils.flop_counter or derived from the code.
ENCODE, DECODE, DISCRIMINATE, PERCEIVE = 72.9e9, 69.6e9, 1.0e9, 80e9
"""Operations per frame in a forward pass: `large`'s encoder, decoder, discriminator, and VGG-16."""
ACTIVATIONS = 56
"""Bytes that are kept for the backward pass, per slot, layer and channel, with bf16 autocast.

A slot is a position in the network's input: a token, or the start of a row of tokens.
"""
LOGITS = 12
"""Peak bytes of the logits, per token and code: bf16, float32, log-softmax and gradients."""
GPU_SHARE = 0.3
"""Share of a GPU's peak rate that convolutions are assumed to reach."""
FRAME_BYTES = 512 * 2 + 8 + 8 + 2
"""Bytes of a frame in a token store: tokens, timestamp, actions, validity."""
SHARD = 512 * 2**20
PLAN_SOURCE, PLAN_CHOSEN = 16, 26
"""Bytes of memory that planning takes, per source frame and per chosen frame.

A source frame has a timestamp and a pts. A chosen frame has an index, a time, actions and validity
flags.
"""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Size of a world model, from which its cost follows."""

    layers: int = 36
    width: int = 4096
    queries_per_key: int = 4
    codes: int = 15_360
    rows: int = 16
    cols: int = 32

    @property
    def block(self) -> float:
        """Number of weights in a block: queries, keys, values, output, and the MLP's matrices."""
        return self.width**2 * (1 + 2 / self.queries_per_key + 1 + 8)

    @property
    def counted(self) -> float:
        """N, the number of weights by which every token is multiplied."""
        return self.layers * self.block + 2.25 * self.width**2 + self.codes * self.width

    @property
    def parameters(self) -> float:
        """Number of trained weights, except for a few small vectors."""
        return self.counted + 1.25 * self.codes * self.width + self.width**2

    @property
    def tokens(self) -> int:
        """Number of tokens in a window."""
        return FRAMES * self.rows * self.cols

    @property
    def slots(self) -> int:
        """Number of slots in a window: its tokens, and one more slot for each row."""
        return FRAMES * self.rows * (self.cols + 1)

    @property
    def flops_per_window(self) -> float:
        """Operations of a training step per window. Attention covers half of all pairs of slots."""
        return 6 * self.slots * (self.counted + self.layers * self.width * self.slots)

    @property
    def muon_flops(self) -> float:
        """Operations of Muon's orthogonalization: 4 m²n + 18 m³ for an m × n matrix with m ≤ n."""
        shapes = [
            1 + 2 / self.queries_per_key,
            1,
            4,
            4,
        ]  # n / m of each matrix in a block, where m is the width
        return self.layers * self.width**3 * sum(4 * n + 18 for n in shapes)


MODEL = Model()
LARGEST = Model(layers=71, width=8192)
"""The largest model for which a training step fits on 64 GPUs of 80 GB, according to `memory`."""
WINDOWS_TRAINED = STEPS * WINDOWS


def gaia_flops(attention: bool) -> float:
    """Return the number of operations of GAIA-1's training, with or without those of attention.

    Without attention, it is 6 N D for N parameters and D training tokens. The operations of
    attention depend on the number of layers. This number is not published, so it is computed from N
    and the width.
    """
    layers = GAIA_PARAMETERS / (12 * GAIA_WIDTH**2)
    extra = layers * GAIA_WIDTH * GAIA_SEQUENCE if attention else 0.0
    return 6 * (GAIA_PARAMETERS + extra) * GAIA_SEQUENCE * WINDOWS_TRAINED


def gaia_share(attention: bool) -> float:
    """Return GAIA-1's operations as a share of what 64 A100s can compute in 15 days."""
    return gaia_flops(attention) / (GPUS * A100 * DAYS * 86_400)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def the_run() -> str:
    """Return the table that compares GAIA-1's published training with drivesim's.

    Both train on the same number of windows.
    """
    flops, share = MODEL.flops_per_window * WINDOWS_TRAINED, gaia_share(attention=True)
    tokens = MODEL.tokens * WINDOWS_TRAINED
    days = [flops / (GPUS * peak * share) / 86_400 for peak in (A100, H100)]
    cpu = f"{flops / CPU_FLOPS / 3.156e7:,.0f} years"
    windows = f"{STEPS:,} × {WINDOWS}"
    rows = [
        ("weights multiplied with each token, N", "6.5 B", f"{MODEL.counted / 1e9:.2f} B"),
        ("windows of 26 frames", windows, windows),
        ("positions a window", f"{GAIA_SEQUENCE:,}", f"{MODEL.slots:,} ({MODEL.tokens:,} tokens)"),
        (
            "positions; tokens: D",
            f"{GAIA_SEQUENCE * WINDOWS_TRAINED:.2e}",
            f"{tokens:.2e}",
        ),
        ("6 N D", f"{gaia_flops(False):.1e}", f"{6 * MODEL.counted * tokens:.1e}"),
        ("with attention's products", f"{gaia_flops(True):.1e}", f"{flops:.1e}"),
        ("64 A100", f"{DAYS} days: {share:.0%} of peak", f"{days[0]:.1f} days at that share"),
        ("64 H100", "", f"{days[1]:.1f} days at that share"),
        ("2 shared cores of an AMD EPYC", "", cpu),
    ]
    return table(["", "GAIA-1, published", "drivesim"], rows)


def scanning(files: float, frames: float) -> float:
    """Return the processor seconds that each rank takes to scan this many files and frames."""
    return files * SCAN_FILE + frames * SCAN_FRAME


def the_stages() -> str:
    """Return the table with the cost of each stage, for 4,700 hours of video as in GAIA-1."""
    source, chosen = HOURS * 3600 * SOURCE_FPS, HOURS * 3600 * FPS
    files = HOURS * 60
    a_frame = 3 * (ENCODE + DECODE + 2 * DISCRIMINATE) + 3 * PERCEIVE
    hours = [
        work / (A100 * GPU_SHARE) / 3600 for work in (a_frame * TOKENIZER_FRAMES, ENCODE * chosen)
    ]
    window = MODEL.flops_per_window
    world = window * WINDOWS_TRAINED / (A100 * gaia_share(True)) / 3600
    rows = [
        (
            "scanning",
            f"{files:,} files of a minute",
            f"{scanning(files, source) / 3600:,.0f} core-hours, on every rank",
        ),
        (
            "decoding",
            f"{source / 1e6:,.0f} M frames",
            f"{source / DECODED / 3600:,.0f} core-hours",
        ),
        (
            "training the tokenizer",
            f"{TOKENIZER_FRAMES / 1e6:.0f} M frames × {a_frame / 1e12:.2f} T operations",
            f"{hours[0]:,.0f} A100-hours",
        ),
        (
            "tokenizing",
            f"{chosen / 1e6:,.0f} M frames × {ENCODE / 1e12:.3f} T operations",
            f"{hours[1]:,.0f} A100-hours",
        ),
        (
            "the token store",
            f"{chosen / 1e6:,.0f} M frames × {FRAME_BYTES:,} B",
            f"{chosen * FRAME_BYTES / 1e9:,.0f} GB",
        ),
        (
            "training the world model",
            f"{WINDOWS_TRAINED / 1e6:.1f} M windows × {window / 1e12:,.0f} T operations",
            f"{world:,.0f} A100-hours",
        ),
        (
            "Muon's step, computed by each of 64 ranks",
            f"{STEPS:,} steps × {MODEL.muon_flops / 1e12:,.0f} T operations",
            f"{MODEL.muon_flops * GPUS / (window * WINDOWS):.0%} of the line above",
        ),
    ]
    return table(["stage", "work", "cost"], rows)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a rank during a training step on one window, in GB."""

    state: float
    """Weights, gradients, Muon's momentum and the averaged weights, all in float32."""
    extra: float
    """DDP's gradient buckets, and the bf16 casts of the weights that are kept during a pass."""
    gathered: float
    """Weights and gradients that FSDP gathers.

    These are two blocks in float32 and bf16, the gradients of one block, and the weights outside
    the blocks.
    """
    activations: float
    """Activations that all blocks keep for the backward pass, without gradient checkpointing."""
    checkpointed: float
    """Activations with gradient checkpointing: those of one block, and the input of each block."""
    logits: float
    """Logits, loss and their gradients."""

    @property
    def sum(self) -> float:
        """Sum of all parts, if gradient checkpointing is on."""
        return self.state + self.extra + self.gathered + self.checkpointed + self.logits


def memory(model: Model, *, shard: bool) -> Memory:
    """Return the memory of one of 64 ranks, with FSDP if `shard`, otherwise with DDP."""
    n, block = model.parameters / 1e9, model.block / 1e9
    a_channel = model.slots * model.width / 1e9
    rest = n - model.layers * block
    return Memory(
        state=16 * n / (GPUS if shard else 1),
        extra=0.0 if shard else 6 * n,
        gathered=2 * block * (4 + 2) + block * 4 + 4 * rest if shard else 0.0,
        activations=ACTIVATIONS * model.layers * a_channel,
        checkpointed=(4 * model.layers + ACTIVATIONS) * a_channel,
        logits=LOGITS * model.tokens * model.codes / 1e9,
    )


def exchanged(model: Model, *, shard: bool) -> float:
    """Return the GB that a rank receives in a training step with Muon.

    With DDP, a rank receives the size of all gradients twice: first it receives other ranks'
    gradients to add them up, then the finished sums. If the model is sharded, weights are gathered
    twice, gradients are reduced once, and Muon gathers the gradients once more.
    """
    return (16 if shard else 8) * model.parameters / 1e9


def the_memory() -> str:
    """Return the table of a rank's memory if the model is replicated or sharded over 64 ranks."""
    cases = ((MODEL, False), (MODEL, True), (LARGEST, True))
    held = [memory(model, shard=shard) for model, shard in cases]
    sizes = [model.parameters / 1e9 for model, _ in cases]
    moved = [exchanged(model, shard=shard) for model, shard in cases]
    rows = {
        "float32 weights, gradients, Muon's momentum, average": [rank.state for rank in held],
        "DDP's buckets; bf16 casts kept for the pass": [rank.extra for rank in held],
        "gathered blocks and embeddings": [rank.gathered for rank in held],
        "activations of one window, all kept": [rank.activations for rank in held],
        "the same with gradient checkpointing": [rank.checkpointed for rank in held],
        "logits, with loss and metrics": [rank.logits for rank in held],
        "sum with checkpointing": [rank.sum for rank in held],
        "extra on the main rank during validation": [
            (8 if shard else 4) * n for n, (_, shard) in zip(sizes, cases, strict=True)
        ],
        "a checkpoint on disk, of all ranks": [12 * n for n in sizes],
        "received by a rank in a step": moved,
        f"seconds for it at {NETWORK / 1e9:.0f} GB/s": [
            1e9 * gigabytes / NETWORK for gigabytes in moved
        ],
    }
    head = ["GB", "DDP", "`--shard`, 64 ranks", f"the same, {LARGEST.parameters / 1e9:.0f} B"]
    return table(head, [(what, *map(_short, values)) for what, values in rows.items()])


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 20 or value == 0 else f"{value:.1f}"


def the_sizes() -> str:
    """Return the table of costs for 10,000 videos, for a million videos, and for a petabyte.

    Each video is a minute of 1080p at 30 frames/s and 8 Mbit/s.
    """
    megabytes, source, chosen = 60, 60 * 30, 60 * 10
    counts = (10_000, 1_000_000, 10**9 // megabytes)
    rows = {
        "hours of video": (",.0f", "", 1 / 60),
        "bytes, read by every rank while scanning": (",.1f", " TB", megabytes / 1e6),
        "scanning, core-hours on every rank": (",.1f", "", scanning(1, source) / 3600),
        f"hours of scanning, {SCANS_AT_ONCE} files at once": (
            ",.1f",
            "",
            scanning(1, source) / SCANS_AT_ONCE / 3600,
        ),
        "memory for planning, every rank": (
            ",.1f",
            " GB",
            (source * PLAN_SOURCE + chosen * PLAN_CHOSEN) / 1e9,
        ),
        "decoding, core-hours": (",.0f", "", source / DECODED / 3600),
        "tokenizing, A100-hours": (",.1f", "", chosen * ENCODE / (A100 * GPU_SHARE) / 3600),
        "token store": (",.0f", " GB", chosen * FRAME_BYTES / 1e9),
        "its shards": (",.0f", "", chosen * FRAME_BYTES / SHARD),
        "its index.json": (",.0f", " MB", INDEX_BYTES / 1e6),
        "start-up, every rank": (",.1f", " s", INDEX_SECONDS),
        "memory for the index, every process": (",.2f", " GB", INDEX_MEMORY / 1e9),
    }
    cells = [
        (what, *(f"{count * a_video:{form}}{unit}" for count in counts))
        for what, (form, unit, a_video) in rows.items()
    ]
    return table(["", "10,000", "1,000,000", "1 PB"], cells)


def tables() -> str:
    """Return all tables with their headings, as in docs/scaling.md."""
    parts = {
        "The run": the_run(),
        "Its stages": the_stages(),
        "Its memory, per GPU": the_memory(),
        "Three sizes of data": the_sizes(),
    }
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


def main() -> None:
    """Print the tables, or write them into docs/scaling.md."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.training.cost")
    parser.add_argument(
        "--write", action="store_true", help="write the tables into docs/scaling.md"
    )
    if not parser.parse_args().write:
        print(tables())
        return
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}", "utf-8")


if __name__ == "__main__":
    main()
