"""experiments.sweep and experiments.reproduce: real processes, killed and resumed; numbers against slow references."""

import dataclasses
import fcntl
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, perturb
from PIL import Image

import train_cifar
from analysis import read_metrics
from convit_min import GPSA, ConViT, ConViTConfig
from experiments import migrate, reproduce, sweep
from experiments.reproduce import BUDGETS, masked, seed_runs, tables
from experiments.sweep import RunSpec, Sweep, read_run
from images import normalize
from training.checkpoint import save_weights
from training.config import build_model, parse_flags
from training.data import InMemoryData
from training.distributed import UserError

server = multiprocessing.get_context("forkserver")  # its processes have imported everything: they start in milliseconds
server.set_forkserver_preload(["experiments.reproduce", "train_imagenet"])  # test_faults.py uses the same server
FLAGS = ["sample-efficiency", "--budget", "smoke", "--lr", "0.001", "--data-dir"]

# Stands in for train_cifar.py where only the sweep is tested. An epoch takes 0.1 s, or 1 s with --lr 0.5.
FAKE_TRAINING = """
import hashlib, json, os, signal, sys, time
from pathlib import Path

stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
signal.signal(signal.SIGINT, lambda *_: os._exit(99))  # only experiments.sweep gets a Ctrl-C
words, flags = sys.argv[1:], {}
while words:
    name, _, value = words.pop(0).removeprefix("--").partition("=")
    if not value and words and not words[0].startswith("--"):
        value = words.pop(0)
    flag = name.removeprefix("no-").replace("-", "_")
    try:
        flags[flag] = json.loads(value)
    except ValueError:
        flags[flag] = value or flag == name
resume, run = flags.pop("resume", False), Path(flags["run"])
run.mkdir(parents=True, exist_ok=True)
assert resume == (run / "last.pt").exists()
entry = {"command": " ".join(["python train_cifar.py", *sys.argv[1:]]), "device": "CPU", "machine": "x86_64",
         "python": "3", "torch": "2", "torchvision": "0", "pid": os.getpid()}
history = json.loads((run / "provenance.json").read_text()) if resume else []
(run / "provenance.json").write_text(json.dumps([*history, entry]))
(run / "config.json").write_text(json.dumps({"val_fraction": None} | flags))
if flags["lr"] > 1:
    sys.exit("the loss is no longer finite")
seed = {name: value for name, value in flags.items() if name not in ("run", "data_dir")}
first = json.loads((run / "last.pt").read_text()) if resume else 0
rows = (run / "metrics.jsonl").read_text().splitlines(keepends=True)[:first] if resume else []
for epoch in range(first, flags["epochs"] + 1):
    time.sleep(1 if flags["lr"] == 0.5 else 0.1)
    accuracy = int(hashlib.sha256(repr((seed, epoch)).encode()).hexdigest()[:4], 16) / 1000
    row = {"epoch": epoch, "step": epoch * flags["steps_per_epoch"], "test_accuracy": accuracy}
    rows.append(json.dumps(row) + "\\n")
    (run / "metrics.jsonl").write_text("".join(rows))
    (run / "last.tmp").write_text(json.dumps(epoch + 1))
    os.replace(run / "last.tmp", run / "last.pt")
    if stopped:
        print("saved", flush=True)
        sys.exit(143)
"""


def run_main(folder: Path, code: Path, argv: list[str]):
    """In a child process: `python -m experiments.reproduce ARGV` in a folder, with the training script in `code`."""
    output = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.setpgrp()
    os.chdir(folder)
    sweep.CODE = code
    sys.argv = ["reproduce.py", *argv]
    reproduce.main()


class Reproduce:
    """experiments.reproduce in a process of its own."""

    def __init__(self, folder: Path, code: Path, *argv):
        self.log, self.folder = folder / "log", folder
        self.process = server.Process(target=run_main, args=(folder, code, [str(word) for word in argv]))
        self.process.start()

    def wait(self) -> tuple[int, str]:
        """Its exit status and the output of all processes in its folder."""
        self.process.join(120)
        assert self.process.exitcode is not None, "it hangs"
        return self.process.exitcode, self.log.read_text()

    def wait_for_runs(self, count: int) -> list[Path]:
        """Wait until `count` runs have saved something; return their folders, the latest to save last."""
        deadline = time.monotonic() + 60
        while len(files := list(self.folder.glob("runs/sweeps/smoke/*/last.pt"))) < count:
            assert self.process.is_alive() and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.002)
        return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime_ns)]


def records_in(folder: Path) -> dict[str, dict]:
    return Sweep(folder / "results/reproduce/smoke/runs.jsonl", folder).records()


def training_pid(run: Path) -> int:
    return json.loads((run / "provenance.json").read_text())[-1]["pid"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are too small for two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fake_code(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("code")
    (folder / "train_cifar.py").write_text(FAKE_TRAINING)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tree, fake_code, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    status, output = Reproduce(folder, fake_code, *FLAGS, tree).wait()
    assert status == 0, output
    return folder


def test_interrupted_sweep_ends_with_the_same_table(tree, fake_code, uninterrupted, tmp_path):
    first = Reproduce(tmp_path, fake_code, *FLAGS, tree)
    run = first.wait_for_runs(2)[-1]
    first.process.kill()
    os.kill(training_pid(run), signal.SIGKILL)
    first.process.join()

    second = Reproduce(tmp_path, fake_code, *FLAGS, tree)
    second.wait_for_runs(4)
    os.kill(second.process.pid, signal.SIGINT)
    status, output = second.wait()
    assert status == 130 and "Traceback" not in output
    assert re.search(r"reproduce\.py: stopped in the run \S+; rerun the same command to resume\n$", output)
    finished = records_in(tmp_path)
    assert 1 < len(finished) < 10

    status, output = Reproduce(tmp_path, fake_code, *FLAGS, tree).wait()
    assert status == 0, output
    runs_left = [int(count) for count in re.findall(r" \((\d+) of 10 runs left\)$", output, re.MULTILINE)]
    assert runs_left[:2] == [10, 9] and runs_left[-10 + len(finished) :] == [*range(10 - len(finished), 0, -1)]
    records = records_in(tmp_path)
    assert {name: records[name] for name in finished} == finished  # not trained again
    assert 1 <= sum(len(record["provenance"]) == 2 for record in records.values()) <= 2  # resumed
    table, expected = (
        (folder / "results/reproduce/smoke/sample-efficiency.md").read_text() for folder in (tmp_path, uninterrupted)
    )
    assert table == expected and table.count("(2)") == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_passed_on_once_and_the_run_is_saved(tree, fake_code, tmp_path, number):
    process = Reproduce(tmp_path, fake_code, *FLAGS, tree, "--lr", "0.5")
    run = process.wait_for_runs(1)[0]
    os.killpg(process.process.pid, number)  # as a terminal does on Ctrl-C
    status, output = process.wait()
    assert status == 130 and output.count("saved") == 1
    assert output.endswith(f"stopped in the run {run.name}; rerun the same command to resume\n")
    with pytest.raises(ProcessLookupError):
        os.kill(training_pid(run), 0)  # it ended first
    assert len(read_metrics(run)) == json.loads((run / "last.pt").read_text()) < 3
    assert not records_in(tmp_path)


def test_run_of_a_killed_sweep_is_not_trained_twice_at_once(tree, fake_code, tmp_path):
    first = Reproduce(tmp_path, fake_code, *FLAGS, tree)
    run = first.wait_for_runs(1)[0]
    pid = training_pid(run)
    first.process.kill()  # its training process is still running
    first.process.join()
    os.kill(pid, signal.SIGSTOP)
    second = Reproduce(tmp_path, fake_code, *FLAGS, tree)
    second.wait_for_runs(4)
    assert len(read_run(run)["provenance"]) == 1
    os.kill(pid, signal.SIGCONT)
    status, output = second.wait()
    assert status == 0, output
    assert len(records_in(tmp_path)) == 10


def test_two_processes_share_a_sweep(tree, fake_code, uninterrupted, tmp_path):
    processes = [Reproduce(tmp_path, fake_code, *FLAGS, tree) for _ in range(2)]
    for process in processes:
        status, output = process.wait()
        assert status == 0, output
    records, expected = records_in(tmp_path), records_in(uninterrupted)
    assert len((tmp_path / "results/reproduce/smoke/runs.jsonl").read_text().splitlines()) == 10
    assert {name: record["metrics"] for name, record in records.items()} == {
        name: record["metrics"] for name, record in expected.items()
    }
    assert all(len(record["provenance"]) == 1 for record in records.values())
    assert len(re.findall(r" of 10 runs left\)$", output, re.MULTILINE)) == 10


def append_runs(file: Path, prefix: str):
    for index in range(50):
        Sweep(file, file.parent).append({"name": f"{prefix}{index}", "padding": prefix * 20_000})
        Sweep(file, file.parent).append({"name": f"shared{index}", "padding": ""})


def test_append_is_atomic(tmp_path):
    file = tmp_path / "runs.jsonl"
    file.write_text('{"name": "first"}\n{"name": "cut off by a cr')
    assert list(Sweep(file, tmp_path).records()) == ["first"]
    processes = [server.Process(target=append_runs, args=(file, prefix)) for prefix in "ab"]
    with open(file) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for process in processes:
            process.start()
        time.sleep(0.3)
        assert list(Sweep(file, tmp_path).records()) == ["first"]  # both wait
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    names = [json.loads(line)["name"] for line in file.read_text().splitlines()]
    expected = {"first"} | {f"{prefix}{index}" for prefix in ("a", "b", "shared") for index in range(50)}
    assert len(names) == len(expected) and set(names) == expected


def test_sweep_ignores_location_flags_when_matching_runs(tmp_path):
    config = {"lr": 1e-3, "seed": 0, "data_dir": "data/cifar10", "run": "old", "device": "cpu", "workers": 2}
    record = {"name": "a", "config": config, "provenance": [], "metrics": [], "definition": "--gate-init 0\n-old\n"}
    stored = Sweep(tmp_path / "runs.jsonl", tmp_path)
    stored.append(record)
    same = config | {"data_dir": "elsewhere", "run": "new", "device": "cuda", "workers": 8, "seed": None}
    assert not stored.missing([RunSpec("a", [], same, record["definition"])])
    other = RunSpec("b", [], config)
    assert stored.missing([RunSpec("a", [], {}, record["definition"]), other]) == [other]
    with pytest.raises(UserError, match=r"^a has --lr 0.001, not 0.002; delete its line in .*runs.jsonl to train it"):
        stored.missing([RunSpec("a", [], config | {"lr": 2e-3}, record["definition"])])
    with pytest.raises(UserError, match=r"^a was trained with different flags or a different diff; delete its "):
        stored.missing([RunSpec("a", [], config, "--gate-init 0\n-new\n")])


@pytest.mark.parametrize("change", [{"config": {"lr": 2e-3}}, {"definition": "a different diff"}])
def test_unfinished_run_with_a_different_config_is_not_resumed(tmp_path, change):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text('{"lr": 0.001}')
    (tmp_path / "a" / "last.pt").touch()
    with pytest.raises(UserError, match=rf"; delete {tmp_path}/a to train it again"):
        Sweep(tmp_path / "runs.jsonl", tmp_path).train_next([RunSpec("a", [], **change)])


def test_failed_run_is_named(tree, fake_code, tmp_path):
    for attempt in (1, 2):  # the same command tries again
        flags = ["sample-efficiency", "--budget", "smoke", "--lr", "1e30", "--data-dir", tree]
        status, output = Reproduce(tmp_path, fake_code, *flags).wait()
        assert status == 1 and "Traceback" not in output
        assert output.count("the loss is no longer finite") == attempt
        assert output.count("reproduce.py: the run data-fraction=0.05_lr=1e+30_seed=0 failed") == attempt
    assert not list(tmp_path.glob("results/**/*.md"))  # no incomplete table


def test_all_runs_have_the_same_number_of_steps_and_their_provenance(uninterrupted):
    table = json.loads((uninterrupted / "results/reproduce/smoke/sample-efficiency.json").read_text())
    assert [cell["steps"] for cell in table["cells"]] == [[0, 3, 6]] * 8
    records = records_in(uninterrupted)
    assert {name for cell in table["cells"] for name in cell["runs"]} == records.keys() and len(records) == 10
    for name, record in records.items():
        assert record["provenance"][0]["command"].startswith("python train_cifar.py ")
        assert record["provenance"][0]["command"].endswith(f"--run runs/sweeps/smoke/{name}")


def test_migration_of_an_old_run(tmp_path):
    """All names are current, all values are kept, and a migrated record is unchanged."""
    command = (
        "python train_cifar.py --hold-out=0.1 --no-flip --shift 0 --epoch-steps=3 --run=runs/x_hold-out=0.1_no-flip"
    )
    config = {"run": "runs/x_hold-out=0.1", "hold_out": 0.1, "flip": False, "shift": 0, "accumulate": 2, "lr": 1e-3}
    config |= {"plain_epochs": 1, "repeats": 3, "epoch_steps": 3, "colour_jitter": 0.0}
    row = {"epoch": 0, "test_accuracy": 12.3, "heads": {"gate": [[0.7]], "centre": [[[1.0, 0.0]]]}}
    run = tmp_path / "x_hold-out=0.1_seed=0"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(config))
    (run / "provenance.json").write_text(json.dumps([{"command": command, "torch": "2.15"}]))
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    (run / "exercise.txt").write_text("--epoch-steps 3\n-    old\n+    new\n")
    (record,) = migrate.read_old_runs(run)
    assert record == {
        "name": "x_val-fraction=0.1_seed=0",
        "config": {"run": "runs/x_val-fraction=0.1", "val_fraction": 0.1, "hflip": False, "crop_padding": 0, "lr": 1e-3}
        | {"grad_accum_steps": 2, "mixup_off_epochs": 1, "aug_repeats": 3, "steps_per_epoch": 3, "pool": "token"},
        "provenance": [
            {
                "command": "python train_cifar.py --val-fraction=0.1 --no-hflip --crop-padding 0 --steps-per-epoch=3 "
                "--run=runs/x_val-fraction=0.1_no-flip",
                "torch": "2.15",
            }
        ],
        "metrics": [row | {"heads": {"gate": [[0.7]], "center": [[[1.0, 0.0]]]}}],
        "definition": "--steps-per-epoch 3\n-    old\n+    new\n",
    }
    assert migrate.migrate(record) == record
    file = tmp_path / "runs.jsonl"
    Sweep(file, tmp_path).append(record)
    assert migrate.read_old_runs(file) == [record]


@pytest.fixture
def run_command(tmp_path, monkeypatch, capsys):
    """Run `python -m experiments.reproduce ARGV` in this process and an empty folder; return its error message."""
    monkeypatch.chdir(tmp_path)

    def run(*argv) -> str:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, argv)])
        try:
            reproduce.main()
        except SystemExit as stopped:
            return capsys.readouterr().err + str(stopped.code)
        return ""

    return run


def test_user_errors_are_one_sentence(tree, uninterrupted, run_command, monkeypatch):
    monkeypatch.chdir(uninterrupted)
    assert run_command(*FLAGS, tree.parent) == ""  # finished runs need no data
    assert "seed=0 has --amp None, not bf16; delete its line in" in run_command(*FLAGS, tree, "--amp", "bf16")
    monkeypatch.chdir(tree)
    assert "typo does not exist" in run_command("ablation", "--data-dir", "typo")
    assert "typo has no snapshots" in run_command("gates", "--run", "typo", "--data-dir", tree)
    assert "has 2 classes, but" in run_command("masking", "--data-dir", tree)
    assert "has no runs.jsonl" in run_command("compare", tree)
    smoke = uninterrupted / "results/reproduce/smoke"
    assert "typo is not a run folder of train_cifar.py" in run_command("compare", smoke, "typo")
    assert not Path("results").exists()


@pytest.mark.parametrize("argv", [[], *([name] for name in (*reproduce.TABLES, "all", "gates", "masking", "compare"))])
def test_help(argv, run_command):
    assert run_command(*argv, "--help") == "0"  # the exit status


def test_committed_tables_are_those_of_the_committed_runs(run_command):
    """With CIFAR-10 anywhere, or nowhere: nothing is trained."""
    committed, folder = ROOT / "results/reproduce/laptop", Path("results/reproduce/laptop")
    folder.mkdir(parents=True)
    (folder / "runs.jsonl").write_bytes((committed / "runs.jsonl").read_bytes())
    assert run_command("all", "--data-dir", "nowhere") == ""
    for name in (*reproduce.TABLES, "learning-rate"):
        text, expected = ((path / f"{name}.md").read_text().splitlines() for path in (folder, committed))
        assert [line for line in text if line[:1] != "`"] == [line for line in expected if line[:1] != "`"]


def write_record(run: RunSpec, accuracy: float, budget: str):
    """A finished run that was never trained."""
    config = dataclasses.asdict(reproduce.Config(**run.config))
    metrics = [
        {"epoch": epoch, "step": 500 * epoch, "test_accuracy": accuracy} for epoch in range(config["epochs"] + 1)
    ]
    provenance = [dict.fromkeys(("command", "device", "machine", "python", "torch", "torchvision"), run.name)]
    record = {"name": run.name, "config": config, "provenance": provenance, "metrics": metrics}
    Sweep(Path(f"results/reproduce/{budget}/runs.jsonl"), Path()).append(record)


def test_validation_accuracy_selects_the_learning_rate_and_std_is_over_seeds(run_command):
    """All runs of the laptop budget are finished: 6 for the learning rate, and 27 distinct ones of the tables."""
    args = Namespace(budget="laptop", seeds=None, amp=None, data_dir="data", dataset=None)
    all_tables, expected = tables(BUDGETS["laptop"]), {}
    for (lr, model), settings in all_tables["learning-rate"].items():  # 2e-3: best for ConViT; 1e-3: best for both
        accuracy = {"0.0005": (40, 40), "0.001": (50, 49), "0.002": (52, 45)}[lr][model == "plain ViT"]
        for run in seed_runs(settings, None, args):
            assert run.config["val_fraction"] == 0.1
            write_record(run, accuracy, "laptop")
    for name in reproduce.TABLES:
        for cell, settings in all_tables[name].items():
            for run in seed_runs(settings, 1e-3, args):
                if run.name not in expected:
                    expected[run.name] = 30 + len(expected) + 5 * run.config["seed"]
                    write_record(run, expected[run.name], "laptop")
                expected.setdefault((name, cell), []).append(expected[run.name])
    assert len(Path("results/reproduce/laptop/runs.jsonl").read_text().splitlines()) == 6 + 27
    assert run_command("all") == ""

    for name in reproduce.TABLES:
        file = Path("results/reproduce/laptop") / name
        with Image.open(file.with_suffix(".png")) as plot:
            plot.verify()
        text = file.with_suffix(".md").read_text()
        assert "learning rate 0.001." in text and "2000 steps of 32" in text
        for cell in json.loads(file.with_suffix(".json").read_text())["cells"]:
            accuracy = expected[name, (cell["row"], cell["column"])]
            assert cell["accuracy"] == accuracy and cell["mean"] == pytest.approx(np.mean(accuracy))
            line = next(line for line in text.splitlines() if line.startswith(f"| {cell['row']} |"))
            if len(accuracy) == 1:
                assert cell["std"] is None and f" {accuracy[0]:.1f} |" in line
            else:
                assert cell["std"] == pytest.approx(np.std(accuracy, ddof=1))
                assert f" {np.mean(accuracy):.1f} ± {np.std(accuracy, ddof=1):.1f} (2) |" in line


@pytest.mark.parametrize("budget", BUDGETS)
def test_flags_give_the_config_and_tables_share_runs(budget, monkeypatch):
    args, names, configs = Namespace(budget=budget, seeds=None, amp=None, data_dir="data", dataset=None), {}, {}
    for table, cells in tables(BUDGETS[budget]).items():
        for cell, settings in cells.items():
            run = seed_runs(settings, 1e-3, args)[0]
            monkeypatch.setattr(sys, "argv", ["train_cifar.py", *run.flags])
            config = parse_flags(reproduce.Config, "")
            assert config == reproduce.Config(**run.config) == configs.setdefault(run.name, config)
            names[(table, *cell)] = run.name

    layers = len({row for table, row, _ in names if table == "locality"})
    assert len(configs) == 6 + 8 + 12 + 3 * (layers - 1) - 1  # two are shared with the ablation, and two with locality
    full, plain = (names["sample-efficiency", "10%", model] for model in ("ConViT", "plain ViT"))
    assert full == names["ablation", "full ConViT", "10%"]
    assert plain == names["ablation", "plain ViT", "10%"] == names["locality", "0 GPSA layers", "strength 0.1"]
    assert full in [name for (table, *_), name in names.items() if table == "locality"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("full ConViT", (True, 1, True, True)),
        ("no gating", (True, 0, False, True)),
        ("no conv init", (False, 1, True, True)),
        ("neither", (False, 0, False, True)),
        ("GPSA frozen at conv init", (True, 1, False, False)),
        ("GPSA frozen at random", (False, 1, False, False)),
        ("gates frozen at 0.73", (True, 1, False, True)),
        ("plain ViT", None),
    ],
)
def test_model_of_every_ablation(row, expected):
    """Whether v is initialized as the identity, the gate logit, and whether gates and position are trained."""
    attn = build_model(reproduce.Config(**reproduce.ABLATIONS[row]), list("0123456789")).blocks[0].attn
    if expected is None:
        assert not isinstance(attn, GPSA)
    else:
        initial = torch.equal(attn.v.weight, torch.eye(len(attn.v.weight))), attn.gating_param[0].item()
        assert (*initial, attn.gating_param.requires_grad, attn.pos_proj.weight.requires_grad) == expected


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


@torch.no_grad()
def test_masking_matches_the_reference(tree, run_command, tmp_path):
    config = ConViTConfig(img_size=16, patch_size=4, num_classes=2, dim=36, num_heads=9, depth=3, gpsa_layers=2)
    model = perturb(ConViT(config))
    data = InMemoryData(reproduce.Config(data_dir=str(tree), img_size=16, eval=True), torch.device("cpu"))
    images = normalize(data.test.images)
    labels = torch.tensor([0] * 10 + [1] * 6)
    logits = model(images)
    model.head.bias[0] += (logits[:, 1] - logits[:, 0]).median()  # so that it predicts both classes

    def expected(**parts) -> float:
        parts = {"pos_embed": False, "content": 0, "position": 0} | parts
        reference = torch.stack([reference_logits(model, image, **parts) for image in images])
        torch.testing.assert_close(masked(model, **parts)(images), reference, atol=1e-4, rtol=1e-4)
        return 100 * (reference.argmax(1) == labels).float().mean().item()

    (tmp_path / "run/snapshots").mkdir(parents=True)
    save_weights(model, ["bright", "dark"], 1.0, 3, tmp_path / "run/snapshots/epoch_0003.pt")
    assert run_command("masking", "--run", tmp_path / "run", "--data-dir", tree, "--out", "mine") == ""
    record = json.loads(Path("mine/masking.json").read_text())
    assert record["position_embedding_masked"] == pytest.approx(expected(pos_embed=True))
    curves = record["masked_in_first_layers"]
    for part, accuracy in curves.items():
        assert accuracy == pytest.approx([expected(**{part: count}) for count in range(3)])
    assert len({*curves["content"], *curves["position"]}) > 2  # masking has an effect here
    assert "| 2 |" in Path("mine/masking.md").read_text() and not Path("results").exists()


def train_for_real(flags: list[str]):
    """In a child process: train_cifar.py FLAGS."""
    sys.argv = ["train_cifar.py", *flags]
    train_cifar.main()


def test_gates_and_comparison_of_real_runs(tree, run_command):
    """Two runs of the real train_cifar.py, with the flags of a sweep; tests/test_exercises.py trains a whole sweep."""
    args = Namespace(budget="smoke", seeds=1, amp=None, data_dir=str(tree), dataset=None)
    runs, stored = Path("runs/sweeps/smoke").resolve(), Sweep(Path("results/reproduce/smoke/runs.jsonl"), Path())
    names = ["data-fraction=1.0_lr=0.001_seed=0", "data-fraction=1.0_gpsa-layers=0_lr=0.001_seed=0"]
    for name, settings in zip(names, ({}, {"gpsa_layers": 0}), strict=True):
        (run,) = seed_runs({"data_fraction": 1.0} | settings, 1e-3, args)
        process = server.Process(target=train_for_real, args=([*run.flags, "--run", str(runs / name)],))
        process.start()
        process.join(60)
        assert process.exitcode == 0 and run.name == name
        stored.append(read_run(runs / name))
        assert not stored.missing([run])  # the config is the one that was asked for
    records = stored.records()
    for record in records.values():
        assert [row["step"] for row in record["metrics"]] == [0, 3, 6]
        assert record["provenance"][0]["torch"] == torch.__version__

    assert run_command("gates", "--run", runs / names[0], "--data-dir", tree) == ""
    record, metrics = json.loads(Path("results/reproduce/gates.json").read_text()), records[names[0]]["metrics"]
    patches = [(y, x) for y in range(4) for x in range(4)]
    assert record["uniform"] == pytest.approx(np.mean([math.dist(one, other) for one in patches for other in patches]))
    assert record["epochs"] == [0, 1, 2]
    assert [heads["gate"] for heads in record["heads"]] == [row["heads"]["gate"] for row in metrics]
    rows = [line for line in Path("results/reproduce/gates.md").read_text().splitlines() if re.match(r"\| \d", line)]
    last = metrics[-1]["heads"]
    assert len(rows) == 7 and rows[6].split(" | ")[1:4] == ["", "", ""]  # plain self-attention
    assert rows[4].startswith(f"| 5 | 0.73 | {np.mean(last['gate'][4]):.2f} | {np.min(last['gate'][4]):.2f} | ")
    assert rows[4].endswith(f" | {np.mean(last['non_locality'][4]):.2f} |")
    assert "is a plain ViT: it has no gates" in run_command("gates", "--run", runs / names[1], "--data-dir", tree)

    assert run_command("compare", "results/reproduce/smoke", runs / names[1]) == ""
    rows = Path("results/reproduce/smoke/README.md").read_text().splitlines()[2:5]
    for row, name in zip(rows, [names[1], *names], strict=True):
        accuracy, gates = records[name]["metrics"][-1]["test_accuracy"], records[name]["metrics"][-1]["heads"]["gate"]
        gate = "" if name == names[1] else f"{np.mean(gates[:5]):.2f}"
        assert row.startswith(f"| {name} | {accuracy:.1f} | 2 | {gate} | `python train_cifar.py ")
    for file in ("gates.png", "smoke/compare.png"):
        with Image.open(Path("results/reproduce") / file) as plot:
            plot.verify()
