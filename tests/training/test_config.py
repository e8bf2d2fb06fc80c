"""RunSpec: one description of a run, made from arguments, YAML or run.json, and dumped as JSON or code."""

import json

import pytest
import torch

import saewb
from saewb.training.code_export import train_code
from saewb.training.config import DataConfig, RunConfig, RunSpec, trainees

SAES = {
    "a": saewb.Trainee(saewb.Matryoshka(24, k=4, widths=(8, 16)), read="x", write="y", lr=1e-3, seed=3),
    "b": saewb.JumpReLU(24, l0=0.1, target_l0=5.0),
}
OPTIONS = {
    "n_tokens": 4000,
    "batch_tokens": 400,
    "betas": (0.8, 0.99),
    "autocast": torch.bfloat16,
    "clip": None,
    "skip_special_tokens": [1, 4],
    "keep_saes": True,
    "log_every_steps": 2,
}


@pytest.fixture
def spec():
    return RunSpec.from_options(SAES, hook="x", positions=slice(1, None, 2), **OPTIONS)


def test_arguments_are_sorted_by_what_they_are_for(spec):
    assert spec.train == saewb.TrainConfig(4000, 400, betas=(0.8, 0.99), autocast=torch.bfloat16, clip=None)
    assert spec.data == DataConfig(skip_special_tokens=[1, 4], positions=(1, None, 2))
    assert spec.run == RunConfig(keep_saes=True, log_every_steps=2)
    assert spec.saes["a"] == SAES["a"]
    assert spec.saes["b"] == saewb.Trainee(SAES["b"], read="x")
    assert spec.points == ["x", "y"]
    assert spec.buffer_tokens == 4000
    assert [sae.location for sae in spec.saes.values()] == ["x => y", "x"]


def test_json_and_back(spec):
    spec = spec.with_widths({"x": 8, "y": 4})
    content = json.loads(json.dumps(spec.to_dict()))
    assert (content["saewb_run"], content["train"]["autocast"]) == (2, "torch.bfloat16")
    assert content["saes"]["a"]["objective"] == "Matryoshka"
    assert RunSpec.from_dict(content) == spec


def test_text_as_yaml_has_it():
    saes = trainees({"a": saewb.Trainee.from_dict({"objective": "TopK", "d_sae": "64", "hook": "x", "lr": "1e-3"})})
    assert saes == {"a": saewb.Trainee(saewb.TopK(64), read="x", lr=1e-3)}
    spec = RunSpec.from_options(saes, n_tokens="10_000", lr="3e-4", betas=[0.9, 0.99], strict=False)
    assert spec.train == saewb.TrainConfig(10_000, lr=3e-4, betas=(0.9, 0.99))
    with pytest.raises(ValueError, match="TrainConfig got lr='3e-4'"):
        RunSpec.from_options(saes, n_tokens=10_000, lr="3e-4")


def test_code_and_back(spec):
    calls = []
    code = train_code(spec, folder="runs/a").replace("saewb.train(", "record(")
    exec(code, {"record": lambda *args, **how: calls.append((args, how)), "model": 0, "tokens": 1, "torch": torch})
    ((_, _, saes), options) = calls[0]
    assert options.pop("folder") == "runs/a"
    assert RunSpec.from_options(saes, **options) == spec


@pytest.mark.parametrize(
    ("part", "name", "value", "says"),
    [
        ("train", "lr", -1, "TrainConfig got lr=-1.\n  want: a positive number"),
        ("train", "learning_rate", 1, "TrainConfig has no learning_rate"),
        ("data", "prefetch", "x", "DataConfig got prefetch='x'"),
        ("saes", "a", {"objective": "TopQ"}, "got objective 'TopQ'.\n  near: TopK"),
        ("saes", "a", {"objective": "TopK", "d_sae": 8, "k": 9}, "TopK got k=9"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(spec, part, name, value, says):
    content = spec.to_dict()
    content[part][name] = value
    with pytest.raises((ValueError, TypeError), match=says):
        RunSpec.from_dict(content)


def test_format_1_is_read(spec):
    content = spec.to_dict()
    content = {"saewb_run": 1, **{k: content[k] for k in ("saes", "model", "widths")}} | {
        old: content[new] for old, new in (("config", "train"), ("reading", "data"), ("options", "run"))
    }
    del content["config"]["normalization"]
    content["config"]["normalisation"] = "centred"
    assert RunSpec.from_dict(content) == spec
