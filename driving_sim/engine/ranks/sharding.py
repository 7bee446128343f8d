"""Split models over the ranks (FSDP2, https://arxiv.org/abs/2304.11277).

Each rank stores a share of every parameter, of its gradient and of its optimiser state. While a
block runs, its complete parameters are gathered on every rank. Sharded parameters are `DTensor`s.
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
    """Split the trainable parameters of a model over all ranks.

    Each block is split separately, and the parameters outside the blocks are split together.
    Raises `DriveSimError` if torch is too old.
    """
    _require_torch()
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    frozen = set()
    for parameter in model.parameters():
        if parameter.requires_grad:
            # `fully_shard` moves the parameter to the device, but rejects channels_last tensors.
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
    """Return the complete tensor. If `tensor` is sharded, every rank has to call this function."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return gathered


def placed_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a tensor, of which every rank has a complete copy, in the same way as `like`.

    If `like` is not sharded, or `tensor` is already sharded, return `tensor` unchanged. Raises
    ValueError if the shapes differ.
    """
    if tensor.shape != like.shape:
        raise ValueError(f"a tensor has shape {list(tensor.shape)}, expected {list(like.shape)}")
    if not is_sharded(like) or is_sharded(tensor):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    # `src_data_rank=None` means that each rank cuts its share from its own copy.
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def save_shards(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write every rank's share of `tensors` into `folder`. Every rank has to call this function."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    # This format is used because the other formats pickle their metadata. It cannot read scalars,
    # so scalars are saved with the shape [1].
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _own_errors():
        with_shape = {name: t if t.ndim else t.reshape(1) for name, t in tensors.items()}
        save(with_shape, storage_writer=writer)


def load_shards(folder: Path, likes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `save_shards` wrote into `folder`, by name.

    The number of ranks may differ from that of `save_shards`, and may be 1.

    `likes` determines which of the returned tensors are sharded, and how. A tensor is sharded like
    the tensor in `likes` with the same name and shape. Optimiser states have names of the form
    `PARAMETER/QUANTITY`, and are sharded like the tensor `PARAMETER` in `likes`. All other tensors
    are complete. Tensors that are scalars in `likes` are returned as scalars.
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
        # An optimiser's step count has the shape [1] and is never sharded. Its parameter can have
        # the same shape and be sharded, so the test of `numel` excludes tensors with one element.
        same_shape = like is not None and like.shape == entry.size and like.numel() > 1
        if like is not None and same_shape and is_sharded(like):
            tensors[name] = torch.empty_like(like, dtype=dtype)
        else:
            tensors[name] = torch.empty(entry.size, dtype=dtype)
    with _own_errors(), warnings.catch_warnings():
        # On a single process, torch warns that it loads without other ranks. This is intended.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    scalars = [name for name in tensors.keys() & likes.keys() if not likes[name].ndim]
    return tensors | {name: tensors[name].reshape(()) for name in scalars}


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise the original error of one rank instead of a CheckpointException.

    CheckpointException is not an `Exception`, so callers would not catch it.
    """
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
