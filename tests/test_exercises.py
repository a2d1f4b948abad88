"""docs/exercises.md: every change does what its text says, and experiments.exercises trains it."""

import json
import math
import re
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from einops import rearrange
from PIL import Image

from analysis import read_metrics
from experiments import exercises
from experiments.exercises import Exercise, apply_diff, parse_exercises
from experiments.sweep import read_runs
from train_cifar import Config
from training.config import build_model, parse_flags
from training.distributed import UserError

RESULTS = ROOT / "results" / "reproduce" / "exercises"
TEXT, SOURCE = ((ROOT / name).read_text() for name in ("docs/exercises.md", "convit_min.py"))
EXERCISES = {exercise.number: exercise for exercise in parse_exercises(TEXT)}
each = pytest.mark.parametrize("number", EXERCISES)


def changed_model(number: int, monkeypatch) -> tuple[types.ModuleType, torch.nn.Module]:
    """convit_min.py with an exercise's diff, and the model that the exercise trains, seed 0."""
    module = types.ModuleType("convit_changed")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # for dataclasses
    exec(compile(apply_diff(SOURCE, EXERCISES[number].diff), "convit_changed.py", "exec"), vars(module))
    monkeypatch.setattr("training.config.create_model", module.create_model)
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", *EXERCISES[number].flags])
    torch.manual_seed(0)
    return module, build_model(parse_flags(Config, ""), list("0123456789"))


@each
def test_changed_model_is_correct_and_learns(number, monkeypatch):
    lines = EXERCISES[number].diff.splitlines()
    assert sum(line.startswith("+") for line in lines) <= 10
    module, model = changed_model(number, monkeypatch)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(5):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    unused = {name.split(".", 2)[-1] for name, parameter in model.named_parameters() if parameter.grad is None}
    assert unused == {"attn.pos_proj.bias"} | ({"attn.pos_proj.weight"} if number == 5 else set())

    for block in model.blocks:  # the returned maps are the weights that are applied to v
        if isinstance(block.attn, module.GPSA):
            tokens = torch.randn(2, 64, model.config.dim)
            output, attention = block.attn(tokens, (8, 8), return_attention=True)
            values = rearrange(block.attn.v(tokens), "b n (h d) -> b h n d", h=model.config.num_heads)
            expected = rearrange(attention.mixed @ values, "b h n d -> b n (h d)")
            torch.testing.assert_close(output, block.attn.proj(expected), atol=1e-5, rtol=1e-4)


@each
def test_which_changes_alter_the_untrained_model(number, monkeypatch):
    """A table, a tilt of 0 and a detached gate do nothing before training; all other changes do."""
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        unchanged, logits = (changed_model(which, monkeypatch)[1](images) for which in (0, number))
    assert torch.allclose(unchanged, logits, atol=1e-5) == (number in (0, 5, 6, 8))


def test_gate_of_the_center_tap_is_not_trained_in_exercise_8(monkeypatch):
    model = changed_model(8, monkeypatch)[1]
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    trained = torch.stack([block.attn.gating_param.grad != 0 for block in model.blocks[: model.config.gpsa_layers]])
    assert trained.logical_not().nonzero()[:, 1].tolist() == [4] * 5


@each
def test_numbers_in_the_text_are_those_of_the_runs(number):
    """The finished runs have the flags and the diff of the text, and the text has their results."""
    exercise, records = EXERCISES[number], read_runs(RESULTS / "runs.jsonl")
    result = json.loads((RESULTS / "exercises.json").read_text())["exercises"][exercise.title]
    for seed, (name, accuracy) in enumerate(zip(result["runs"], result["accuracy"], strict=True)):
        assert name == f"{exercise.key}-seed{seed}"
        assert records[name]["metrics"][-1]["test_accuracy"] == accuracy
    row = next(
        line for line in (RESULTS / "exercises.md").read_text().splitlines() if line.startswith(f"| {exercise.title} |")
    )
    mean_std, differences, mean_gate, _, heads = row.removesuffix(" |").split(" | ")[1:]
    baseline = {seed: records[f"{EXERCISES[0].key}-seed{seed}"]["metrics"][-1]["test_accuracy"] for seed in (0, 1)}
    pairs = [f"{value - baseline[seed]:+.1f}" for seed, value in enumerate(result["accuracy"])]
    assert differences == ", ".join(pairs if number else [])
    section = re.split(r"^## \d+\. ", TEXT, flags=re.MULTILINE)[1 + list(EXERCISES).index(number)]
    percent = re.sub(r" \((\d+)\)%$", r"% (\1 seeds)", f"{mean_std}%")
    assert f"</summary>\n\n{percent}, mean gate {mean_gate}" in section
    assert re.search(rf"\b{float(heads):g}( of 45)? heads? (below 0\.5|end content-dominated)", section)


def test_table_is_that_of_the_runs(tmp_path):
    shutil.copy(RESULTS / "runs.jsonl", tmp_path)
    exercises.write_results(EXERCISES, tmp_path)
    tables = [(folder / "exercises.md").read_text().split("\n\n")[0] for folder in (RESULTS, tmp_path)]
    assert tables[0] == tables[1]


def test_runs_of_other_parameters_are_to_be_opened_alone(monkeypatch):
    """The introduction lists the changes with which the viewer cannot open the baseline's weights."""
    changed, unchanged = [], changed_model(0, monkeypatch)[1]
    for number in EXERCISES:
        module, _ = changed_model(number, monkeypatch)
        try:
            module.ConViT(module.ConViTConfig(**vars(unchanged.config))).load_state_dict(unchanged.state_dict())
        except (RuntimeError, ValueError):
            changed.append(number)
    listed = re.search(r"Exercises ([\d, and]+) change the parameters", " ".join(TEXT.split()))[1]
    assert changed == list(map(int, re.findall(r"\d+", listed)))


def test_wide_heads_of_exercise_4():
    """Distance and strength of the heads above and below the query patch, in layers 3 to 5."""
    heads = read_runs(RESULTS / "runs.jsonl")[f"{EXERCISES[4].key}-seed0"]["metrics"][-1]["heads"]
    distances, strengths = (
        [value(heads[name][layer][head]) for layer in (2, 3, 4) for head in (3, 5)]
        for name, value in (("center", lambda center: math.hypot(*center)), ("strength", float))
    )
    text = " ".join(TEXT.split())
    assert f"to a distance of {min(distances):.1f} to {max(distances):.1f} patches" in text
    assert f"(strength {min(strengths):.2f} to {max(strengths):.2f})" in text


IDENTITY = next(line for line in SOURCE.splitlines() if "nn.init.eye_" in line)
TINY = f"""RECIPE="--img-size 16 --batch-size 4 --steps-per-epoch 3 --epochs {{epochs}}"
## 0. Unchanged
    python train_cifar.py $RECIPE --run runs/0
## 1. Gates of 0.5, and no identity
```diff
-{IDENTITY}
```
    python train_cifar.py $RECIPE --gate-init 0 --run runs/1
"""


def test_exercise_is_trained_with_its_diff_and_flags(tree, tmp_path, run_script, monkeypatch):
    """With the real train_cifar.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exercises, "TEXT", Path("exercises.md"))
    Path("exercises.md").write_text(TINY.format(epochs=1))
    argv = ["--seeds", "1", "--data-dir", tree, "--out", "mine"]
    for _ in range(2):  # the second time, nothing is left to train
        status, output = run_script(exercises, "1", *argv)
        assert status == 0, output
    assert (ROOT / "convit_min.py").read_text() == SOURCE  # only a copy is changed
    (run,) = Path("mine").glob("1-*-seed0")
    initial = torch.load(run / "snapshots/epoch_0000.pt", weights_only=True)["model"]
    assert torch.all(initial["blocks.0.attn.gating_param"] == 0)
    assert not torch.equal(initial["blocks.0.attn.v.weight"], torch.eye(144).half())

    (record,) = read_runs(Path("mine/runs.jsonl")).values()
    assert record["metrics"] == read_metrics(run) and len(record["provenance"]) == 1
    result = json.loads(Path("mine/exercises.json").read_text())["exercises"]["1. Gates of 0.5, and no identity"]
    last = record["metrics"][-1]
    gates = [gate for layer in last["heads"]["gate"] for gate in layer if gate is not None]
    assert len(gates) == 45 and result["mean_gate"] == pytest.approx(sum(gates) / 45)
    assert result["content_heads"] == sum(gate < 0.5 for gate in gates)
    assert result["accuracy"] == [last["test_accuracy"]]
    assert (
        f"| 1. Gates of 0.5, and no identity | {last['test_accuracy']:.1f} |  | 0.5"
        in Path("mine/exercises.md").read_text()
    )
    with Image.open("mine/exercises.png") as plot:
        plot.verify()

    status, output = run_script(exercises, 2, *argv)
    assert status == 1 and "exercises.md has the exercises 0, 1" in output


def test_changed_exercise_is_trained_again():
    """A changed flag or line makes its runs new ones; a changed context does not."""

    def key(flags: str, diff: str) -> str:
        return Exercise(3, "3. A title", diff, flags.split()).key

    old = key("--lr 1", " same\n-old\n+new\n")
    assert key("--lr 1", " renamed\n-old\n+new\n") == old
    assert len({old, key("--lr 2", " same\n-old\n+new\n"), key("--lr 1", " same\n-old\n+newer\n")}) == 3


def test_diff_that_does_not_apply():
    repeated = next(line for line in SOURCE.splitlines() if line and SOURCE.count(f"{line}\n") == 2)
    for hunk, count in ((" nowhere\n", 0), (f"-{repeated}\n", 2)):
        with pytest.raises(UserError, match=f"has these lines {count} times, not once"):
            apply_diff(SOURCE, hunk)


def test_exercise_without_a_command():
    with pytest.raises(UserError, match="exercise 3 needs a command"):
        parse_exercises('RECIPE="--epochs 1"\n## 3. Something\n')


def test_heads_that_the_text_names():
    """Of seed 0; head 5 is the center tap."""
    records = read_runs(RESULTS / "runs.jsonl")
    last = {number: records[f"{EXERCISES[number].key}-seed0"]["metrics"][-1] for number in (0, 2, 3, 10)}
    low = {number: np.argwhere(np.array(last[number]["heads"]["gate"][:5]) < 0.5).tolist() for number in (0, 2)}
    assert low[2] == [[layer, 4] for layer in (1, 2, 3, 4)]  # "the center taps of layers 2 to 5"
    assert sum(head == 4 for _, head in low[0]) == 1  # "only one of the five center taps"
    assert max(abs(y) for layer in last[3]["heads"]["center"][:5] for _, y in layer) < 0.2  # "stay within 0.2 patches"
    points = last[0]["test_accuracy"] - last[10]["test_accuracy"]
    assert f"{points:.1f} points less than with a class token" in " ".join(TEXT.split())
