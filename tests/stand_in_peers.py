"""Just enough of the peers' packages to try the benchmarks where they are not installed."""

import pickle
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor, nn

from benchmarks import peers


class _Cache:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.tokens = 0

    def crop(self, count: int) -> None:
        assert count <= 0
        self.tokens += count


class _Output(NamedTuple):
    logits: Tensor
    loss: Tensor | None


class _Gpt2(nn.Module):
    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleList(
            nn.Linear(config.n_embd, config.n_embd) for _ in range(config.n_layer)
        )

    def forward(
        self,
        input_ids: Tensor,
        cache: _Cache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        use_cache: bool = True,
    ) -> _Output:
        if cache is not None:
            cache.tokens += input_ids.shape[1]
            assert cache.tokens <= self.config.n_positions
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        logits = x[:, -logits_to_keep:] @ self.embedding.weight.T
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return _Output(logits, loss)


class _VqModel(nn.Module):
    def __init__(self, block_out_channels: tuple[int, ...], **_: Any) -> None:
        super().__init__()
        width = block_out_channels[0]
        self.down, self.up = nn.Conv2d(3, width, 16, 16), nn.ConvTranspose2d(width, 3, 16, 16)
        self.quantize = _Quantiser()

    def encode(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(latents=self.down(images))

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.up(self.down(images)))


class _Quantiser(nn.Module):
    def forward(self, latents: Tensor) -> tuple[Any, Any, tuple[Any, Any, Tensor]]:
        return None, None, (None, None, latents.argmax(1))


class _TarWriter:
    def __init__(self, path: str) -> None:
        self.path, self.samples = Path(path), list[dict[str, Any]]()

    def __enter__(self) -> "_TarWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.path.write_bytes(pickle.dumps(self.samples))

    def write(self, sample: dict[str, Any]) -> None:
        self.samples.append(sample)


class _WebDataset:
    def __init__(self, shards: list[str], **_: Any) -> None:
        self.shards, self.size = shards, 1
        self.names: tuple[str, ...] = ()
        self.change: Callable[[Any], Any] = tuple

    def repeat(self) -> "_WebDataset":
        return self

    def shuffle(self, _: int) -> "_WebDataset":
        return self

    def to_tuple(self, *names: str) -> "_WebDataset":
        self.names = names
        return self

    def map(self, change: Callable[[Any], Any]) -> "_WebDataset":
        self.change = change
        return self

    def batched(self, size: int) -> "_WebDataset":
        self.size = size
        return self

    def __iter__(self) -> Iterator[list[Any]]:
        batch = []
        while True:
            for shard in self.shards:
                for sample in pickle.loads(Path(shard).read_bytes()):
                    batch.append(self.change([sample[name] for name in self.names]))
                    if len(batch) == self.size:
                        yield batch
                        batch = []


_PACKAGES: dict[str, Any] = {
    "transformers": SimpleNamespace(
        GPT2Config=SimpleNamespace, GPT2LMHeadModel=_Gpt2, DynamicCache=_Cache, StaticCache=_Cache
    ),
    "diffusers": SimpleNamespace(VQModel=_VqModel),
    "webdataset": SimpleNamespace(TarWriter=_TarWriter, WebDataset=_WebDataset),
}


def package(name: str) -> Any:
    """The real one where it is installed, in place of `benchmarks.peers.package`."""
    return peers_package(name) if find_spec(name) else _PACKAGES[name]


peers_package = peers.package
