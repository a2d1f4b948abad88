"""EXERCISES.md: every change does what its text says, and exercises.py runs it as a student would."""

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

import exercises
from analysis import read_metrics
from exercises import changed, describe, read_lesson
from results.report import spell
from train_cifar import Config
from training.config import build_model
from training.flags import parse_flags

LESSON, SOURCE = ((ROOT / name).read_text() for name in ("EXERCISES.md", "convit_min.py"))
EXERCISES = {exercise.number: exercise for exercise in read_lesson(LESSON)}
each = pytest.mark.parametrize("number", EXERCISES)


def changed_model(number: int, monkeypatch) -> tuple[types.ModuleType, torch.nn.Module]:
    """The code with an exercise's change, and the model that its flags ask for, seed 0."""
    module = types.ModuleType("convit_changed")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look there
    exec(compile(changed(SOURCE, EXERCISES[number].change), "convit_changed.py", "exec"), vars(module))
    monkeypatch.setattr("training.config.create_model", module.create_model)
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", *EXERCISES[number].flags])
    torch.manual_seed(0)
    return module, build_model(parse_flags(Config, ""), 10)


@each
def test_the_changed_model_is_small_sound_and_learns(number, monkeypatch):
    lines = EXERCISES[number].change.splitlines()
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

    for block in model.blocks:  # the maps that it shows are those that its values are averaged with
        if isinstance(block.attn, module.GPSA):
            tokens = torch.randn(2, 8, 8, model.config.dim)
            output, attention = block.attn(tokens, return_attention=True)
            values = rearrange(block.attn.v(tokens), "b Y X (h d) -> b h (Y X) d", h=model.config.num_heads)
            expected = rearrange(attention.mixed @ values, "b h (Y X) d -> b Y X (h d)", Y=8)
            torch.testing.assert_close(output, block.attn.proj(expected), atol=1e-5, rtol=1e-4)


@each
def test_what_the_change_leaves_as_it_is_at_the_start(number, monkeypatch):
    """A table, a tilt of 0 and a gate held fast do nothing before training; all other changes do."""
    images = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        as_it_stands, logits = (changed_model(which, monkeypatch)[1](images) for which in (0, number))
    assert torch.allclose(as_it_stands, logits, atol=1e-5) == (number in (0, 5, 6, 8))


def test_the_head_that_may_not_leave_stays(monkeypatch):
    model = changed_model(8, monkeypatch)[1]
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    moves = torch.stack([block.attn.gating_param.grad != 0 for block in model.blocks[: model.config.gpsa_layers]])
    assert moves.logical_not().nonzero()[:, 1].tolist() == [4] * 5


@each
def test_the_numbers_in_the_text_are_those_of_runs_with_this_change(number):
    """The committed results are of the change and command that stand in the text, and the text says what they say."""
    results = json.loads((ROOT / "results/reproduce/exercises/exercises.json").read_text())["exercises"]
    exercise = EXERCISES[number]
    result = next(result for result in results if result["exercise"] == f"{number}. {exercise.title}")
    accuracy = []
    for name in result["runs"]:
        run = ROOT / "results/reproduce/exercises/runs" / name
        assert (run / "exercise.txt").read_text() == describe(exercise)
        accuracy.append(read_metrics(run)[-1]["test_accuracy"])
    assert accuracy and result["accuracy"] == accuracy
    section = re.split(r"^## \d+\. ", LESSON, flags=re.MULTILINE)[1 + list(EXERCISES).index(number)]
    assert f"What we measured</summary>\n\n{spell(result)}%" in section
    for words in re.findall(r"mean gate ([\d.]+)", section):
        assert words == f"{result['mean_gate']:.2f}"


TINY = """RECIPE="--img-size 16 --batch-size 4 --epoch-steps 3 --epochs {epochs}"
## 0. As it stands
    python train_cifar.py $RECIPE --run runs/0
## 1. Gates of a half, and no identity
```diff
-        nn.init.eye_(self.v.weight)
```
    python train_cifar.py $RECIPE --gate-init 0 --run runs/1
"""


def start(folder: Path, lesson: str, *words) -> subprocess.Popen:
    """`python exercises.py WORDS` in a folder, with another text."""
    (folder / "lesson.md").write_text(lesson)
    code = "import exercises, pathlib; exercises.LESSON = pathlib.Path('lesson.md'); exercises.main()"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, words)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


def test_exercises_killed_and_done_again(tree, tmp_path, monkeypatch):
    runs, before = tmp_path / "results/reproduce/exercises/runs", (ROOT / "convit_min.py").read_bytes()
    lesson = TINY.format(epochs=2)
    process = start(tmp_path, lesson, "--seeds", 1, "--data-dir", tree)
    deadline = time.monotonic() + 60
    while not (runs / "1_seed=0/last.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    first = (runs / "0_seed=0/last.pt").stat().st_mtime_ns

    process = start(tmp_path, lesson, "--seeds", 1, "--data-dir", tree)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "0. As it stands" not in output.split("| exercise")[0]  # it is finished
    assert (runs / "0_seed=0/last.pt").stat().st_mtime_ns == first
    assert (ROOT / "convit_min.py").read_bytes() == before  # a copy was changed
    identity = torch.eye(144).half()
    for number, gate, starts_as_identity in ((0, 1, True), (1, 0, False)):
        start_of = torch.load(runs / f"{number}_seed=0/snapshots/epoch_0000.pt", weights_only=True)["model"]
        assert torch.all(start_of["blocks.0.attn.gating_param"] == gate)
        assert torch.equal(start_of["blocks.0.attn.v.weight"], identity) == starts_as_identity

    record = json.loads((tmp_path / "results/reproduce/exercises/exercises.json").read_text())
    for number, result in enumerate(record["exercises"]):
        last = read_metrics(runs / f"{number}_seed=0")[-1]
        assert last["epoch"] == 2 and result["accuracy"] == [last["test_accuracy"]] and result["spread"] is None
        gates = [gate for layer in last["heads"]["gate"] for gate in layer if gate is not None]
        assert len(gates) == 45 and result["mean_gate"] == pytest.approx(sum(gates) / 45)
        assert result["left"] == sum(gate < 0.5 for gate in gates)
    with Image.open(tmp_path / "results/reproduce/exercises/exercises.png") as picture:
        picture.verify()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(exercises, "LESSON", Path("lesson.md"))
    for number, epochs, problem in ((2, 2, "lesson.md has the exercises 0, 1"), (1, 3, "is not what it was when")):
        Path("lesson.md").write_text(TINY.format(epochs=epochs))
        monkeypatch.setattr(sys, "argv", ["exercises.py", str(number)])
        with pytest.raises(SystemExit, match=problem):
            exercises.main()


@pytest.mark.parametrize(("lines", "times"), [(" nowhere\n", 0), ("-        self.num_heads = config.num_heads\n", 2)])
def test_a_change_that_does_not_fit_is_said(lines, times):
    with pytest.raises(ValueError, match=f"has these lines {times} times, not once"):
        changed(SOURCE, lines)


def test_an_exercise_without_a_command_is_said():
    with pytest.raises(ValueError, match="exercise 3 needs a command"):
        read_lesson('RECIPE="--epochs 1"\n## 3. Something\n')
