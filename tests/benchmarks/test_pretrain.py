from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from benchmarks import pretrain
from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.engine.run_folder import find_run
from driving_sim.env import DriveEnv, KeepLane, never
from driving_sim.evaluate.world_model import QUICK
from driving_sim.world_model import WorldModel
from driving_sim.world_model.contexts import contexts_of, load_context

WORLD = SyntheticConfig(height=64, width=128, fps=5.0)
RECIPE = pretrain.Recipe(
    drives=3,
    heldout_drives=2,
    seconds=8.0,
    world=WORLD,
    training_world=replace(WORLD, stops_s=(0.5, 2.0)),
    preset="demo",
    every=1,
    tokenizer=("training.steps=2", "training.minutes=null", "training.min_steps=null"),
    world_model_steps=(2, 3),
    world_model=("training.minutes=null", "training.min_steps=null"),
    contexts=(("early", 3, 0.0), ("late", 4, 4.0)),
    probe_worlds=2,
    probe_steps=2,
    evaluation=replace(
        QUICK, clips=1, long_rollouts=1, long_seconds=5.0, standing_seconds=2.0, probe_steps=10
    ),
)


def test_the_recipe_makes_a_packaged_model_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pretrain.pretrain(tmp_path / "work", RECIPE)
    card = (model / "card.md").read_text("utf-8")
    weights = (model / "model.safetensors").read_bytes()
    second = yaml.safe_load((tmp_path / "work" / "world-model-2" / "config.yaml").read_text())
    assert second["init_from"] == str(tmp_path / "work" / "world-model")
    trained = load_file(tmp_path / "work" / "world-model-2" / "model.safetensors")
    for name, value in load_file(model / "model.safetensors").items():
        assert torch.equal(value, trained[name].bfloat16().to(value.dtype))
    assert "3 drives of 8 s" in card
    assert "the world model 2 and then, from these weights, 3," in card
    assert "| bits per token |" in card
    assert "Lane probe" in card
    assert "{" not in card
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.mp4")}
    assert pretrain.pretrain(tmp_path / "work", RECIPE) == model  # only packs it again
    for part in ("videos", "heldout"):
        for path in (tmp_path / "work" / part).glob("*.mp4"):
            assert made[path] == path.stat().st_mtime_ns
    assert (model / "model.safetensors").read_bytes() == weights
    packaged = tmp_path / "models" / "synthetic"
    monkeypatch.setattr(pretrain, "PACKAGED", packaged)
    pretrain.install(model)
    pretrain.install(model)
    world = WorldModel.from_run(find_run(packaged), "cpu")
    assert world.fingerprint in card
    context = load_context(world, contexts_of(packaged)["late"])
    world.drive(context).step([3.0, 0.0])
    env = DriveEnv(packaged, reward=KeepLane(), end=never)
    env.reset(seed=0)
    env.step([0.0, 0.0])
