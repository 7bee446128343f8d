import json
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.weights import (
    build_with_weights,
    fingerprint,
    load_weights,
    round_to_bf16,
    save_weights,
    write_tensors,
)
from driving_sim.tokenizer.autoencoder import Autoencoder
from driving_sim.tokenizer.presets import PRESETS as TOKENIZERS
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.training.presets import PRESETS as WORLD_MODELS
from driving_sim.world_model.transformer import TokenGrid, Transformer


class Layers(nn.Module):
    def __init__(self, layers: int = 2, width: int = 4, table: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.register_buffer("table", torch.zeros(table), persistent=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_weights(Layers(), tmp_path / "w.safetensors", {"made": "here"})
    return tmp_path / "w.safetensors"


def refused(file: Path, **sizes: int) -> str:
    """Check that the file is refused quickly and with little memory. Return the error message."""
    begin = time.perf_counter()
    tracemalloc.start()
    with pytest.raises(DriveSimError, match="not a test's weights") as caught:
        build_with_weights(lambda: Layers(**sizes), file, of="a test")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.perf_counter() - begin < 5
    assert peak < 2**26
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_weights_are_loaded_with_their_metadata(file: Path) -> None:
    module, metadata = build_with_weights(Layers, file, of="a test")
    assert metadata == {"made": "here"}
    saved = load_file(file)
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())
    assert fingerprint({"a": 1}, module) != fingerprint({"a": 2}, module)
    assert fingerprint({"a": 1}, module) != fingerprint({"a": 1}, Layers())


def tensors_of_all_formats() -> dict[str, Tensor]:
    """Return tensors of all formats, with one not contiguous, one scalar and one empty tensor."""
    formats = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]
    tensors = {name: torch.arange(6).to(getattr(torch, name)) for name in formats}
    transposed = torch.arange(6.0).reshape(2, 3).T
    special = {"transposed": transposed, "scalar": torch.tensor(3.0), "ëmpty": torch.zeros(0, 3)}
    return {**tensors, **special}


@pytest.mark.parametrize("metadata", [None, {"a": 'né "b"'}])
def test_a_file_has_the_same_bytes_as_one_of_the_safetensors_library(
    tmp_path: Path, metadata: dict[str, str] | None
) -> None:
    tensors = tensors_of_all_formats()
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    write_tensors(tmp_path / "w", tensors, metadata)
    assert (tmp_path / "w").read_bytes() == save(contiguous, metadata)


def test_rounded_weights_take_half_the_space_and_stay_the_same(tmp_path: Path) -> None:
    module = Layers(width=64)
    module.register_buffer("steps", torch.tensor(3))
    module.register_buffer("phase", torch.tensor([0.1]), persistent=False)
    full, half = tmp_path / "full", tmp_path / "half"
    save_weights(module, full, {"a": "b"})
    assert full.read_bytes() == save(module.state_dict(), {"a": "b"})

    exact = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.0\.weight.*round the weights"):
        save_weights(module, half, {}, torch.bfloat16)
    assert not half.exists()
    round_to_bf16(module)
    rounded = {name: value.clone() for name, value in module.state_dict().items()}
    assert not torch.equal(rounded["layers.0.weight"], exact["layers.0.weight"])
    for name, value in exact.items():
        torch.testing.assert_close(rounded[name], value, rtol=2**-8, atol=0)
    assert module.phase == torch.tensor([0.1])  # It is not saved, so it need not be rounded.

    save_weights(module, half, {"a": "b"}, torch.bfloat16)
    assert half.stat().st_size < 0.55 * full.stat().st_size
    assert load_file(half)["layers.0.weight"].dtype == torch.bfloat16

    def build() -> Layers:
        layers = Layers(width=64)
        layers.register_buffer("steps", torch.tensor(0))
        return layers

    loaded, metadata = build_with_weights(build, half, of="a test")
    assert metadata == {"a": "b"}
    assert fingerprint({}, loaded) == fingerprint({}, module)
    for name, value in loaded.state_dict().items():
        assert value.dtype == rounded[name].dtype
        assert torch.equal(value, rounded[name])
    assert "the model's config asks for more" in refused(half, layers=5, width=64)


def test_metadata_is_written_in_sorted_order(tmp_path: Path) -> None:
    module, names = Layers(), [str(number) for number in range(20)]
    for order in (names, names[::-1]):
        save_weights(module, tmp_path / "w" / order[0], dict.fromkeys(order, "x"))
    assert (tmp_path / "w" / "0").read_bytes() == (tmp_path / "w" / "19").read_bytes()


def test_saving_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Python nor torch makes a second copy of the weights."""
    module = Layers(layers=4, width=512)
    contiguous, copies = Tensor.contiguous, []

    def watched(tensor: Tensor) -> Tensor:
        result = contiguous(tensor)
        if result.data_ptr() != tensor.data_ptr():
            copies.append(tensor.shape)
        return result

    monkeypatch.setattr(Tensor, "contiguous", watched)
    monkeypatch.setattr(Tensor, "clone", None)
    tracemalloc.start()
    save_weights(module, tmp_path / "w.safetensors", {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not copies
    assert peak < (tmp_path / "w.safetensors").stat().st_size / 20


def test_a_file_has_the_usual_permissions_of_a_new_file(tmp_path: Path) -> None:
    save_weights(Layers(), tmp_path / "w.safetensors", {})
    (tmp_path / "new").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("w.safetensors", "new")]
    assert modes[0] == modes[1]


def with_header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])


def entry(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["layers.0.weight"].update({name: value})


@pytest.mark.parametrize(
    "change",
    [
        entry("data_offsets", [0, 64]),
        entry("data_offsets", [64, 0]),
        entry("data_offsets", [0, 2**62]),
        entry("data_offsets", [-1, 63]),
        entry("shape", [2**40, 2**40]),
        entry("shape", [-4, -4]),
        entry("shape", [float("nan")]),
        entry("shape", [2, 8]),
        entry("dtype", "F64"),
        entry("dtype", "I32"),
        entry("dtype", "\x1b[2J"),
        lambda header: header.pop("layers.0.weight"),
        lambda header: header.update(more=dict(header["layers.0.weight"])),
        lambda header: header.update(__metadata__={"a": 3}),
    ],
)
def test_inconsistent_headers_are_refused(
    file: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    with_header(file, change)
    refused(file)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"short",
        (2**63).to_bytes(8, "little") + b"{}",
        (2**21).to_bytes(8, "little") + b" " * 2**21,
        (100_000).to_bytes(8, "little") + b'{"a":' * 20_000,
        (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_files_in_other_formats_are_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    refused(file)


def test_a_header_that_is_too_long_is_refused(file: Path) -> None:
    save_weights(Layers(), file, {"made": "x" * 2**21})
    assert "its header claims to be 20" in refused(file)


def test_errors_name_wrong_formats_missing_tensors_and_extra_tensors(file: Path) -> None:
    saved = load_file(file)
    save_file({name: value.double() for name, value in saved.items()}, file)
    assert "layers.0.bias is F64 [4], expected F32 [4]" in refused(file)
    bias = saved.pop("layers.1.bias")
    save_file(saved, file)
    assert "has no layers.1.bias" in refused(file)
    save_file({**saved, "layers.1.bias": bias, "z": bias.clone()}, file)
    assert "has 'z', which the model does not have" in refused(file)


def test_a_refused_file_changes_nothing(file: Path) -> None:
    module = Layers()
    before = fingerprint({}, module)
    saved = load_file(file)
    save_file({**saved, "layers.1.bias": torch.zeros(5)}, file)
    with pytest.raises(DriveSimError):
        load_weights(module, file, of="a test")
    assert fingerprint({}, module) == before


@pytest.mark.parametrize(
    "sizes", [{"layers": 10**12}, {"width": 10**6}, {"width": 10**12}, {"width": 10**30}]
)
def test_a_config_of_an_impossible_size_is_refused(file: Path, sizes: dict[str, int]) -> None:
    """The config is refused before memory is allocated. A billion layers would fill the memory."""
    limit = file.stat().st_size // 4
    assert f"the file has at most {limit} numbers, but the model's config asks for more" in refused(
        file, **sizes
    )


@pytest.mark.parametrize("preset", ["demo", "tiny"])
def test_a_file_is_large_enough_for_its_own_config_but_not_for_a_larger_one(
    preset: str, tmp_path: Path
) -> None:
    frames, world = TOKENIZERS[preset].model, WORLD_MODELS[preset].model
    grid = TokenGrid(rows=frames.rows, cols=frames.cols, levels=frames.levels)

    def transformer(layers: int, reach: int) -> Transformer:
        config = replace(world, layers=layers, previous_reach=reach)
        return Transformer(config, grid, ActionStatistics())

    for build, larger in (
        (partial(Autoencoder, frames), partial(Autoencoder, replace(frames, blocks=(2, 2, 2)))),
        (partial(transformer, 2, 0), partial(transformer, 3, 0)),
        (partial(transformer, 2, 1), partial(transformer, 2, 2)),
    ):
        module, file = build(), tmp_path / "w.safetensors"
        save_weights(module, file, {})
        loaded, _ = build_with_weights(build, file, of="a test")
        assert fingerprint({}, loaded) == fingerprint({}, module)
        with pytest.raises(DriveSimError, match="the model's config asks for more"):
            build_with_weights(larger, file, of="a test")
