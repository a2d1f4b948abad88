"""docs/exercises.md: every change does what its text says, and experiments.exercises trains it."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from einops import rearrange
from PIL import Image

from analysis import read_metrics
from experiments import exercises
from experiments.exercises import apply_diff, parse_exercises
from experiments.report import format_mean_std
from experiments.sweep import Sweep
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
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(8):
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
    cells = json.loads((RESULTS / "exercises.json").read_text())["cells"]
    records = Sweep(RESULTS / "runs.jsonl", RESULTS).records()
    exercise = EXERCISES[number]
    result = next(cell for cell in cells if cell["row"] == exercise.title)
    accuracy = []
    for seed, name in enumerate(result["runs"]):
        assert name == exercise.run(seed).name
        assert records[name]["definition"] == exercise.run(seed).definition
        accuracy.append(records[name]["metrics"][-1]["test_accuracy"])
    assert accuracy and result["accuracy"] == accuracy
    section = re.split(r"^## \d+\. ", TEXT, flags=re.MULTILINE)[1 + list(EXERCISES).index(number)]
    mean_std = re.sub(r" \((\d+)\)%$", r"% (\1 seeds)", f"{format_mean_std(result)}%")
    assert f"</summary>\n\n{mean_std}" in section
    for words in re.findall(r"mean gate ([\d.]+)", section):
        assert words == f"{result['mean_gate']:.2f}"


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


def start(folder: Path, *argv) -> subprocess.Popen:
    """`python -m experiments.exercises ARGV` in a folder, with the text that is there."""
    code = "from experiments import exercises; exercises.TEXT = exercises.Path('exercises.md'); exercises.main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_killed_exercises_are_resumed(tree, tmp_path, monkeypatch, capsys):
    """With the real train_cifar.py; both it and experiments.exercises are killed."""
    runs, before = tmp_path / "runs/sweeps/exercises", (ROOT / "convit_min.py").read_bytes()
    (tmp_path / "exercises.md").write_text(TINY.format(epochs=2))
    process = start(tmp_path, "--seeds", 1, "--data-dir", tree, "--out", "mine")
    deadline = time.monotonic() + 60
    while not (runs / "1_seed=0/last.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.stdout.read()
        time.sleep(0.01)
    children = subprocess.check_output(["pgrep", "-P", str(process.pid)], text=True).split()
    for pid in (process.pid, *map(int, children)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    first = (runs / "0_seed=0/last.pt").stat().st_mtime_ns

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exercises, "TEXT", Path("exercises.md"))
    monkeypatch.setattr(sys, "argv", ["exercises.py", "--seeds", "1", "--data-dir", str(tree), "--out", "mine"])
    exercises.main()
    output = capsys.readouterr().out
    assert "1_seed=0 (1 of 2 runs left)" in output and "0. Unchanged" not in output.split("| exercise")[0]
    assert (runs / "0_seed=0/last.pt").stat().st_mtime_ns == first
    assert (ROOT / "convit_min.py").read_bytes() == before  # only a copy is changed
    identity = torch.eye(144).half()
    for number, gate, is_identity in ((0, 1, True), (1, 0, False)):
        initial = torch.load(runs / f"{number}_seed=0/snapshots/epoch_0000.pt", weights_only=True)["model"]
        assert torch.all(initial["blocks.0.attn.gating_param"] == gate)
        assert torch.equal(initial["blocks.0.attn.v.weight"], identity) == is_identity

    results = tmp_path / "mine"
    records = Sweep(results / "runs.jsonl", results).records()
    assert [len(record["provenance"]) for record in records.values()] == [1, 2]  # the second run was resumed
    for number, result in enumerate(json.loads((results / "exercises.json").read_text())["cells"]):
        record = records[f"{number}_seed=0"]
        assert record["metrics"] == read_metrics(runs / record["name"])
        last = record["metrics"][-1]
        assert last["epoch"] == 2 and result["accuracy"] == [last["test_accuracy"]] and result["std"] is None
        gates = [gate for layer in last["heads"]["gate"] for gate in layer if gate is not None]
        assert len(gates) == 45 and result["mean_gate"] == pytest.approx(sum(gates) / 45)
        assert result["content_heads"] == sum(gate < 0.5 for gate in gates)
    with Image.open(results / "exercises.png") as plot:
        plot.verify()

    for number, epochs, message in (
        (2, 2, "exercises.md has the exercises 0, 1"),
        (1, 3, "0_seed=0 was trained with different flags or a different diff; delete its line in "),
    ):
        Path("exercises.md").write_text(TINY.format(epochs=epochs))
        monkeypatch.setattr(sys, "argv", ["exercises.py", str(number), "--out", "mine"])
        with pytest.raises(SystemExit):
            exercises.main()
        assert message in capsys.readouterr().err


def test_diff_that_does_not_apply():
    repeated = next(line for line in SOURCE.splitlines() if line and SOURCE.count(f"{line}\n") == 2)
    for hunk, count in ((" nowhere\n", 0), (f"-{repeated}\n", 2)):
        with pytest.raises(UserError, match=f"has these lines {count} times, not once"):
            apply_diff(SOURCE, hunk)


def test_exercise_without_a_command():
    with pytest.raises(UserError, match="exercise 3 needs a command"):
        parse_exercises('RECIPE="--epochs 1"\n## 3. Something\n')
