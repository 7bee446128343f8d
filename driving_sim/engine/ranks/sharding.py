"""Models that are spread over the ranks (FSDP2, https://arxiv.org/abs/2304.11277).

Each rank keeps a share of every parameter, of its gradient and of what the optimiser knows of it;
a block's parameters are gathered while it runs. Such parameters are `DTensor`s: what is here tells
them from plain ones, and is the identity on those.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from driving_sim.engine.errors import DriveSimError

_OLDEST_TORCH = (2, 9)
SHARDS = "shard-*.safetensors"
"""What torch.distributed.checkpoint calls the files of `save_shards`."""


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Spread the parameters over all ranks: `blocks` one by one, all others together.

    Raises `DriveSimError` where torch is too old.
    """
    _require_torch()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    frozen = set()
    for parameter in model.parameters():
        if parameter.requires_grad:  # moved by `fully_shard`; it refuses channels_last
            parameter.data = parameter.data.contiguous()
        else:
            parameter.data = parameter.data.to(device)
            frozen.add(parameter)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=frozen)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a share of a tensor only."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every rank has to ask for it."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that all ranks hold, sharded as `like` is; `ValueError` for another shape."""
    if tensor.shape != like.shape:
        raise ValueError(f"a tensor is {list(tensor.shape)}, expected {list(like.shape)}")
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    # No source: each rank takes its share of its own copy.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write every rank's share of `tensors` into `folder`; all ranks have to call it."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # Its other storages pickle their metadata; this one reads numbers with a shape only.
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _own_errors():
        with_shape = {name: t if t.ndim else t.reshape(1) for name, t in tensors.items()}
        save(with_shape, storage_writer=writer)


def load_shards(folder: Path, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read what `save_shards` wrote, on any number of ranks, one without `torchrun` included.

    A tensor named as one of `likes`, or as one with `/QUANTITY` behind, and of its shape comes
    sharded as that is; one named as a scalar is one again.
    """
    _require_torch()
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    saved = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    tensors: dict[str, Tensor] = {}
    for name, entry in saved.items():
        assert isinstance(entry, TensorStorageMetadata)
        dtype = entry.properties.dtype
        like = likes.get(name, likes.get(name.rpartition("/")[0]))
        # A parameter of one number looks like its count of steps, which every rank holds.
        alike = like is not None and like.shape == entry.size and like.numel() > 1
        if like is not None and alike and is_sharded(like):
            tensors[name] = torch.empty_like(like, dtype=dtype)
        else:
            tensors[name] = torch.empty(entry.size, dtype=dtype)
    with _own_errors(), warnings.catch_warnings():
        # It warns where there are no ranks: of what is wanted then.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    scalars = [name for name in tensors.keys() & likes.keys() if not likes[name].ndim]
    return tensors | {name: tensors[name].reshape(()) for name in scalars}


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise what went wrong on a rank as it is: torch's class for it is no `Exception`."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


def _require_torch() -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        raise DriveSimError(
            f"sharded training needs torch 2.9 or newer, this is {torch.__version__}: update it, "
            "or leave `shard` out"
        )
