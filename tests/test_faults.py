"""Faults: killed processes, signals, full disks, damaged files; and several processes training as one."""

import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed.run
import torch.nn.functional as F
from conftest import ROOT, forkserver, free_port, train_quickly
from PIL import Image

import train_cifar
import train_imagenet
from analysis import read_metrics
from images import normalize
from training import checkpoint, distributed
from training.config import build_model
from training.data import InMemoryData
from training.distributed import Stopped, UserError
from training.evaluation import evaluate_weights
from training.optim import learning_rate
from training.patterns import patterns
from training.run import Run
from weights import open_model

pytestmark = pytest.mark.usefixtures("small_model", "no_plots")
QUICK = ["--epochs", "6", "--batch-size", "4", "--drop-path", "0.2", "--mixup", "0.8", "--save-every", "3"]
QUICK += ["--device", "cpu"]  # forked processes cannot use CUDA


def redirect_output(log: Path):
    """In a child process: append its output to a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)


def run_in_child(name: str, flags: list, log: Path, file_limit: int | None, prepare: Callable):
    """In a child process: run a script, with its output and a limit to the size of the files that it writes."""
    redirect_output(log)
    if file_limit:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    multiprocessing.set_start_method("fork", force=True)  # of data workers; it would be that of this process
    torch.set_num_threads(1)
    prepare()
    sys.argv = [f"{name}.py", *map(str, flags)]
    {"train_cifar": train_cifar, "train_imagenet": train_imagenet}[name].main()


class Script:
    """A training script in a separate process, by default with the small model."""

    started: ClassVar = []  # for no_leftovers

    def __init__(
        self,
        log: Path,
        *flags,
        name: str = "train_cifar",
        file_limit: int | None = None,
        prepare: Callable = train_quickly,
    ):
        self.log = log
        Script.started.append(self)
        self.process = forkserver.Process(target=run_in_child, args=(name, list(flags), log, file_limit, prepare))
        self.process.start()

    def wait(self) -> tuple[int, str]:
        """Exit status and output."""
        self.process.join(120)
        assert self.process.exitcode is not None, "timed out"
        return self.process.exitcode, self.log.read_text()

    def wait_for(self, file: Path):
        deadline = time.monotonic() + 60
        while not file.exists():
            assert self.process.is_alive() and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_leftovers():
    """No script outlives its test, even if that fails."""
    yield
    while Script.started:
        if (process := Script.started.pop().process).is_alive():
            process.kill()


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """30 training and 9 test images of three classes."""
    root = tmp_path_factory.mktemp("images")
    numbers = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 3)):
        for color, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = numbers.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., color] += 130
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("finished")
    status, output = Script(folder / "log", "--data-dir", tree, "--run", folder / "run", *QUICK).wait()
    assert status == 0, output
    return folder / "run"


@pytest.fixture
def reference_run(finished, tmp_path) -> Path:
    """A copy of the uninterrupted run that a test may modify."""
    return shutil.copytree(finished, tmp_path / "reference_run")


def assert_same_run(one: Path, other: Path):
    """Bitwise equal, except for speed."""
    records = [torch.load(run / "last.pt", weights_only=True) for run in (one, other)]
    for part in ("model", "ema"):
        assert all(torch.equal(value, records[1][part][key]) for key, value in records[0][part].items())
    lines = [read_metrics(run) for run in (one, other)]
    for line in lines[0] + lines[1]:
        line.pop("images_per_second", None)
    assert lines[0] == lines[1]


def saved_at(run: Path) -> int:
    """Modification time of last.pt."""
    return (run / "last.pt").stat().st_mtime_ns if (run / "last.pt").exists() else 0


def test_run_killed_several_times_ends_bitwise_identical(tree, reference_run, tmp_path):
    run, moments = tmp_path / "killed", random.Random(1)
    flags = ["--data-dir", tree, "--run", run, *QUICK, "--save-every", "1"]
    kills = 0
    while kills < 6:
        before = saved_at(run)
        script = Script(tmp_path / "log", *flags, *(["--resume"] if before else []))
        while saved_at(run) == before:
            assert script.process.is_alive(), script.log.read_text()
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.04))
        if not script.process.is_alive():
            break  # on a busy machine, it may have finished
        script.process.kill()
        script.process.join()
        kills += 1
    assert kills > 2
    status, output = Script(tmp_path / "log", *flags, "--resume").wait()
    assert status == 0, output
    assert_same_run(reference_run, run)


def stop_in_step_4(count: int):
    """In a child process: step 4, after a save, lasts until so many signals have arrived.

    If there are two, the process is the only worker of torchrun.
    """
    if count == 2:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    train_quickly()
    after_step = Run.after_step

    def wait(run, step, lr):
        deadline = time.monotonic() + 20
        while step == 3 and len(run.signals) < count and time.monotonic() < deadline:
            time.sleep(0.001)
        after_step(run, step, lr)

    Run.after_step = wait


@pytest.mark.parametrize(
    ("number", "count"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)], ids=["SIGINT", "SIGTERM twice, by torchrun"]
)
def test_signal_loses_no_step(tree, reference_run, tmp_path, number, count):
    run = tmp_path / "stopped"
    script = Script(tmp_path / "log", "--data-dir", tree, "--run", run, *QUICK, prepare=partial(stop_in_step_4, count))
    script.wait_for(run / "last.pt")
    for _ in range(count):
        os.kill(script.process.pid, number)
        time.sleep(0.01)
    status, output = script.wait()
    assert status == 128 + number and "Traceback" not in output
    step = int(re.search(r"stopped and saved after step (\d+)", output)[1])
    state = torch.load(run / "last.pt", weights_only=True)["train_state"]
    assert step == 4 == (state["epoch"] - 1) * 7 + state["step_in_epoch"]

    status, output = Script(tmp_path / "log", "--run", run, "--resume").wait()
    assert status == 0, output
    assert_same_run(reference_run, run)


def test_finished_run_is_left_alone(tree, reference_run, tmp_path, run_script):
    before = (reference_run / "last.pt").read_bytes()
    status, output = run_script(train_cifar, "--run", reference_run, "--resume")
    assert status == 0 and "has finished 6 epochs" in output
    grown = shutil.copytree(tree, tmp_path / "grown")
    shutil.copy(grown / "train/red/0.png", grown / "train/red/new.png")
    status, output = run_script(train_cifar, "--run", reference_run, "--resume", "--data-dir", grown)
    assert status == 0 and "31 training and 9 evaluation images, but" in output and "started with 30" in output
    assert (reference_run / "last.pt").read_bytes() == before


def test_full_disk_keeps_the_previous_checkpoint(tree, reference_run, tmp_path):
    before = (reference_run / "last.pt").read_bytes()
    flags = ["--run", reference_run, "--resume", "--epochs", "7"]
    status, output = Script(tmp_path / "log", *flags, file_limit=2**20).wait()
    assert status == 1 and "Traceback" not in output
    assert "last.pt cannot be saved" in output and "--resume" in output
    assert (reference_run / "last.pt").read_bytes() == before
    assert not list(reference_run.glob("*.tmp"))
    status, output = Script(tmp_path / "log", *flags).wait()
    assert status == 0, output
    assert [line["epoch"] for line in read_metrics(reference_run)] == list(range(8))


def become_rank(rank: int, port: int):
    """In a child process: become one of two processes that train together."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    train_quickly()


def become_waiting_rank(rank: int, port: int, ready: Path):
    """The same; an error of rank 1 is not printed before a signal arrives."""
    become_rank(rank, port)

    def sleep(seconds: int):
        """abort() sleeps for its local rank before it prints: rank 1 stops here, until the SIGTERM of torchrun."""
        if seconds:
            ready.touch()
            signal.pause()

    distributed.time = SimpleNamespace(sleep=sleep)


def test_full_disk_on_rank_0_stops_all_ranks(tree, tmp_path):
    port, run = free_port(), tmp_path / "run"
    ranks = [
        Script(tmp_path / "log", "--data-dir", tree, "--run", run, *QUICK, file_limit=limit,
               prepare=partial(become_waiting_rank, rank, port, tmp_path / "ready"))
        for rank, limit in enumerate((2**20, None))
    ]  # fmt: skip
    assert ranks[0].wait()[0] == 1
    ranks[1].wait_for(tmp_path / "ready")
    ranks[1].process.terminate()  # as torchrun does, while this rank waits for its turn to print the same
    assert ranks[1].wait()[0] == -signal.SIGTERM
    output = ranks[0].log.read_text()
    assert output.count("cannot be saved") == 1 and "Traceback" not in output and "Error" not in output, output


def become_rank_elsewhere(rank: int, port: int, folder: Path):
    os.chdir(folder)
    become_rank(rank, port)


def test_error_of_rank_1_alone_is_printed(tree, tmp_path):
    """Rank 0 finds class folders in data/, and rank 1 CIFAR-10: the dataset is that of rank 0."""
    port, folders = free_port(), [tmp_path / "first", tmp_path / "second"]
    (folders[1] / "data" / "cifar-10-batches-py").mkdir(parents=True)
    folders[0].mkdir()
    (folders[0] / "data").symlink_to(tree)
    ranks = [Script(tmp_path / f"log{rank}", *QUICK, prepare=partial(become_rank_elsewhere, rank, port, folder))
             for rank, folder in enumerate(folders)]  # fmt: skip
    for rank, error in (
        (1, "data contains neither train/CLASS/* nor"),
        (0, "another process has failed"),
    ):
        status, output = ranks[rank].wait()
        assert status == 1 and "Traceback" not in output and f"train_cifar.py: {error}" in output


def test_out_of_memory_suggests_gradient_accumulation(tree, tmp_path, monkeypatch, run_script):
    """The advice can be followed in the same run folder."""

    def raise_error(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    flags = ["--data-dir", tree, "--run", tmp_path / "run", *QUICK, "--epochs", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(train_cifar, "mixup_cutmix", raise_error)
        status, output = run_script(train_cifar, *flags)
    assert status == 1
    assert "train_cifar.py: out of memory: raise --grad-accum-steps, or lower --batch-size (CUDA out of" in output
    assert run_script(train_cifar, *flags, "--grad-accum-steps", "2")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "load_state_dict", raise_error)
        status, output = run_script(train_cifar, *flags, "--resume")
    assert status == 1 and "out of memory: raise" in output and "does not match" not in output
    assert run_script(train_cifar, *flags, "--resume", "--batch-size", "8")[0] == 1


@pytest.fixture
def train(tree, tmp_path):
    """train_cifar.train as in a notebook, with fields of its Config; checks that signal handlers are restored."""
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def call(**values):
        values = {"data_dir": tree, "run": tmp_path / "run", "epochs": 2, "batch_size": 8, "device": "cpu"} | values
        try:
            train_cifar.train(train_cifar.Config(**values))
        finally:
            assert {number: signal.getsignal(number) for number in handlers} == handlers

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def test_train_raises_and_can_be_called_again(train, tmp_path, monkeypatch):
    def interrupted(signals: int):
        def call(step, *args):
            for _ in range(signals if step == 1 else 0):
                os.kill(os.getpid(), signal.SIGINT)
            return learning_rate(step, *args)

        return call

    for signals, error in ((2, KeyboardInterrupt), (1, Stopped)):
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(train_cifar, "learning_rate", interrupted(signals))
            train()
    with pytest.raises(UserError, match="the run has --batch-size 8, not 4"):
        train(batch_size=4, resume=True)
    with pytest.raises(UserError, match="already contains a run"):
        train()
    train(resume=True)
    begun = time.monotonic()
    train(run=tmp_path / "other")
    assert len(read_metrics(tmp_path / "run")) == len(read_metrics(tmp_path / "other")) == 3
    first, second = (json.loads((tmp_path / run / "provenance.json").read_text()) for run in ("run", "other"))
    assert second[0]["wall_clock_s"] <= time.monotonic() - begun + 1 and second[0]["started"] >= first[1]["started"]
    status, output = Script(tmp_path / "log", "--run", tmp_path / "run", "--resume").wait()
    assert status == 0 and "has finished 2 epochs" in output  # no lock was left


def test_recipe_equals_a_plain_loop(train, tree, tmp_path):
    """Schedule, smoothing, micro-batches, clipping, weight decay, and the gates' learning rate."""
    recipe = {"data_dir": tree, "device": "cpu", "epochs": 1, "batch_size": 10, "warmup_epochs": 0.4, "lr": 0.01,
              "crop_padding": 0, "hflip": False, "gate_lr_scale": 7.0, "weight_decay": 0.5, "label_smoothing": 0.3,
              "clip_grad": 0.1, "ema_decay": 0.0}  # fmt: skip
    train(**recipe, grad_accum_steps=5)
    config = train_cifar.Config(**recipe)
    data = InMemoryData(config, torch.device("cpu"))
    torch.manual_seed(0)
    model, losses = build_model(config, data.classes), []
    start = {name: value.clone() for name, value in model.state_dict().items()}
    matrices, others, gates = [], [], []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim > 1 and name not in ("pos_embed", "cls_token")
        if parameter.requires_grad:
            (gates if name.endswith("gating_param") else matrices if is_matrix else others).append(parameter)
    groups = [
        {"params": params, "weight_decay": decay} for params, decay in ((matrices, 0.5), (others, 0.0), (gates, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups)
    for lr, (images, labels) in zip((1e-6, 0.01, 1e-5), data.train_batches(1), strict=True):
        for group, scale in zip(optimizer.param_groups, (1, 1, 7), strict=True):
            group["lr"] = lr * scale
        loss = F.cross_entropy(model(normalize(images)), labels, label_smoothing=0.3)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    record = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    trained = record["model"]
    for name, value in model.state_dict().items():
        assert torch.equal(record["ema"][f"module.{name}"], trained[name])  # a decay of 0
        assert (value - trained[name]).abs().mean() <= 0.01 * (value - start[name]).abs().mean(), name
    assert read_metrics(tmp_path / "run")[1]["train_loss"] == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize("script", [train_cifar, train_imagenet])
def test_every_augmentation_gets_its_flag(script, tree, imagenet, tmp_path, monkeypatch, run_script):
    calls = []

    def spy(name: str, function: Callable) -> Callable:
        def call(images, *args):
            calls.append((name, *(arg for arg in args if not torch.is_tensor(arg))))
            return function(images, *args)

        return call

    for name in ("random_crop", "random_hflip", "random_erasing", "mixup_cutmix"):
        if function := vars(script).get(name):
            monkeypatch.setattr(script, name, spy(name, function))
    flags = "--device cpu --model convit_cifar_nano --img-size 16 --epochs 2 --steps-per-epoch 1 --batch-size 8"
    flags += " --workers 0 --warmup-epochs 0 --no-hflip --random-erasing 0.3 --mixup 0.2 --cutmix 0.4"
    flags += " --mixup-off-epochs 1" + (" --crop-padding 3" if script is train_cifar else "")
    status, output = run_script(script, *flags.split(), "--data-dir", imagenet, "--run", tmp_path / "run")
    assert status == 0, output
    step = [("random_crop", 3)] * (script is train_cifar) + [("random_hflip", False), ("random_erasing", 0.3)]
    assert calls == [*step, ("mixup_cutmix", 0.2, 0.4), *step]


def test_random_draws_differ_by_seed_step_and_rank(train, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(train_cifar, "mixup_cutmix", lambda *args: drawn.append(torch.initial_seed()) or args[:2])
    for number, (seed, rank) in enumerate(((0, 0), (0, 1), (1, 0))):
        monkeypatch.setattr("training.run.rank", lambda rank=rank: rank)
        train(run=tmp_path / str(number), seed=seed)
    assert len(drawn) == len(set(drawn)) == 18  # three runs of two epochs of three steps
    first, other_rank, other_seed = (
        torch.load(tmp_path / run / "snapshots" / "epoch_0000.pt", weights_only=True)["model"]["head.weight"]
        for run in "012"
    )
    assert torch.equal(first, other_rank) and not torch.equal(first, other_seed)


def test_best_weights_survive_a_resume(train, tmp_path, monkeypatch):
    accuracy = iter([70.0, 60.0, 60.0, 55.0])  # the first is that of the untrained model
    monkeypatch.setattr(train_cifar, "evaluate", lambda *_: {"test_loss": 1.0, "test_accuracy": next(accuracy)})
    train(epochs=2)
    train(epochs=3, resume=True)
    assert open_model(tmp_path / "run").epoch == 2  # of best.pt, the later of two equal ones


@pytest.mark.parametrize("how", [{"amp": "bf16"}, {"compile": True}], ids=["amp", "compile"])
def test_mixed_precision_and_compilation_train_the_same_model(how, train, tmp_path, monkeypatch):
    compiled, compile_model = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(1) or compile_model(model, backend="aot_eager"))
    for name, values in (("plain", {}), ("other", how)):
        train(run=tmp_path / name, epochs=1, **values)
    assert len(compiled) == ("compile" in how)
    plain, other = (read_metrics(tmp_path / name)[1]["train_loss"] for name in ("plain", "other"))
    assert other == pytest.approx(plain, rel=0.02) and (other != plain or "compile" in how)
    files = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("plain", "other")]
    assert files[0]["model"].keys() == files[1]["model"].keys()


def test_speed_excludes_the_first_step_of_an_epoch(train, tmp_path, monkeypatch):
    """It may compile: here, it takes a minute, and the other two take two seconds."""
    clock = [0.0]

    def slow_step(step, *args):
        clock[0] += 60 if step % 3 == 0 else 2
        return learning_rate(step, *args)

    monkeypatch.setattr(train_cifar, "learning_rate", slow_step)
    timers = SimpleNamespace(monotonic=time.monotonic, perf_counter=lambda: clock[0])
    monkeypatch.setattr("training.run.time", timers)
    train()
    assert [row["images_per_second"] for row in read_metrics(tmp_path / "run")[1:]] == [4, 4]  # 2 x 8 images in 4 s


def test_run_is_continued_and_evaluated_from_its_config(train, tmp_path):
    """As docs/distributed.md says for notebooks."""
    train(epochs=1)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    train_cifar.train(train_cifar.Config(**saved | {"resume": True, "epochs": 2}))
    assert len(read_metrics(tmp_path / "run")) == 3
    evaluate_weights(train_cifar.Config(**saved | {"eval": True, "weights": None}), InMemoryData)
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["weights"] == f"{tmp_path}/run/best.pt"


def test_other_processes_of_a_program_are_left_alone(monkeypatch):
    code = "import multiprocessing, train_cifar; pool = multiprocessing.get_context('fork').Pool(1); pool.map(abs, [1])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
    monkeypatch.delattr(signal, "SIGCHLD")  # as on Windows
    distributed.kill_workers()


def test_timeout_of_another_process_is_one_sentence(monkeypatch):
    def time_out(*_):
        raise RuntimeError("Timed out waiting 1800000ms")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", time_out)
    with pytest.raises(UserError, match=r"another process has failed or is not responding; .* \(Timed out"):
        distributed.barrier()


def test_missing_gpus_and_types_are_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no CUDA device on this machine; use --device cpu"):
        distributed.init("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(UserError, match="--nproc-per-node exceeds the 2 GPUs"):
        distributed.init("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(UserError, match="does not support bf16: use --amp fp16"):
        train_cifar.Config(device="cuda", amp="bf16").check(50_000)


def test_run_older_than_a_flag_is_resumed(train, tmp_path):
    train(epochs=1)
    record = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    del record["config"]["gate_init"]
    torch.save(record, tmp_path / "run" / "last.pt")
    with pytest.raises(UserError, match=r"the run has --gate-init 1\.0, not 0\.0: omit the flag"):
        train(epochs=2, resume=True, gate_init=0.0)
    train(epochs=2, resume=True)


def test_train_does_not_evaluate(train):
    message = r"^train\(\) does not evaluate: call training\.evaluation\.evaluate_weights, as main\(\) does$"
    with pytest.raises(UserError, match=message):
        train(eval=True)


def test_values_of_a_config_are_checked_as_flags():
    wrong = {"mixup": -1, "model": "convit", "batch_size": 2.5, "amp": "fp8", "hflip": "no", "save_every": "soon"}
    for name, value in wrong.items():
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')}.*'{value}'"):
            train_cifar.Config(**{name: value})
    config = train_cifar.Config(data_dir=Path("images"), lr=np.float32(0.5), val_fraction=None)
    assert (config.data_dir, config.lr, config.val_fraction) == ("images", 0.5, None)
    assert type(config.lr) is float


def test_file_system_without_locks_gets_a_note(train, monkeypatch, capsys):
    def raise_error(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", raise_error)
    train(epochs=1)
    output = capsys.readouterr().out
    expected = f"cannot be locked ([Errno {errno.ENOLCK}] No locks available): start no second process in it"
    assert expected in output
    assert "epoch   1" in output


def test_windows_gets_one_sentence(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(UserError, match="training needs Linux or macOS"):
        train()


@pytest.mark.parametrize("name", ["train_cifar", "train_imagenet", "predict", "app"])
def test_ctrl_c_during_imports_gives_no_traceback(name):
    command = [sys.executable, "-X", "importtime", f"{name}.py"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stderr if "torch." in line)  # the first part of torch has been imported
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate()[1]
    assert process.returncode == -signal.SIGINT  # 130 in a shell


def test_help_imports_little_more_than_torch():
    code = "import sys, train_cifar, train_imagenet, predict; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert "torch" in modules
    assert not {"torchvision", "matplotlib", "tensorboard", "scipy", "sympy", "gradio"} & set(modules)


def test_provenance_of_a_gpu(monkeypatch):
    read_text = Path.read_text

    def read_text_with_driver(file, *args, **kwargs):
        if str(file) == "/proc/driver/nvidia/version":
            return "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 00:00:00 UTC 2025\n"
        return read_text(file, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text_with_driver)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H100 ({device})")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    entry = checkpoint.provenance(torch.device("cuda", 1))
    expected = {"device": "H100 (cuda:1)", "cuda": "13.0", "cudnn": 91002, "driver": "570.86.15"}
    assert {name: entry[name] for name in expected} == expected


def test_mismatched_and_damaged_checkpoints_are_refused(tree, reference_run, tmp_path, run_script, monkeypatch):
    def refusal(*flags) -> str:
        status, output = run_script(train_cifar, "--run", reference_run, "--resume", *flags)
        assert status == 1
        return output.strip().splitlines()[-1]

    whole = (reference_run / "last.pt").read_bytes()
    other = refusal("--model", "vit_cifar_nano")
    assert "the run has --model convit_cifar_nano, not vit_cifar_nano" in other
    assert "--batch-size 4, not 8" in refusal("--batch-size", "8")
    assert "--dataset folder, not patterns" in refusal("--dataset", "patterns")
    with monkeypatch.context() as changed_code:  # with a frozen layer
        fewer = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": 1}]
        changed_code.setattr(train_cifar, "param_groups", lambda *_: fewer)
        assert "last.pt does not match this model and data: " in refusal()
    metrics = (reference_run / "metrics.jsonl").read_text()
    (reference_run / "metrics.jsonl").write_text("<<<<<<< HEAD\n" + metrics)
    assert "metrics.jsonl is damaged" in (message := refusal()) and "last.pt" not in message
    (reference_run / "metrics.jsonl").unlink()
    assert "metrics.jsonl': restore the file" in refusal()
    (reference_run / "metrics.jsonl").write_text(metrics)
    assert (reference_run / "last.pt").read_bytes() == whole

    (reference_run / "last.pt").write_bytes(whole[: len(whole) // 2])
    assert "last.pt is damaged" in refusal() and "--weights" in refusal()
    middle = len(whole) // 2
    (reference_run / "last.pt").write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert "last.pt is damaged" in refusal()

    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model": Trap()}, reference_run / "last.pt")
    assert "was not loaded" in refusal()
    (reference_run / "last.pt").write_bytes(pickle.dumps(Trap()))
    assert "was not loaded" in refusal()
    assert not (tmp_path / "executed").exists()

    new = ["--data-dir", tree, "--run", tmp_path / "new", *QUICK, "--weights", reference_run / "best.pt"]
    status, output = run_script(train_cifar, *new, "--epochs", "1")
    assert status == 0, output
    start = read_metrics(tmp_path / "new")[0]["test_accuracy"]
    assert start == max(line["test_accuracy"] for line in read_metrics(reference_run))


def test_run_folder_in_use_is_refused(tree, tmp_path, run_script):
    run = tmp_path / "run"
    first = Script(tmp_path / "log", "--data-dir", tree, "--run", run, *QUICK, "--epochs", "500")
    first.wait_for(run / "last.pt")
    before = (run / "config.json").read_text()
    status, output = run_script(train_cifar, "--run", run, "--resume", "--lr", "0.5")
    assert status == 1 and "another process is training in" in output
    assert (run / "config.json").read_text() == before and first.process.is_alive()
    first.process.kill()
    first.process.join()


def children_of(pid: int) -> list[int]:
    """Child processes of a process, the oldest first."""
    if not shutil.which("ps"):
        pytest.skip("ps is missing: apt install procps")
    table = subprocess.check_output(["ps", "-Ao", "ppid=,pid="], text=True)
    return sorted(int(child) for parent, child in map(str.split, table.splitlines()) if int(parent) == pid)


def torchrun(log: Path, flags: list):
    """In a child process: torchrun."""
    redirect_output(log)
    os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # as in the docs
    os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"
    torch.distributed.run.main(flags)


DYING_WORKER = """
import os, pathlib, signal
import conftest, train_cifar
from training.run import Run

conftest.train_quickly()
steps, died = Run.steps, pathlib.Path(__file__).with_name("died")

def dying(run, epoch, batches):
    for item in steps(run, epoch, batches):
        if epoch == 3 and os.environ["RANK"] == "1" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

Run.steps = dying
train_cifar.main()
"""


def two_machines(folder: Path, *flags) -> list[multiprocessing.Process]:
    """Two torchrun agents that act as two machines with one process each, and restart once."""
    script = folder / "train_small.py"
    script.write_text(DYING_WORKER)
    command = ["--nproc-per-node=1", "--nnodes=2", "--max-restarts=1", "--rdzv-backend=c10d", "--rdzv-id=test"]
    command += [f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--", *map(str, [script, *flags])]
    agents = [forkserver.Process(target=torchrun, args=(folder / "agents.log", command)) for _ in range(2)]
    for agent in agents:
        agent.start()
    return agents


def test_two_machines_survive_a_killed_worker_and_match_one_process(tree, tmp_path):
    flags = ["--data-dir", tree, "--no-hflip", "--crop-padding", "0", "--epochs", "5", "--batch-size", "8"]
    flags += ["--device", "cpu", "--grad-accum-steps"]

    # two machines, of which one loses its worker
    agents, log = two_machines(tmp_path, *flags, "2", "--run", tmp_path / "killed"), tmp_path / "agents.log"

    # two processes on one machine, and a single process
    port = free_port()
    two = [*flags, "2", "--run", tmp_path / "two"]
    ranks = [Script(tmp_path / "two.log", *two, prepare=partial(become_rank, rank, port)) for rank in range(2)]
    for script in [*ranks, Script(tmp_path / "one.log", *flags, "1", "--run", tmp_path / "one")]:
        status, output = script.wait()
        assert status == 0, output
    for agent in agents:
        agent.join(120)
    assert [agent.exitcode for agent in agents] == [0, 0], log.read_text()

    assert len(json.loads((tmp_path / "killed" / "provenance.json").read_text())) == 2  # it was resumed
    assert_same_run(tmp_path / "killed", tmp_path / "two")
    one, two = (read_metrics(tmp_path / name) for name in ("one", "two"))
    assert len(one) == 6  # 15 steps
    for single, double in zip(one, two, strict=True):
        assert single.get("train_loss", 0) == pytest.approx(double.get("train_loss", 0), abs=1e-5)
        assert single["test_loss"] == pytest.approx(double["test_loss"], abs=1e-5)  # 9 images, every image once
        assert single["test_accuracy"] == double["test_accuracy"]

    # one process goes on with the run of two
    status, output = Script(tmp_path / "log", "--run", tmp_path / "two", "--resume", "--epochs", "6").wait()
    assert status == 0 and len(read_metrics(tmp_path / "two")) == 7, output


@pytest.fixture
def imagenet(tree, tmp_path) -> Path:
    """The images as an ImageNet-like tree train/, val/."""
    shutil.copytree(tree, tmp_path / "imagenet")
    (tmp_path / "imagenet" / "test").rename(tmp_path / "imagenet" / "val")
    return tmp_path / "imagenet"


SMALL = ["--model", "convit_cifar_nano", "--epochs", "1", "--batch-size", "8", "--warmup-epochs", "0"]
SMALL += ["--device", "cpu"]


def test_number_of_workers_does_not_change_the_run(imagenet, tmp_path, run_script):
    for workers in (0, 2):
        flags = ["--data-dir", imagenet, *SMALL, "--run", tmp_path / f"run{workers}", "--workers", workers]
        status, output = run_script(train_imagenet, *flags)
        assert status == 0, output
    assert_same_run(tmp_path / "run0", tmp_path / "run2")
    assert read_metrics(tmp_path / "run0")[1]["train_loss"] < 2


def test_workers_survive_a_signal_until_the_step_is_saved(imagenet, tmp_path):
    run = tmp_path / "run"
    flags = ["--data-dir", imagenet, *SMALL, "--workers", "2", "--steps-per-epoch", "1000", "--run", run]
    script = Script(tmp_path / "log", *flags, "--save-every", "2", name="train_imagenet")
    script.wait_for(run / "last.pt")
    workers = children_of(script.process.pid)
    assert len(workers) == 2
    for pid in [*workers, *workers, script.process.pid]:  # torchrun may deliver it twice
        os.kill(pid, signal.SIGTERM)
    status, output = script.wait()
    assert status == 128 + signal.SIGTERM and "Traceback" not in output
    assert "stopped and saved after step" in output


def test_a_bug_ends_the_process_at_once(imagenet, tmp_path):
    """With its traceback, although data workers defer the SIGTERM that Python sends them."""
    code = "import sys, train_imagenet as t; sys.stderr.isatty = lambda: True; t.normalize = None; t.main()"
    flags = ["--data-dir", imagenet, *SMALL, "--workers", "2", "--run", tmp_path / "run"]
    command = [sys.executable, "-c", code, *map(str, flags)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert process.returncode == 1 and "'NoneType' object is not callable" in process.stderr
    assert "Alarm clock" not in process.stderr


def test_unreadable_image_is_named(imagenet, tmp_path, run_script):
    bad = imagenet / "train" / "green" / "3.png"
    bad.write_bytes(bad.read_bytes()[:200])
    flags = ["--data-dir", imagenet, *SMALL, "--workers", "2", "--aug-repeats", "1", "--epochs", "2"]
    status, output = run_script(train_imagenet, *flags, "--run", tmp_path / "run")
    assert status == 1 and f"{bad} is truncated or damaged" in output
    status, output = run_script(train_imagenet, *flags, "--run", tmp_path / "skip", "--skip-bad-images")
    assert status == 0 and re.search(f"{bad} is truncated .*; the next one replaces it", output)


def test_train_imagenet_on_patterns(tmp_path, monkeypatch, run_script):
    monkeypatch.setattr("training.data.patterns", lambda count, split: patterns(count // 50, split))
    flags = [*SMALL, "--dataset", "patterns", "--data-fraction", "0.1", "--workers", "0", "--run", tmp_path / "run"]
    flags += ["--img-size", "16", "--steps-per-epoch", "7"]  # more than a pass over the 40 images
    status, output = run_script(train_imagenet, *flags)
    assert status == 0 and "40 training and 40 test images of 4 classes" in output
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 7]
    peak_lr = 5e-4 * 8 / 512  # a rate per 512 images
    assert read_metrics(tmp_path / "run")[1]["lr"] == pytest.approx(peak_lr / 10)  # of the last step
    weights = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    assert weights["model_config"]["img_size"] == 16 and weights["model"]["pos_embed"].shape[1] == 16


def test_evaluation_needs_only_the_validation_images(reference_run, imagenet, tmp_path, run_script):
    shutil.rmtree(imagenet / "train")
    flags = ["--data-dir", imagenet, *SMALL, "--eval", "--weights", reference_run / "best.pt"]
    status, output = run_script(train_imagenet, *flags, "--run", tmp_path / "run")
    assert status == 0 and "test_accuracy" in output, output
    assert json.loads((tmp_path / "run" / "eval.json").read_text())["split"] == "validation"
    for wrong, message in (
        (["--img-size", "30"], "--img-size 30 must be a multiple of the patch size, 4"),
        (["--run", reference_run / "best.pt"], "File exists"),
    ):
        status, output = run_script(train_imagenet, *flags, "--run", tmp_path / "run", *wrong)
        assert status == 1 and message in output and "Traceback" not in output, output


def test_missing_and_mismatched_folders_get_one_sentence(imagenet, tmp_path, run_script):
    def error_of(*flags) -> str:
        status, output = run_script(train_imagenet, *flags, *SMALL, "--run", tmp_path / "run")
        assert status == 1
        return output

    nothing = error_of("--data-dir", tmp_path / "nothing")
    assert all(hint in nothing for hint in ("does not exist", "--dataset patterns", "train_cifar.py"))
    assert "leaves no training images" in error_of("--data-dir", imagenet, "--val-fraction", "1")
    (imagenet / "val" / "green").rename(imagenet / "val" / "yellow")
    assert "classes that the training set lacks: yellow" in error_of("--data-dir", imagenet)
    assert not (tmp_path / "run").exists()


def test_ablations_of_table_3_are_flags(train, tmp_path):
    def first_layer(name: str, **values) -> tuple[set[str], dict]:
        """Parameters of the first layer that one epoch changes, and their initial values."""
        train(run=tmp_path / name, epochs=1, drop_path=0.2, mixup=0.8, **values)
        files = [tmp_path / name / "snapshots" / f"epoch_000{epoch}.pt" for epoch in (0, 1)]
        first, last = (torch.load(file, weights_only=True)["model"] for file in files)
        start = {key.removeprefix("blocks.0.attn."): value.float() for key, value in first.items()}
        moved = {key for key, value in last.items() if not torch.equal(value, first[key])}
        return {key.removeprefix("blocks.0.attn.") for key in moved if key.startswith("blocks.0.attn.")}, start

    moved, start = first_layer("full")
    assert moved == {"qk.weight", "v.weight", "pos_proj.weight", "gating_param", "proj.weight", "proj.bias"}
    assert torch.equal(start["v.weight"], torch.eye(144))
    moved, start = first_layer("no_gating", gating="frozen", gate_init=0)
    assert "gating_param" not in moved and start["gating_param"].abs().max() == 0
    _, start = first_layer("no_conv_init", conv_init=False)
    assert not torch.equal(start["v.weight"], torch.eye(144))
    moved, _ = first_layer("frozen", freeze_gpsa=True)
    assert moved == {"proj.weight", "proj.bias"}
