"""Split models over the ranks (FSDP2, https://arxiv.org/abs/2304.11277).

Each rank keeps a share of every parameter, of its gradient and of its optimiser state. While a
block runs, its parameters are gathered on every rank. Sharded parameters are `DTensor`s. `whole`
and `placed_like` also accept plain tensors, which they return unchanged.
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
"""Pattern of the names that torch.distributed.checkpoint gives to the files of `save_shards`."""


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Split the parameters of a model over all ranks: each block separately, the rest together.

    Raises `DriveSimError` if torch is too old.
    """
    _require_torch()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    frozen = set()
    for parameter in model.parameters():
        if parameter.requires_grad:  # `fully_shard` moves it, but rejects channels_last tensors
            parameter.data = parameter.data.contiguous()
        else:
            parameter.data = parameter.data.to(device)
            frozen.add(parameter)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, ignored_params=frozen)


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds only a share of the tensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return the complete tensor. Every rank has to call this function."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return a tensor, which every rank holds completely, sharded in the same way as `like`.

    Raises ValueError if the shapes differ.
    """
    if tensor.shape != like.shape:
        raise ValueError(f"a tensor is {list(tensor.shape)}, expected {list(like.shape)}")
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    # Without a source rank, each rank takes its share from its own copy.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write every rank's share of `tensors` into `folder`. Every rank has to call this function."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # Other storages pickle their metadata. This one cannot read scalars, so they get the shape [1].
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _own_errors():
        with_shape = {name: t if t.ndim else t.reshape(1) for name, t in tensors.items()}
        save(with_shape, storage_writer=writer)


def load_shards(folder: Path, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the files of `save_shards`, on any number of ranks, also without `torchrun`.

    A tensor is sharded in the same way as the tensor in `likes` with the same name and shape. An
    optimiser state, named `PARAMETER/QUANTITY`, is sharded like its parameter. Tensors that are
    scalars in `likes` are returned as scalars.
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
        # The step count of a parameter with one element has the same shape, but is not sharded.
        same_shape = like is not None and like.shape == entry.size and like.numel() > 1
        if like is not None and same_shape and is_sharded(like):
            tensors[name] = torch.empty_like(like, dtype=dtype)
        else:
            tensors[name] = torch.empty(entry.size, dtype=dtype)
    with _own_errors(), warnings.catch_warnings():
        # torch warns that it loads on a single process, which is intended here.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    scalars = [name for name in tensors.keys() & likes.keys() if not likes[name].ndim]
    return tensors | {name: tensors[name].reshape(()) for name in scalars}


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise the original error of a rank, because CheckpointException is not an `Exception`."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


def _require_torch() -> None:
    if tuple(map(int, torch.__version__.split(".")[:2])) < _OLDEST_TORCH:
        raise DriveSimError(
            f"sharded training needs torch 2.9 or newer, but this is {torch.__version__}: update "
            "torch, or leave out `shard`"
        )
