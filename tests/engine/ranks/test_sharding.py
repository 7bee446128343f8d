from pathlib import Path

import pytest
import torch

from driving_sim.engine.ranks.sharding import load_shards, save_shards


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_scalar_is_loaded_as_a_scalar(tmp_path: Path) -> None:
    """The files cannot hold scalars, and a tokenizer has a buffer that is a scalar."""
    saved = {"model/share": torch.tensor(0.5), "model/weight": torch.ones(1)}
    save_shards(tmp_path, saved)
    likes = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    loaded = load_shards(tmp_path, likes)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
