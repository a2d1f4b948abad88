"""Sweeps, killed and resumed in real processes; the grid, its statistics, and its report; the heads of one run."""

import dataclasses
import fcntl
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT, forkserver, perturb
from PIL import Image

from convit_min import GPSA, ConViT, ConViTConfig
from experiments import grid, report, reproduce
from experiments.heads import masked
from experiments.sweep import Plan, append_run, read_run, read_runs, run_main, train_sweep
from images import normalize
from train_cifar import Config
from training.checkpoint import save_weights
from training.config import parse_flags
from training.data import InMemoryData
from training.distributed import Stopped, UserError
from weights import open_model

RUNS = {str(seed): ["--epochs", "3", "--seed", str(seed)] for seed in range(6)}

# Stands in for train_cifar.py where only the sweep is tested. An epoch takes 0.05 s.
FAKE_TRAINING = """
import json, os, signal, sys, time
from pathlib import Path

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
signal.signal(signal.SIGINT, lambda *_: os._exit(99))  # only experiments.sweep gets a Ctrl-C
flags = {name[2:].replace("-", "_"): value for name, value in zip(sys.argv, sys.argv[1:]) if name[:2] == "--"}
run = Path(flags["run"])
run.mkdir(parents=True, exist_ok=True)
resume = (run / "last.pt").exists()
assert resume == ("--resume" in sys.argv)
entry = {"command": " ".join(["python train_cifar.py", *sys.argv[1:]]), "pid": os.getpid()}
history = json.loads((run / "provenance.json").read_text()) if resume else []
(run / "provenance.json").write_text(json.dumps([*history, entry]))
(run / "config.json").write_text(json.dumps(flags))
if flags["seed"] == "-1":
    sys.exit("the loss is no longer finite")
if flags["seed"] == "-2":
    sys.exit(143)
if flags["seed"] == "-3":
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
first = json.loads((run / "last.pt").read_text()) if resume else 0
rows = (run / "metrics.jsonl").read_text().splitlines()[:first] if resume else []
for epoch in range(first, int(flags["epochs"]) + 1):
    time.sleep(9 if (flags["seed"], epoch, resume) == ("1", 1, False) else 0.05)  # where a test kills it
    row = {"epoch": epoch, "test_accuracy": epoch + float(flags["seed"]), "heads": {}}
    rows.append(json.dumps(row))
    (run / "metrics.jsonl").write_text("\\n".join(rows) + "\\n")
    (run / "last.tmp").write_text(json.dumps(epoch + 1))
    os.replace(run / "last.tmp", run / "last.pt")
    if stopped:
        print("saved", flush=True)
        sys.exit(143)
"""


@pytest.fixture(scope="module")
def fake_code(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "train_cifar.py").write_text(FAKE_TRAINING)
    return folder


def train_runs(folder: Path, code: Path, plan: Plan):
    """In a child process: train runs in a folder, with its output in a file."""
    output = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.setpgrp()
    sys.argv = ["sweep"]
    run_main(train_sweep, folder=folder, get_plan=lambda finished: plan, prepare=lambda name: code)


def start_sweep(folder: Path, code: Path, plan: Plan) -> multiprocessing.Process:
    process = forkserver.Process(target=train_runs, args=(folder, code, plan))
    process.start()
    return process


def wait_for(condition, timeout: float = 60):
    """Wait until a function returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return result


def training_pid(run: Path) -> int:
    return json.loads((run / "provenance.json").read_text())[-1]["pid"]


def test_killed_sweep_is_resumed_by_two_processes(fake_code, tmp_path):
    """A run is locked even while only its training process is left; nothing is trained twice."""
    first = start_sweep(tmp_path, fake_code, RUNS)
    wait_for((tmp_path / "1" / "last.pt").exists)
    first.kill()
    pid = training_pid(tmp_path / "1")
    os.kill(pid, signal.SIGSTOP)
    processes = [start_sweep(tmp_path, fake_code, RUNS) for _ in range(2)]
    wait_for(lambda: len(read_runs(tmp_path / "runs.jsonl")) == 5)
    assert len(read_run(tmp_path / "1")["provenance"]) == 1  # both wait
    os.kill(pid, signal.SIGKILL)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0, (tmp_path / "log").read_text()
    records = read_runs(tmp_path / "runs.jsonl")
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == len(records) == 6
    assert [len(read_run(tmp_path / name)["provenance"]) for name in RUNS] == [1, 2, 1, 1, 1, 1]
    for name, record in records.items():
        assert [row["test_accuracy"] for row in record["metrics"]] == [float(name) + epoch for epoch in range(4)]
    assert "waiting for 1, which another process trains" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_passed_on_once_and_the_run_is_saved(fake_code, tmp_path, number):
    process = start_sweep(tmp_path, fake_code, {"slow": ["--epochs", "99", "--seed", "0"]})
    wait_for((tmp_path / "slow" / "last.pt").exists)
    os.killpg(process.pid, number)  # as a terminal does on Ctrl-C
    process.join(60)
    output = (tmp_path / "log").read_text()
    assert process.exitcode == 130 and output.count("saved") == 1
    assert output.endswith("sweep: stopped in the run slow; rerun the same command to resume\n")
    with pytest.raises(ProcessLookupError):
        os.kill(training_pid(tmp_path / "slow"), 0)  # it ended first
    assert not read_runs(tmp_path / "runs.jsonl")


def append_runs(file: Path, prefix: str):
    for index in range(20):
        append_run(file, {"name": f"{prefix}{index}", "padding": prefix * 20_000})
        append_run(file, {"name": f"shared{index}", "padding": ""})


def test_append_is_atomic(tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text('{"name": "first"}\n{"name": "cut off by a cr')
    assert list(read_runs(file)) == ["first"]
    processes = [forkserver.Process(target=append_runs, args=(file, prefix)) for prefix in "ab"]
    with open(file) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for process in processes:
            process.start()
        time.sleep(0.1)
        assert list(read_runs(file)) == ["first"]  # both wait
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    names = [json.loads(line)["name"] for line in file.read_text().splitlines()]
    expected = {"first"} | {f"{prefix}{index}" for prefix in ("a", "b", "shared") for index in range(20)}
    assert len(names) == len(expected) and set(names) == expected


def test_sweep_refuses_what_it_cannot_train(fake_code, tmp_path, monkeypatch):
    def refuses(plan: Plan, message: str):
        with pytest.raises(UserError, match=message):
            train_sweep(tmp_path, lambda finished: plan, lambda name: fake_code)

    refuses({"bad": ["--seed", "-1"]}, r"^the run bad failed; fix the cause, then rerun the same command")
    (tmp_path / "bad" / "last.pt").write_text("1")  # it has failed after its start: others go on
    refuses({"bad": ["--seed", "-1"], "good": ["--seed", "0", "--epochs", "1"]}, "^failed: bad; fix the cause, then")
    assert list(read_runs(tmp_path / "runs.jsonl")) == ["good"]
    for seed in ("-2", "-3"):  # a signal to the training stops all, also if it has not begun
        plan = {"stopped": ["--seed", seed], "next": ["--seed", "0"]}
        with pytest.raises(Stopped):
            train_sweep(tmp_path, lambda finished, plan=plan: plan, lambda name: fake_code)
        (tmp_path / "stopped" / "last.pt").write_text("1")
    assert not (tmp_path / "next").exists()
    append_run(tmp_path / "runs.jsonl", {"name": "done"})
    train_sweep(tmp_path, lambda finished: {"done": []})  # nothing to train
    monkeypatch.setitem(sys.modules, "fcntl", None)
    refuses({"new": ["--seed", "0"]}, "^training needs Linux or macOS; on Windows, use WSL$")
    assert list(read_runs(tmp_path / "runs.jsonl")) == ["good", "done"]
    (tmp_path / "runs.jsonl").write_text("<<<<<<< HEAD\n")
    refuses({"new": ["--seed", "0"]}, r"runs\.jsonl is damaged")


def fake_record(name: str, accuracy: float) -> dict:
    gate = None if re.search(r"(^|-)vit-", name) else 0.6
    heads = {key: [[value] * 9] * 2 for key, value in (("gate", gate), ("strength", gate), ("non_locality", 2.0))}
    metrics = [
        {"step": step, "test_accuracy": accuracy * step / 20, "train_loss": 1.0, "heads": heads} for step in (0, 10, 20)
    ]
    return {"name": name, "provenance": [{"device": "CPU", "commit": "2c4125a70c0f24b3"}], "metrics": metrics}


@pytest.fixture(scope="module")
def finished() -> dict[str, dict]:
    """A finished grid with the best learning rate 0.001, but 0.000125 for the plain ViT on all images."""

    def accuracy(name: str) -> float:
        model, _, lr = name.partition("-lr")
        return 50 - abs(float(lr) - (1.25e-4 if model == "tune-vit-100%" else 1e-3)) if model[:4] == "tune" else 60

    records = {}
    while new := [name for name, flags in grid.make_plan(records).items() if flags and name not in records]:
        records |= {name: fake_record(name, accuracy(name)) for name in new}
    return records


def write_records(records: dict[str, dict], folder: Path):
    folder.mkdir()
    (folder / "runs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records.values()))


def parse(flags: list[str], monkeypatch) -> Config:
    monkeypatch.setattr(sys, "argv", ["train_cifar.py", *flags])
    return parse_flags(Config, "")


def test_paired_runs_differ_only_in_what_is_compared(finished, monkeypatch):
    """There are 17 tuning runs, 5 seeds of 8 settings, and 3 seeds of 8 arms on the patterns."""
    configs = {name: vars(parse(flags, monkeypatch)) for name, flags in grid.make_plan(finished).items()}
    assert len(configs) == 17 + 40 + 24 and configs.keys() == finished.keys()
    assert {configs[f"vit-100%-seed{seed}"]["lr"] for seed in grid.SEEDS} == {1.25e-4}
    assert all(config["val_fraction"] == (0.1 if name[:4] == "tune" else None) for name, config in configs.items())
    arms = {name: configs[f"{name}-10%-seed0"] for name in ("convit", "vit", *grid.VARIANTS)}
    assert {name: (arm["gpsa_layers"], arm["gating"], arm["gate_init"]) for name, arm in arms.items()} == {
        "convit": (None, "learned", 1), "vit": (0, "learned", 1),
        "gates-0.5": (None, "frozen", 0), "gates-0.73": (None, "frozen", 1)}  # fmt: skip
    compared = {"lr", "data_fraction", "gpsa_layers", "gating", "gate_init", "gate_lr_scale", "pool"}
    for seed in grid.SEEDS:
        paired = [config for name, config in configs.items() if name.endswith(f"%-seed{seed}")]
        common = [{name: value for name, value in config.items() if name not in compared} for config in paired]
        assert len(common) == 8 and all(config == common[0] for config in common)
        assert common[0]["seed"] == seed and common[0]["steps_per_epoch"] * common[0]["epochs"] == 10_000


@pytest.mark.parametrize("folder", ["evidence", "evidence-cpu"])
def test_finished_runs_have_the_flags_of_the_plan(folder, monkeypatch):
    plan = grid.make_plan(read_runs(ROOT / "results/evidence/runs.jsonl"))  # has the tuning runs of both
    records = read_runs(ROOT / "results" / folder / "runs.jsonl")
    page = (ROOT / "results" / folder / "README.md").read_text()
    assert f"\n{len(records)} of the {len(plan)} planned runs: " in page  # else, write the report again
    elsewhere = {"run", "data_dir", "dataset", "device", "compile", "workers", "resume"}  # where trained, or inferred
    for name in records:
        config, record = vars(parse(plan[name], monkeypatch)), records[name]["config"]
        same = {flag for flag in record if config[flag] == record[flag]}
        assert record.keys() - same <= elsewhere
        assert (record["dataset"] == "patterns") == name.startswith("patterns-")
        later = {flag: config[flag] for flag in config.keys() - record.keys()}  # flags that it did not have
        assert later.items() <= vars(Config()).items()


def test_grid_command_trains_the_missing_runs(finished, fake_code, tmp_path, run_script, monkeypatch):
    """The tuning run comes first: it decides the learning rate of the other one."""
    monkeypatch.setattr(os, "nice", lambda _: None)
    monkeypatch.setattr("experiments.sweep.CODE", fake_code)
    missing = ["tune-convit-10%-lr0.0005", "convit-10%-seed3"]
    write_records({name: record for name, record in finished.items() if name not in missing}, tmp_path / "out")
    argv = ["grid", "--out", tmp_path / "out", "--data-dir", "data/cifar10", "--compile"]
    lines = run_script(reproduce, *argv, "--list")[1].splitlines()
    assert [line.split()[:2] for line in lines if line[:4] != "done"] == [["todo", missing[0]], ["wait", missing[1]]]
    assert "--compile" not in run_script(reproduce, *argv[:-1], "--list")[1]
    with open(tmp_path / "out" / f"{missing[0]}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as if another process trained it: the other run has to wait
        threading.Timer(0.3, lambda: fcntl.flock(lock, fcntl.LOCK_UN)).start()
        status, output = run_script(reproduce, *argv)
    assert status == 0, output
    records = read_runs(tmp_path / "out/runs.jsonl")
    for name, flags in zip(
        missing,
        ("--seed 100 --val-fraction 0.1 --epochs 2 --warmup-epochs 0.2", "--seed 3 --epochs 4 --warmup-epochs 0.4"),
        strict=True,
    ):
        recipe = f"{grid.RECIPE} --data-fraction 0.1 --lr 0.0005 {flags} --data-dir data/cifar10 --compile"
        command = f"python train_cifar.py {recipe} --run {tmp_path / 'out' / name}"
        assert records[name]["provenance"][0]["command"] == command
    assert len(records) == len(finished) and run_script(reproduce, *argv)[0] == 0  # nothing left to train


def test_verdicts_and_intervals():
    assert report.half_interval([3, 4, 5]) == pytest.approx(2.4841, abs=1e-4)  # t = 4.3027, standard error 1 / sqrt(3)
    assert math.isnan(report.half_interval([1.0]))
    assert report.verdict(0.04, 0.01) == "different, by less than 1.5 points"
    assert report.verdict(0.06, 0.01) == "equivalent within 1.5 points"
    assert report.verdict(0.04, 0.5) == "different"
    assert report.verdict(0.06, 0.5) == "undecided"


def test_holm_adjusts_each_p_by_its_rank():
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([1, 0.9, 0.02]) == pytest.approx([1, 1, 0.06])


@pytest.mark.filterwarnings("error")
def test_report_of_tuning_runs_alone(finished, tmp_path, run_script):
    undecided = "tune-vit-10%-lr0.002"
    tuning = {name: record for name, record in finished.items() if name[:4] == "tune" and name != undecided}
    write_records(tuning, tmp_path / "out")
    assert run_script(reproduce, "report", "--out", tmp_path / "out")[0] == 0
    text = (tmp_path / "out/README.md").read_text()
    assert f"\n{len(tuning)} of the {len(finished)} planned runs: " in text
    assert "| ConViT - plain ViT, 10% | 0 of 5 |\n" in text and "| each seed |" not in text
    assert "| ConViT | 10% | 0.001 | 50.0 | yes |" in text and "| ConViT | 10% | 0.002 | 50.0 |  |" in text
    assert "| plain ViT | 10% | 0.001 | 50.0 |  |" in text and "| plain ViT | 100% | 0.000125 | 50.0 | yes |" in text
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"runs.jsonl", "README.md"}


@pytest.mark.filterwarnings("error")
def test_report_of_an_unfinished_grid(tmp_path, run_script):
    """Three pairs of one contrast, one pair of two, none of the last; a seed and an arm without their partners."""
    accuracy = {
        "convit-10%": {0: 60, 1: 61, 2: 62, 4: 0},
        "vit-10%": {2: 57, 0: 56, 1: 58},
        "gates-0.5-10%": {0: 59, 3: 0},
    }
    accuracy |= {
        "convit-100%": {0: 70},
        "vit-100%": {0: 66},
        "vit-pool-mean-10%": {1: 50},
        "patterns-learned": {0: 100, 1: 50},
    }
    names = {f"{setting}-seed{seed}": value for setting, runs in accuracy.items() for seed, value in runs.items()}
    write_records({name: fake_record(name, value) for name, value in names.items()}, tmp_path / "out")
    assert run_script(reproduce, "report", "--out", tmp_path / "out")[0] == 0
    text = (tmp_path / "out/README.md").read_text()
    assert "| plain ViT | 10% | 57.0 ± 2.5 | 3 | 56.0, 58.0, 57.0 |\n" in text
    assert "| ConViT | 100% | 70.0 | 1 | 70.0 |\n" in text and "| plain ViT, mean pooling | 10% | 50.0 | 1 |" in text
    contrasts = re.findall(r"^\| (.*) \| (\d of 5) \|(.*)", text, re.MULTILINE)
    assert [pairs for _, pairs, _ in contrasts] == ["3 of 5", "1 of 5", "1 of 5", "0 of 5"]
    assert contrasts[0][2] == " +4.0 (+1.5 to +6.5) | 0.0202 | 0.0808 | 0.975 | undecided |"
    assert not any(rest for *_, rest in contrasts[1:])
    assert "| learned | 20, never | 100.0, 50.0 | 1.000, 1.000 |" in text
    for name in ("accuracy", "curves", "heads"):
        with Image.open(tmp_path / f"out/{name}.png") as plot:
            plot.verify()


@pytest.mark.filterwarnings("error")
def test_report_of_the_finished_grid(finished, tmp_path, run_script):
    """Every setting has a label, and every contrast all of its pairs; a modified checkout is named as such."""
    means = {"vit-10%": 56, "convit-100%": 71, "vit-100%": 66}

    def accuracy(name: str) -> float:
        setting, _, seed = name.rpartition("-seed")
        return means.get(setting, 60) + math.sin(len(name) * int(seed)) / 100

    records = {name: fake_record(name, accuracy(name)) if "-seed" in name else finished[name] for name in finished}
    records["convit-10%-seed0"]["provenance"][0]["commit"] += "-dirty"
    write_records(records, tmp_path / "out")
    assert run_script(reproduce, "report", "--out", tmp_path / "out")[0] == 0
    text = (tmp_path / "out/README.md").read_text()
    assert f"\n{len(finished)} of the {len(finished)} planned runs: " in text
    assert "trained 81 on CPU at 2c4125a, 2c4125a-dirty. " in text
    contrasts = re.findall(r"^\| .* \| 5 of 5 \| (\S+) .* \| (.*) \|$", text, re.MULTILINE)
    expected = ["+4.0", "different"], ["-1.0", "different, by less than 1.5 points"]
    assert [list(contrast) for contrast in contrasts[:2]] == list(expected)
    assert [verdict for _, verdict in contrasts[2:]] == ["equivalent within 1.5 points"] * 2
    assert all(f"| {label} | 10% |" in text for label in report.LABELS.values())
    assert all(f"\n| {arm} | " in text for arm in grid.PATTERN_ARMS)


def test_gates_of_the_demo(tmp_path, run_script):
    """The committed table, from any images of its classes."""
    model = open_model(DEMO)
    for folder, name in itertools.product(("train", "test"), model.classes):
        (tmp_path / folder / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), "gray").save(tmp_path / folder / name / "0.png")
    argv = ["gates", "--run", DEMO, "--data-dir", tmp_path, "--out", tmp_path / "out"]
    assert run_script(reproduce, *argv)[0] == 0
    tables = [
        (folder / "gates.md").read_text().split("\n\n")[0] for folder in (tmp_path / "out", ROOT / "results/reproduce")
    ]
    assert tables[0] == tables[1] and tables[0].count("\n") == 8
    record = json.loads((tmp_path / "out/gates.json").read_text())
    patches = list(itertools.product(range(8), repeat=2))
    assert record["uniform"] == pytest.approx(np.mean([math.dist(one, other) for one in patches for other in patches]))
    with Image.open(tmp_path / "out/gates.png") as plot:
        plot.verify()


def reference_logits(model: ConViT, image: torch.Tensor, pos_embed: bool, content: int, position: int) -> torch.Tensor:
    """The model on one image from the equations alone, head by head, with some parts masked."""
    x = model.patch_embed(image[None])[0].permute(1, 2, 0)  # Y X c
    rows, columns, dim = x.shape
    patches = [(y, x) for y in range(rows) for x in range(columns)]
    deltas = [[(key[1] - query[1], key[0] - query[0]) for key in patches] for query in patches]
    offsets = torch.tensor([[(dx, dy, dx**2 + dy**2) for dx, dy in row] for row in deltas], dtype=torch.float32)
    x = x.reshape(-1, dim) + (0 if pos_embed else model.pos_embed[0])
    for index, block in enumerate(model.blocks):
        gated = isinstance(block.attn, GPSA)
        if index == model.config.gpsa_layers:
            x = torch.cat([model.cls_token[0], x])
        y = block.norm1(x)
        if gated:
            q, k, v = *block.attn.qk(y).chunk(2, dim=1), block.attn.v(y)
        else:
            q, k, v = block.attn.qkv(y).chunk(3, dim=1)
        outputs, d = [], dim // model.config.num_heads
        for head in range(model.config.num_heads):
            channels = slice(head * d, (head + 1) * d)
            weights = (q[:, channels] @ k[:, channels].T / math.sqrt(d)).softmax(dim=1)
            if gated:
                scores = offsets @ block.attn.pos_proj.weight[head]
                gate = block.attn.gating_param[head].sigmoid()
                gate = 1 if index < content else 0 if index < position else gate
                weights = (1 - gate) * weights + gate * scores.softmax(dim=1)
            outputs.append(weights @ v[:, channels])
        x = x + block.attn.proj(torch.cat(outputs, dim=1))
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[0])


def save_run(model: ConViT, run: Path) -> Path:
    (run / "snapshots").mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    save_weights(model, ["bright", "dark"], 1.0, 3, run / "snapshots/epoch_0003.pt")
    return run


TINY = ConViTConfig(img_size=16, patch_size=4, num_classes=2, dim=36, num_heads=9, depth=3, gpsa_layers=2)


@torch.no_grad()
def test_masking_matches_the_reference(tree, run_script, tmp_path):
    model = perturb(ConViT(TINY))
    data = InMemoryData(Config(data_dir=str(tree), img_size=16, eval=True), torch.device("cpu"))
    images, labels = normalize(data.test.images), data.test.labels
    logits = model(images)
    model.head.bias[0] += (logits[:, 1] - logits[:, 0]).quantile(0.5)  # half of the images per class, none in between

    def expected(**parts) -> float:
        parts = {"pos_embed": False, "content": 0, "position": 0} | parts
        reference = torch.stack([reference_logits(model, image, **parts) for image in images])
        torch.testing.assert_close(masked(model, **parts)(images), reference, atol=1e-4, rtol=1e-4)
        return 100 * (reference.argmax(1) == labels).float().mean().item()

    run = save_run(model, tmp_path / "run")
    assert run_script(reproduce, "masking", "--run", run, "--data-dir", tree, "--out", tmp_path / "mine")[0] == 0
    record = json.loads((tmp_path / "mine/masking.json").read_text())
    assert record["position_embedding_masked"] == pytest.approx(expected(pos_embed=True))
    curves = record["masked_in_first_layers"]
    for part, accuracy in curves.items():
        assert accuracy == pytest.approx([expected(**{part: count}) for count in range(3)])
    assert len({*curves["content"], *curves["position"]}) > 1  # masking has an effect here
    last = " | ".join(f"{curve[2]:.1f}" for curve in curves.values())
    assert f"\n| 2 | {last} |\n" in (tmp_path / "mine/masking.md").read_text()


def test_comparison_gives_the_committed_tables(tmp_path, run_script):
    for name, runs in (("tuning", []), ("tiny-imagenet-50", []), ("cifar10", [DEMO])):
        committed = (ROOT / "results" / name / "README.md").read_text()
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / "results" / name / "runs.jsonl", tmp_path / name)
        assert run_script(reproduce, "compare", tmp_path / name, *runs)[0] == 0
        table = (tmp_path / name / "README.md").read_text().split("\n\n")[0]
        assert table == committed.split("\n\n")[0] and table.count("\n") > 2
        with Image.open(tmp_path / name / "compare.png") as plot:
            plot.verify()


@pytest.mark.parametrize("folder", ["evidence", "evidence-cpu"])
def test_report_is_that_of_the_runs(folder, run_script, tmp_path):
    committed = ROOT / "results" / folder
    shutil.copy(committed / "runs.jsonl", tmp_path)
    assert run_script(reproduce, "report", "--out", tmp_path)[0] == 0
    pages = [(folder / "README.md").read_text().split("\n\n", 3)[3] for folder in (committed, tmp_path)]
    assert pages[0] == pages[1]  # but for the commands and machines above


def test_gates_of_a_run_in_its_first_epoch(tree, run_script, tmp_path):
    run = save_run(perturb(ConViT(TINY)), tmp_path / "run")  # a single snapshot
    heads = {"gate": [[0.6] * 9, [0.2] * 9, [None] * 9], "non_locality": [[2.0] * 9] * 3}
    (run / "metrics.jsonl").write_text(json.dumps({"epoch": 3, "heads": heads}) + "\n")
    status, output = run_script(reproduce, "gates", "--run", run, "--data-dir", tree, "--out", tmp_path)
    assert status == 0 and "2 classes; run, cpu" in output and "| 2 | 0.20 | 0.20 | 0.20 | 2.00 | 2.00 |" in output
    with Image.open(tmp_path / "gates.png") as plot:
        plot.verify()


def test_user_errors_are_one_sentence(tree, tmp_path, run_script, monkeypatch):
    def error(*argv) -> str:
        status, output = run_script(
            reproduce, *argv, *(["--data-dir", tree] if argv[0] in ("gates", "masking") else [])
        )
        assert status == 1 and "Traceback" not in output
        return output

    assert "typo has no snapshots; pass a run folder" in error("gates", "--run", "typo")
    assert "the evaluation images have classes that" in error("masking", "--run", DEMO)
    plain = save_run(ConViT(dataclasses.replace(TINY, gpsa_layers=0)), tmp_path / "plain")
    not_loaded = ["--dataset", "cifar100"]
    assert "plain is a plain ViT: it has no gates" in error("gates", "--run", plain, *not_loaded)
    assert "has no runs.jsonl with finished runs" in error("compare", tree)
    assert "typo is not a run folder of train_cifar.py" in error("compare", ROOT / "results/tuning", "typo")
    assert "compare them separately" in error("compare", ROOT / "results/tuning", DEMO)  # one has no validation split
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert "the report needs a package: pip install scipy" in error("report")


@pytest.mark.parametrize("argv", [[], ["grid"], ["report"], ["gates"], ["masking"], ["compare"]])
def test_help(argv, run_script):
    assert run_script(reproduce, *argv, "--help")[0] == 0
