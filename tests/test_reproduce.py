"""reproduce.py as a user runs it: killed and run again; its numbers against slow references and made-up runs."""

import dataclasses
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
from conftest import perturb
from PIL import Image

import reproduce
import training.report
from analysis import read_metrics
from convit_min import GPSA, ConViT, ConViTConfig, normalise
from reproduce import SCALES, grids, masked, runs_of
from training.checkpoint import save_weights
from training.config import build_model
from training.flags import as_flags, parse_flags

server = multiprocessing.get_context("forkserver")  # its processes have imported all, and start within milliseconds
server.set_forkserver_preload(["reproduce", "train_imagenet"])  # test_faults.py has the same server
WORDS = ["sample-efficiency", "--scale", "smoke", "--lr", "0.001", "--data-dir"]


def run_in(folder: Path, log: Path, *words):
    """In a process of its own: `python reproduce.py WORDS` in a folder, without the plots of every run."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    torch.set_num_threads(1)
    training.report.draw_run = lambda *_: None
    sys.argv = ["reproduce.py", *map(str, words)]
    reproduce.main()


def start(folder: Path, *words):
    process = server.Process(target=run_in, args=(folder, folder / "log", *words))
    process.start()
    return process


def wait(process, folder: Path) -> tuple[int, str]:
    """The exit status of a process and all that was said in its folder."""
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode, (folder / "log").read_text()


def wait_for(count: int, folder: Path, process):
    """Until so many runs have begun and saved something."""
    deadline = time.monotonic() + 60
    while len(list(folder.glob("results/reproduce/smoke/runs/*/last.pt"))) < count:
        assert process.is_alive() and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.002)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """The models are too small for two, which would wait for each other on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def undisturbed(tree, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    status, output = wait(start(folder, *WORDS, tree), folder)
    assert status == 0, output
    return folder


def test_a_killed_grid_ends_with_the_same_table(tree, undisturbed, tmp_path):
    folder = tmp_path
    process = start(folder, *WORDS, tree)
    wait_for(2, folder, process)
    process.kill()
    process.join()
    first = folder / "results/reproduce/smoke/runs/data-fraction=0.05_lr=0.001_seed=0"
    done = (first / "last.pt").stat().st_mtime_ns

    process = start(folder, *WORDS, tree)
    wait_for(4, folder, process)
    os.kill(process.pid, signal.SIGINT)
    status, output = wait(process, folder)
    assert status == 1 and "Traceback" not in output
    (todo, finished), (todo_again, finished_again) = re.findall(r"(\d+) runs to do, (\d+) finished before", output)
    assert (todo, finished) == ("10", "0") and int(finished_again) >= 1 and int(todo_again) == 10 - int(finished_again)

    status, output = wait(start(folder, *WORDS, tree), folder)
    assert status == 0, output
    assert (first / "last.pt").stat().st_mtime_ns == done
    table, expected = (
        (root / "results/reproduce/smoke/sample-efficiency.md").read_text() for root in (folder, undisturbed)
    )
    assert table == expected and table.count("(2)") == 2


def test_all_runs_have_as_many_steps_and_tell_how_they_were_made(tree, undisturbed):
    record = json.loads((undisturbed / "results/reproduce/smoke/sample-efficiency.json").read_text())
    assert [cell["steps"] for cell in record["cells"]] == [[0, 3, 6]] * 8
    assert len(record["runs"]) == 10
    for name, history in record["runs"].items():
        assert history[0]["torch"] == torch.__version__
        assert history[0]["command"].startswith("python train_cifar.py ") and name in history[0]["command"]


@pytest.fixture
def reproduced(tmp_path, monkeypatch, capsys):
    """Run `python reproduce.py WORDS` here and now, in a folder of its own; return what it says where it refuses."""
    monkeypatch.chdir(tmp_path)

    def run(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *map(str, words)])
        try:
            reproduce.main()
        except SystemExit as stopped:
            return capsys.readouterr().err + str(stopped.code)
        return ""

    return run


def test_a_run_that_fails_is_named(tree, tmp_path):
    for tries in (1, 2):  # the same command tries again
        words = ["sample-efficiency", "--scale", "smoke", "--lr", "1e30", "--data-dir", tree]
        status, output = wait(start(tmp_path, *words), tmp_path)
        assert status == 1 and "Traceback" not in output
        assert output.count("the loss is no longer finite at step 3") == tries
        assert output.count("reproduce.py: the run data-fraction=0.05_lr=1e+30_seed=0 was not finished") == tries
    assert not list(tmp_path.glob("results/**/*.md"))  # no table of half a grid


def test_what_is_wrong_is_said_in_one_sentence(tree, undisturbed, reproduced, monkeypatch):
    monkeypatch.chdir(undisturbed)
    assert "seed=0 has --data-dir" in reproduced(*WORDS, tree.parent)
    monkeypatch.chdir(tree)
    assert "holds no train/CLASS/*" in reproduced("ablation", "--data-dir", "typo")
    assert "typo holds no snapshots" in reproduced("gates", "--run", "typo", "--data-dir", tree)
    assert "has 2 classes, but" in reproduced("masking", "--data-dir", tree)
    assert not Path("results").exists()


@pytest.mark.parametrize("words", [[], *([command] for command in reproduce.COMMANDS)])
def test_help(words, reproduced):
    assert reproduced(*words, "--help") == "0"  # the status


def made_up(fields: dict, accuracy: float):
    """The folder of a finished run that was never trained."""
    run = Path(fields["run"])
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(dataclasses.asdict(reproduce.Config(**fields))))
    lines = [{"epoch": epoch, "step": 500 * epoch, "test_accuracy": accuracy} for epoch in range(fields["epochs"] + 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entry = dict.fromkeys(("command", "device", "machine", "python", "torch", "torchvision"), run.name)
    (run / "provenance.json").write_text(json.dumps([entry]))


def test_held_back_pictures_choose_and_a_spread_is_of_several_seeds(reproduced):
    """All runs of the laptop are there already: 6 for the learning rate, and, once each, 27 more."""
    given = Namespace(scale="laptop", seeds=None, amp=None, data_dir="data", dataset=None)
    tables, expected = grids(SCALES["laptop"]), {}
    for (rate, name), change in tables["learning-rate"].items():  # 2e-3 is the best for ConViT, 1e-3 for both together
        score = {"0.0005": (40, 40), "0.001": (50, 49), "0.002": (52, 45)}[rate][name == "plain ViT"]
        for fields in runs_of(change, None, given):
            assert fields["hold_out"] == 0.1
            made_up(fields, score)
    for name in ("sample-efficiency", "ablation", "locality"):
        for place, change in tables[name].items():
            for fields in runs_of(change, 1e-3, given):
                if not Path(fields["run"]).exists():
                    made_up(fields, 30 + len(expected) + 5 * fields["seed"])
                accuracy = read_metrics(Path(fields["run"]))[-1]["test_accuracy"]
                expected.setdefault(fields["run"], accuracy)
                expected.setdefault((name, place), []).append(accuracy)
    assert len(list(Path("results/reproduce/laptop/runs").iterdir())) == 6 + 27
    assert reproduced("all") == ""

    for name in ("sample-efficiency", "ablation", "locality"):
        file = Path("results/reproduce/laptop") / name
        with Image.open(file.with_suffix(".png")) as picture:
            picture.verify()
        table = file.with_suffix(".md").read_text()
        assert "learning rate 0.001." in table and "2000 steps of 32" in table
        record = json.loads(file.with_suffix(".json").read_text())
        for cell in record["cells"]:
            accuracy = expected[name, (cell["row"], cell["column"])]
            assert cell["accuracy"] == accuracy and cell["mean"] == pytest.approx(np.mean(accuracy))
            line = next(line for line in table.splitlines() if line.startswith(f"| {cell['row']} |"))
            if len(accuracy) == 1:
                assert cell["spread"] is None and f" {accuracy[0]:.1f} |" in line
            else:
                assert cell["spread"] == pytest.approx(np.std(accuracy, ddof=1))
                assert f" {np.mean(accuracy):.1f} ± {np.std(accuracy, ddof=1):.1f} (2) |" in line


@pytest.mark.parametrize("name", SCALES)
def test_every_run_is_a_command_and_the_same_runs_are_shared(name, monkeypatch):
    given, configs = Namespace(scale=name, seeds=None, amp=None, data_dir="data", dataset=None), {}
    for grid, places in grids(SCALES[name]).items():
        for place, change in places.items():
            fields = runs_of(change, 1e-3, given)[0]
            monkeypatch.setattr(sys, "argv", ["train_cifar.py", *as_flags(fields)])
            configs[(grid, *place)] = parse_flags(reproduce.Config, "")
            assert configs[(grid, *place)] == reproduce.Config(**fields)

    runs = {config.run for config in configs.values()}
    layers = len({config.gpsa_layers for (grid, *_), config in configs.items() if grid == "locality"})
    assert len(runs) == 6 + 8 + 12 + 3 * (layers - 1) - 1  # shared are two with the ablation, and two with locality
    full, plain = (configs["sample-efficiency", "10%", kind] for kind in ("ConViT", "plain ViT"))
    assert full == configs["ablation", "full ConViT", "10%"]
    assert plain == configs["ablation", "plain ViT", "10%"] == configs["locality", "0 GPSA layers", "strength 0.1"]
    assert full in [config for (grid, *_), config in configs.items() if grid == "locality"]


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
def test_every_row_of_the_ablation_is_what_it_says(row, expected):
    """Whether v starts as the identity, the gate, and whether gate and position are trained."""
    attn = build_model(reproduce.Config(**reproduce.ABLATIONS[row]), 10).blocks[0].attn
    if expected is None:
        assert not isinstance(attn, GPSA)
    else:
        starts = torch.equal(attn.v.weight, torch.eye(len(attn.v.weight))), attn.gating_param[0].item()
        assert (*starts, attn.gating_param.requires_grad, attn.pos_proj.weight.requires_grad) == expected


def slow_logits(model: ConViT, image: torch.Tensor, embedding: bool, content: int, position: int) -> torch.Tensor:
    """The model on one picture from the equations alone, head by head, with parts of it left out."""
    x = model.patch_embed(image[None])[0].permute(1, 2, 0)  # Y X c
    rows, columns, dim = x.shape
    places = [(y, x) for y in range(rows) for x in range(columns)]
    steps = [[(key[1] - query[1], key[0] - query[0]) for key in places] for query in places]
    offsets = torch.tensor([[(dx, dy, dx**2 + dy**2) for dx, dy in line] for line in steps], dtype=torch.float32)
    x = x.reshape(-1, dim) + (0 if embedding else model.pos_embed[0])
    for number, block in enumerate(model.blocks):
        gated = isinstance(block.attn, GPSA)
        if number == model.config.gpsa_layers:
            x = torch.cat([model.cls_token[0], x])
        y = block.norm1(x)
        if gated:
            q, k, v = *block.attn.qk(y).chunk(2, dim=1), block.attn.v(y)
        else:
            q, k, v = block.attn.qkv(y).chunk(3, dim=1)
        parts, d = [], dim // model.config.num_heads
        for head in range(model.config.num_heads):
            own = slice(head * d, (head + 1) * d)
            weights = (q[:, own] @ k[:, own].T / math.sqrt(d)).softmax(dim=1)
            if gated:
                scores = offsets @ block.attn.pos_proj.weight[head]
                gate = block.attn.gating_param[head].sigmoid()
                gate = 1 if number < content else 0 if number < position else gate
                weights = (1 - gate) * weights + gate * scores.softmax(dim=1)
            parts.append(weights @ v[:, own])
        mixed = torch.cat(parts, dim=1)
        x = x + block.attn.proj(mixed)
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[0])


@torch.no_grad()
def test_masking_is_what_a_slow_model_without_those_parts_gives(tree, reproduced, tmp_path):
    config = ConViTConfig(img_size=16, patch_size=4, num_classes=2, dim=36, num_heads=9, depth=3, gpsa_layers=2)
    model = perturb(ConViT(config))
    images = normalise(reproduce.load_pictures("folder", str(tree), 16, torch.device("cpu"))[1].images)
    labels = torch.tensor([0] * 10 + [1] * 6)
    logits = model(images)
    model.head.bias[0] += (logits[:, 1] - logits[:, 0]).median()  # or it would see one class everywhere

    def expected(**parts) -> float:
        parts = {"embedding": False, "content": 0, "position": 0} | parts
        slow = torch.stack([slow_logits(model, image, **parts) for image in images])
        torch.testing.assert_close(masked(model, **parts)(images), slow, atol=1e-4, rtol=1e-4)
        return 100 * (slow.argmax(1) == labels).float().mean().item()

    (tmp_path / "run/snapshots").mkdir(parents=True)
    save_weights(model, ["bright", "dark"], 3, tmp_path / "run/snapshots/epoch_0003.pt")
    assert reproduced("masking", "--run", tmp_path / "run", "--data-dir", tree) == ""
    record = json.loads(Path("results/reproduce/masking.json").read_text())
    assert record["position_embedding_masked"] == pytest.approx(expected(embedding=True))
    curves = record["masked_in_first_layers"]
    for part, accuracy in curves.items():
        assert accuracy == pytest.approx([expected(**{part: count}) for count in range(3)])
    assert len({*curves["content"], *curves["position"]}) > 2  # masking does something here
    assert "| 2 |" in Path("results/reproduce/masking.md").read_text()


def test_gates_of_a_run_of_the_grid(tree, undisturbed, reproduced):
    run = undisturbed / "results/reproduce/smoke/runs/data-fraction=1.0_lr=0.001_seed=0"
    assert reproduced("gates", "--run", run, "--data-dir", tree) == ""
    record, metrics = json.loads(Path("results/reproduce/gates.json").read_text()), read_metrics(run)
    places = [(y, x) for y in range(4) for x in range(4)]
    assert record["uniform"] == pytest.approx(np.mean([math.dist(one, other) for one in places for other in places]))
    assert record["epochs"] == [0, 1, 2]
    assert [heads["gate"] for heads in record["heads"]] == [line["heads"]["gate"] for line in metrics]
    rows = [line for line in Path("results/reproduce/gates.md").read_text().splitlines() if re.match(r"\| \d", line)]
    last = metrics[-1]["heads"]
    assert len(rows) == 7 and rows[6].split(" | ")[1:4] == ["", "", ""]  # plain
    assert rows[4].startswith(f"| 5 | 0.73 | {np.mean(last['gate'][4]):.2f} | {np.min(last['gate'][4]):.2f} | ")
    assert rows[4].endswith(f" | {np.mean(last['non_locality'][4]):.2f} |")
    with Image.open("results/reproduce/gates.png") as picture:
        picture.verify()
    plain = run.with_name("data-fraction=1.0_gpsa-layers=0_lr=0.001_seed=0")
    assert "is a plain ViT: it has no gates" in reproduced("gates", "--run", plain, "--data-dir", tree)
