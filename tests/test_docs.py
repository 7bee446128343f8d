"""Check that the commands, settings and numbers in the documents and cluster examples are right."""

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from torch.distributed.run import get_args_parser
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from benchmarks.training import cost
from driving_sim.cli import app
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.engine.config import resolve
from driving_sim.engine.errors import DriveSimError
from driving_sim.scaling.run import _token_matrices
from driving_sim.tokenizer.presets import PRESETS as TOKENIZER_PRESETS
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.training.objective import InputNoiseConfig, WorldModelObjective
from driving_sim.world_model.training.presets import PRESETS as WORLD_MODEL_PRESETS
from driving_sim.world_model.transformer import TokenGrid, Transformer, TransformerConfig
from tests import ROOT

DOCS = ROOT / "docs"
CLUSTER = DOCS / "cluster"
FILES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.glob("*.md")),
    *sorted(CLUSTER.iterdir()),
]
COMMAND: Any = typer.main.get_command(app)
PRESETS: dict[str, dict[str, Any]] = {
    "train-tokenizer": TOKENIZER_PRESETS,
    "tokenize": TOKENIZER_PRESETS,
    "train-world-model": WORLD_MODEL_PRESETS,
}
CONFIGS = {name: presets["large"] for name, presets in PRESETS.items()} | {
    "synth": SyntheticConfig()
}
"""The settings that `--set` changes, by command."""


def code(file: Path) -> Iterator[str]:
    """Yield every line of code in a file, with continued lines joined.

    In Markdown, only fenced blocks and code spans count as code.
    """
    text = re.sub(r"\s*\\\n\s*", " ", file.read_text("utf-8"))
    if file.suffix != ".md":
        yield from (line for line in text.splitlines() if not line.lstrip().startswith("#"))
        return
    for number, part in enumerate(text.split("```")):
        yield from part.splitlines() if number % 2 else re.findall(r"`([^`]+)`", part)


def commands(line: str) -> Iterator[list[str]]:
    """Yield the words after `drivesim` for every command in a line."""
    line = re.sub(r"  +#.*| # .*", "", line)
    for words in re.findall(r"(?:-m driving_sim\.cli|(?<![-/.])\bdrivesim) ([a-z].+)", line):
        yield shlex.split(words.rstrip(" &"))


def wrong(words: list[str]) -> list[str]:
    """Return the names in a command line that the program does not have."""
    command: Any = COMMAND
    words = list(words)
    while words and hasattr(command, "commands"):
        name = words.pop(0)
        if name not in command.commands:
            return [name]
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    options = {word.partition("=")[0] for word in words if word.startswith("--")}
    return sorted(options - known - {"--help"}) + wrong_settings(command, words)


def wrong_settings(command: Any, words: list[str]) -> list[str]:
    """Return the error of the `--set` assignments in a command line, or an empty list."""
    given = [value for name, value in pairwise(words) if name == "--set"]
    try:
        if given:
            resolve(CONFIGS[command.name], assignments=given)
    except DriveSimError as error:
        return [str(error)]
    return []


def lines_with_commands() -> list[tuple[str, list[str]]]:
    return [(file.name, words) for file in FILES for line in code(file) for words in commands(line)]


def test_every_command_and_option_in_the_documents_exists() -> None:
    lines = lines_with_commands()
    assert {file.suffix for file in FILES} == {".md", ".sbatch", ".yaml"}
    assert len(lines) >= 60
    assert [(name, words) for name, words in lines if wrong(words)] == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("drivesim train-world-modle runs/tokens", "train-world-modle"),
        ("torchrun -m driving_sim.cli tokenize videos --shards 4 &", "--shards"),
        ("drivesim evaluate tokeniser a b", "tokeniser"),
        ("drivesim train-world-model --set training.gradient_checkpoint=true", "gradient_check"),
    ],
)
def test_a_command_that_does_not_exist_is_seen(line: str, fault: str) -> None:
    (words,) = commands(line)
    assert fault in " ".join(wrong(words))


def test_settings_that_stand_alone_exist() -> None:
    """A setting without a command may belong to either model."""
    spans = [span for file in FILES for span in code(file) if span.startswith("--set ")]
    assert len(spans) >= 10
    models = [COMMAND.commands[name] for name in ("train-world-model", "train-tokenizer")]
    for span in spans:
        words = shlex.split(span.replace("=N", "=2"))
        assert any(not wrong_settings(model, words) for model in models), span


def test_torchrun_has_the_options_that_it_is_given() -> None:
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    lines = [line for file in FILES for line in code(file) if "torchrun --" in line]
    assert len(lines) >= 6
    for line in lines:
        given = re.findall(r"(--[\w-]+)", line.split("-m driving_sim")[0].split("torchrun")[1])
        assert set(given) <= known, line


def test_every_module_that_is_named_is_there() -> None:
    names = {
        name
        for file in FILES
        for line in code(file)
        for name in re.findall(r"python -m ([\w.]+)", line)
    }
    assert "benchmarks.training.cost" in names
    assert [name for name in names if importlib.util.find_spec(name) is None] == []


def shell_scripts() -> list[str]:
    pod = documents()["Job"]["spec"]["template"]["spec"]["containers"][0]
    return [*(file.read_text("utf-8") for file in CLUSTER.glob("*.sbatch")), pod["args"][0]]


def documents() -> dict[str, Any]:
    texts = yaml.safe_load_all((CLUSTER / "train-job.yaml").read_text("utf-8"))
    return {document["kind"]: document for document in texts}


def test_the_shell_of_the_examples_is_shell() -> None:
    for script in shell_scripts():
        done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""


def test_the_pods_of_the_job_find_each_other() -> None:
    service, job = documents()["Service"], documents()["Job"]
    pod, name = job["spec"]["template"], job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    container = pod["spec"]["containers"][0]
    (script,) = container["args"]
    port = service["spec"]["ports"][0]["port"]
    assert f"--rdzv-endpoint={name}-0.{service['metadata']['name']}:{port}" in script
    assert f"--nnodes={job['spec']['parallelism']} " in script
    assert f"--nproc-per-node={container['resources']['limits']['nvidia.com/gpu']} " in script
    assert "--max-restarts=0 " in script  # a restarted container runs a new torchrun
    assert '--rdzv-conf="is_host=$([ "$JOB_COMPLETION_INDEX" = 0 ]' in script
    assert int(container["resources"]["requests"]["cpu"]) > 8
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["spec"]["volumes"]}


def test_there_is_time_for_a_checkpoint_between_the_signals() -> None:
    """torchrun waits longer than its default of 30 s, but gives up before the machine kills it."""
    pod = documents()["Job"]["spec"]["template"]["spec"]
    environment = {entry["name"]: entry["value"] for entry in pod["containers"][0]["env"]}
    patience = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert 30 < patience < pod["terminationGracePeriodSeconds"]
    script = (CLUSTER / "train.sbatch").read_text("utf-8")
    (patience_text,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", script)
    (warning,) = re.findall(r"--signal=B:USR1@(\d+)", script)
    assert 30 < int(patience_text) < int(warning)
    assert re.search(r"#SBATCH --nodes=(\d+)\n(?s:.*)--nnodes=\1 ", script)
    assert re.search(r"#SBATCH --gpus-per-node=(\d+)\n(?s:.*)--nproc-per-node=\1 ", script)


STAND_INS = {
    # Like Slurm's srun, this stand-in kills its step at SIGTERM and does not pass the signal on.
    "srun": """while [[ $1 == --* ]]; do shift; done
        "$@" & echo $! > step
        trap 'echo killed >> log; kill -KILL $(cat step)' TERM
        while kill -0 $(cat step) 2> /dev/null; do wait || true; done""",
    "torchrun": """trap 'echo stopped >> log; exit 1' TERM
        echo "$SRUN_CPUS_PER_TASK $TORCH_DISABLE_SHARE_RDZV_TCP_STORE $*" > started
        while true; do sleep 0.02; done""",
    "scancel": 'if [ "$*" = "--signal=TERM 7.0" ]; then kill -TERM $(cat step); fi',
    "scontrol": 'if [ "$1" = requeue ]; then echo "$*" >> log; else echo node-1; fi',
}


@contextmanager
def slurm_job(name: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run an example with stand-ins for Slurm's commands. Yield its process when its step runs."""
    (folder / "bin").mkdir()
    for command, script in STAND_INS.items():
        (folder / "bin" / command).write_text(f"#!/bin/bash\n{script}\n")
        (folder / "bin" / command).chmod(0o755)
    environment = {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node-[1-8]",
        "SLURM_CPUS_PER_TASK": "96",
    }
    job = subprocess.Popen(
        ["bash", CLUSTER / name, "videos"], env=environment, cwd=folder, start_new_session=True
    )
    try:
        limit = time.monotonic() + 30
        while not (folder / "started").exists() or not (folder / "started").read_text():
            assert job.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)
        yield job
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


@pytest.mark.parametrize("name", ["train.sbatch", "tokenize.sbatch"])
def test_a_slurm_job_is_stopped_and_queued_again_before_its_time_is_over(
    name: str, tmp_path: Path
) -> None:
    with slurm_job(name, tmp_path) as job:
        started = (tmp_path / "started").read_text()
        job.send_signal(signal.SIGUSR1)
        assert job.wait(30) == 0
    assert (tmp_path / "log").read_text().splitlines() == ["stopped", "requeue 7"]
    assert started.startswith("96 1 --nnodes=")
    assert "--resume" not in started


@pytest.mark.parametrize("name", ["train.sbatch", "tokenize.sbatch"])
def test_a_slurm_job_that_is_cancelled_is_not_queued_again(name: str, tmp_path: Path) -> None:
    with slurm_job(name, tmp_path) as job:
        job.send_signal(signal.SIGTERM)
        assert job.wait(30) == -signal.SIGTERM
    assert not (tmp_path / "log").exists()


def test_a_slurm_job_goes_on_with_the_run_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "runs/world-model").mkdir(parents=True)
    (tmp_path / "runs/world-model/config.yaml").touch()
    with slurm_job("train.sbatch", tmp_path):
        assert (tmp_path / "started").read_text().endswith(" --resume\n")


def test_several_machines_share_no_store_between_restarts() -> None:
    for file in CLUSTER.iterdir():
        text = file.read_text("utf-8")
        assert re.search(r'TORCH_DISABLE_SHARE_RDZV_TCP_STORE(=1\n|\n +value: "1"\n)', text), file


def test_nothing_on_the_page_waits_to_be_measured() -> None:
    assert re.findall(r"MEASURED\(\w*\)", (DOCS / "scaling.md").read_text("utf-8")) == []


def test_the_tables_of_the_page_are_what_the_script_prints() -> None:
    page = cost.PAGE.read_text("utf-8")
    between = page.split(cost.BEGIN)[1].split(cost.END)[0]
    assert between.strip() == cost.tables()


def small_model(layers: int) -> Transformer:
    config = TransformerConfig(layers=layers, width=256, heads=4, kv_heads=1, context_frames=2)
    return Transformer(config, TokenGrid(rows=4, cols=8, levels=(3, 3)), ActionStatistics())


def test_the_cost_of_a_model_is_counted_as_it_is_built() -> None:
    counted = cost.Model(layers=2, width=256, codes=9, rows=4, cols=8)
    built = small_model(2)
    shapes = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    assert counted.counted == _token_matrices(shapes, Path("model.safetensors"))
    trained = sum(parameter.numel() for parameter in built.parameters())
    assert counted.parameters == pytest.approx(trained, rel=0.1)


def test_activations_take_the_bytes_that_the_page_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare with the bytes that one more block keeps for the backward pass.

    The bf16 casts of its weights do not count. The C++ kernels are turned off, because they keep
    less and do not run on a GPU.
    """
    monkeypatch.setenv("DRIVESIM_NATIVE", "0")
    batch, slots, width = 4, 2 * 4 * 9, 256

    def kept(layers: int) -> int:
        model, storages = small_model(layers), {}
        own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        arguments = (
            torch.randint(9, (batch, 2, 4, 8)),
            torch.randint(9, (batch, 4, 8)),
            torch.ones(batch, dtype=torch.bool),
            torch.zeros(batch, 2, 2),
            torch.ones(batch, 2, 2, dtype=torch.bool),
        )
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model(*arguments)
        others = [tensor for address, tensor in storages.items() if address not in own]
        casts = 2 * sum(parameter.numel() for parameter in model.blocks.parameters())
        return sum(tensor.untyped_storage().nbytes() for tensor in others) - casts

    measured = (kept(2) - kept(1)) / (batch * slots * width)
    assert measured == pytest.approx(cost.ACTIVATIONS, rel=0.03)


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the peak size in bytes of all tensors that operations made and that still exist."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most: int = 0
        self._storages: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, operator: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage] = storage.nbytes()
        self.most = max(self.most, sum(self._storages.values()))
        return made


def test_logits_take_the_bytes_that_the_page_says() -> None:
    grid = TokenGrid(rows=4, cols=8, levels=(16, 16, 16))
    config = TransformerConfig(layers=1, width=16, heads=2, kv_heads=1, context_frames=2)

    def held(windows: int) -> int:
        objective = WorldModelObjective(
            InputNoiseConfig(), Transformer(config, grid, ActionStatistics())
        )
        batch = {
            "tokens": torch.randint(4096, (windows, 2, 4, 8)),
            "previous": torch.randint(4096, (windows, 4, 8)),
            "has_previous": torch.ones(windows, dtype=torch.bool),
            "actions": torch.zeros(windows, 2, 2),
            "action_valid": torch.ones(windows, 2, 2, dtype=torch.bool),
        }
        with Held() as counted:
            with torch.autocast("cpu", torch.bfloat16):
                loss, _ = objective(batch)
            loss.backward()
        return int(counted.most)

    a_window = 2 * 4 * 8 * 4096
    assert (held(12) - held(4)) / 8 / a_window == pytest.approx(cost.LOGITS, rel=0.05)


def test_sharded_models_fit_up_to_the_sizes_that_the_page_says() -> None:
    assert 4.5e10 < cost.LARGEST.parameters < 5.5e10
    assert cost.memory(cost.LARGEST, shard=True).sum < 80
    assert cost.memory(cost.Model(layers=63, width=12_288), shard=True).sum > 80
    assert cost.memory(cost.MODEL, shard=False).sum > 80
