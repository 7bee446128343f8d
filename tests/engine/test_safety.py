"""Loading a file never runs code: tests with real malicious files, and checks of the source."""

import ast
import hashlib
import io
import os
import pickle
import re
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from driving_sim.data.sources import comma2k19
from driving_sim.data.tokens.store import TokenStore
from driving_sim.engine.config import load_json, load_yaml
from driving_sim.engine.errors import DriveSimError
from driving_sim.engine.weights import load_weights
from driving_sim.evaluate.actions.inverse_dynamics import InverseDynamics
from driving_sim.evaluate.pictures.features import I3DFeatures
from driving_sim.tokenizer import Tokenizer, perceptual
from driving_sim.world_model import WorldModel
from tests import ROOT
from tests.fixtures.token_drives import tiny_tokenizer, write_store
from tests.stress import fuzz_targets


class Intruder:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def legacy_tar(intruder: Intruder) -> bytes:
    """Return a file in the oldest format of torch.save: a tar of pickles."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(intruder, protocol=2)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return content.getvalue()


def saved(intruder: Intruder, *, as_zip: bool) -> bytes:
    content = io.BytesIO()
    torch.save({"w": intruder}, content, _use_new_zipfile_serialization=as_zip)
    return content.getvalue()


def object_array(intruder: Intruder) -> bytes:
    content = io.BytesIO()
    np.save(content, np.array([intruder, 0.0], dtype=object), allow_pickle=True)
    return content.getvalue()


def object_archive(intruder: Intruder) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("a.npy", object_array(intruder))
    return content.getvalue()


MALICIOUS: dict[str, Callable[[Intruder], bytes]] = {
    "pickle": lambda intruder: pickle.dumps(intruder),
    "pickle 0": lambda intruder: pickle.dumps(intruder, protocol=0),
    "pt": lambda intruder: saved(intruder, as_zip=True),
    "legacy pt": lambda intruder: saved(intruder, as_zip=False),
    "tar pt": legacy_tar,
    "npy": object_array,
    "npz": object_archive,
    "yaml": lambda i: f"a: !!python/object/apply:os.mkdir ['{i.folder}']\n".encode(),
}


def load_vgg16(path: Path) -> None:
    """Load the file at `path` as the VGG-16 weights that LPIPS finds in the cache of torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.hub, "get_dir", lambda: str(path.parent))
        cached = path.parent / "checkpoints" / Path(perceptual.VGG16_URL).name
        cached.parent.mkdir(exist_ok=True)
        cached.write_bytes(path.read_bytes())
        perceptual.vgg16_weights()


def in_place_of(
    make: Callable[[Path], object], name: str, load: Callable[[Path], object], reason: str
) -> Any:
    """Return a function that loads a folder in which the given file replaces the file `name`.

    The function first checks that the unchanged folder loads. `reason` is a pattern for the error
    of the file's own reader, which shows that no earlier check refused the folder.
    """

    def load_with(path: Path) -> None:
        folder = path.parent / "folder"
        make(folder)
        try:
            load(folder)
        except DriveSimError as error:
            pytest.fail(f"the unchanged folder is refused: {error}")
        (folder / name).write_bytes(path.read_bytes())
        with pytest.raises(DriveSimError, match=f"{re.escape(name)}: {reason}"):
            load(folder)
        load(folder)

    return load_with


def save_world(folder: Path) -> None:
    fuzz_targets.world_model_target(folder.parent)
    (folder.parent / "run").rename(folder)


def save_store(folder: Path) -> None:
    write_store(folder, (1,))  # a store that is smaller than any of the malicious files


def read_store(folder: Path) -> None:
    fuzz_targets._settle_sizes(folder)
    TokenStore(folder).shard(0)


LOADERS: dict[str, Callable[[Path], object]] = {
    "comma2k19": lambda path: comma2k19._array(path),
    "VGG-16": load_vgg16,
    "I3D": I3DFeatures,
    "probe": InverseDynamics.load,
    "weights": lambda path: load_weights(torch.nn.Linear(1, 1), path, of="a test"),
    "tokenizer": in_place_of(
        tiny_tokenizer().save, "model.safetensors", Tokenizer.from_run, "not this tokenizer's"
    ),
    "tokenizer config": in_place_of(
        tiny_tokenizer().save, "config.json", Tokenizer.from_run, "not (JSON|UTF-8)"
    ),
    "world model": in_place_of(
        save_world, "model.safetensors", WorldModel.from_run, "not this world model's weights"
    ),
    "token shard": in_place_of(
        save_store, "shard-00000.safetensors", read_store, "damaged token shard"
    ),
    "token index": in_place_of(save_store, "index.json", read_store, "not (JSON|UTF-8)"),
    "JSON": load_json,
    "YAML": load_yaml,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_nothing_is_unpickled(loader: str, tmp_path: Path) -> None:
    for number, make in enumerate(MALICIOUS.values()):
        work = tmp_path / str(number)
        work.mkdir()
        trace = work / "trace"
        path = work / "malicious"
        path.write_bytes(make(Intruder(trace)))
        with pytest.raises(DriveSimError) as caught:
            LOADERS[loader](path)
        assert len(str(caught.value).splitlines()) == 1
        assert not trace.exists()


@pytest.mark.parametrize("kind", ["pickle", "legacy pt", "npy"])
def test_the_malicious_files_are_malicious(kind: str, tmp_path: Path) -> None:
    content = io.BytesIO(MALICIOUS[kind](Intruder(tmp_path / "made")))
    if kind == "npy":
        np.load(content, allow_pickle=True)
    elif kind == "pickle":
        pickle.load(content)
    else:
        torch.load(content, weights_only=False)
    assert (tmp_path / "made").is_dir()


def test_weights_with_the_right_checksum_are_not_unpickled_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, as_zip in enumerate((True, False)):
        path = tmp_path / str(number)
        path.write_bytes(saved(Intruder(tmp_path / "made"), as_zip=as_zip))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(perceptual, "VGG16_SHA256", digest)
        with pytest.raises(DriveSimError, match="cannot load the weights"):
            load_vgg16(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "shape", ["(100000000,)", "(999999999999,)", "(-1,)", "(2**70,)", "(" * 900, "-" * 9000]
)
def test_arrays_with_false_shapes_are_refused_without_using_memory(
    shape: str, tmp_path: Path
) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    path = tmp_path / "t"
    size = len(header).to_bytes(2, "little")
    path.write_bytes(b"\x93NUMPY\x01\x00" + size + header + bytes(800))
    tracemalloc.start()
    with pytest.raises(DriveSimError, match="NumPy array") as caught:
        comma2k19._array(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert len(str(caught.value)) < 600
    assert len(str(caught.value).splitlines()) == 1


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
SAFE_NAMES = {"UnpicklingError"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__", "yaml.load", "yaml.load_all", "yaml.unsafe_load"}
GUARDED_CALLS = {
    "torch.load": ("weights_only", True),
    "torch.hub.load_state_dict_from_url": ("weights_only", True),
    "np.load": ("allow_pickle", False),
}
TRUSTED_CALLS = {"torch.jit.load": "features.py", "torch.hub.load": ""}


def sources() -> list[Path]:
    folders = ("driving_sim", "tokenizer", "world_model", "data")
    return sorted({path.resolve() for name in folders for path in (ROOT / name).rglob("*.py")})


def offences(tree: ast.AST, name: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN_MODULES:
            yield from (alias.name for alias in node.names if alias.name not in SAFE_NAMES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            if called in FORBIDDEN_CALLS or TRUSTED_CALLS.get(called, name) != name:
                yield called
            if called in GUARDED_CALLS:
                option, value = GUARDED_CALLS[called]
                argument = options.get(option)
                if not isinstance(argument, ast.Constant) or argument.value is not value:
                    yield called


def test_the_source_calls_nothing_that_runs_a_file() -> None:
    calls_by_file = {
        str(path.relative_to(ROOT)): list(offences(ast.parse(path.read_text("utf-8")), path.name))
        for path in sources()
    }
    assert len(calls_by_file) > 100
    assert {path: calls for path, calls in calls_by_file.items() if calls} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from pickle import loads",
        "import shelve",
        "from marshal import load",
        "torch.load(path)",
        "torch.load(path, weights_only=flag)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader=yaml.Loader)",
        "torch.jit.load(path)",
        "eval(text)",
        "exec(text)",
    ],
)
def test_the_source_check_detects_forbidden_lines(line: str) -> None:
    assert list(offences(ast.parse(line), "other.py"))
