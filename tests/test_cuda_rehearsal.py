"""Both training scripts, end to end on fake CUDA tensors: no GPU is needed, and no arithmetic is done.

Fails where an operation mixes a CUDA tensor with a CPU tensor of one dimension or more, and where a line of ours makes
the host wait for the device within a step. The last test runs on a real GPU if there is one.
"""

import sys
import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from conftest import ROOT
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import train_cifar
import train_imagenet
from training import checkpoint, evaluation
from training.run import Run

pytestmark = pytest.mark.usefixtures("small_model", "no_plots")
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
DATA_DEPENDENT = {aten.nonzero.default, aten.masked_select.default}


class Rehearsal(TorchDispatchMode):
    """Runs on top of a FakeTensorMode: CPU operations are real, CUDA operations are fake, waits are recorded."""

    def __init__(self):
        super().__init__()
        self.in_step, self.waits, self.model = False, [], None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_cuda = any(tensor.device.type == "cuda" for tensor in tensors)
        device = torch.device(kwargs.get("device") or "cpu").type
        if not on_cuda and device == "cpu":
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func in COPIES:
            return self.copy(func, args, kwargs)
        mixed = [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.ndim > 0]
        assert not mixed or not on_cuda, f"{func} mixes devices at {our_line()}"
        if func is aten._local_scalar_dense.default:
            self.record_wait()
            return True if args[0].dtype == torch.bool else 1 if not args[0].dtype.is_floating_point else 1.0
        data_dependent = func in DATA_DEPENDENT or (func is aten.index.Tensor and has_mask(args[1]))
        assert not data_dependent, f"{func} waits for the size of its result at {our_line()}"
        if func in (aten._sample_dirichlet.default, aten._standard_gamma.default):  # no meta kernel
            return torch.empty_like(args[0])
        return func(*args, **kwargs)

    def copy(self, func, args, kwargs):
        """A copy between devices waits, unless it is asynchronous and from pinned memory."""
        source, target = (args[1], args[0]) if func is aten.copy_.default else (args[0], None)
        target_device = target.device if target is not None else torch.device(kwargs.get("device") or source.device)
        if source.device.type != target_device.type and source.ndim > 0:
            asynchronous = kwargs.get("non_blocking") and getattr(source, "pinned", False)
            if not asynchronous:
                self.record_wait()
        if source.device.type == "cuda" and target_device.type == "cpu":
            if source.ndim == 0:
                self.record_wait()
            with unset_fake_temporarily():
                dtype = kwargs.get("dtype") or source.dtype
                return torch.zeros(source.shape, dtype=dtype) if target is None else target.zero_()
        return func(*args, **kwargs)

    def record_wait(self):
        self.waits.append((self.in_step, our_line()))


def has_mask(indices) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def our_line() -> str:
    """The innermost line of this project, tests aside, that is being executed."""
    for frame in reversed(traceback.extract_stack()):
        file = Path(frame.filename)
        if file.is_relative_to(ROOT) and not file.is_relative_to(ROOT / "tests") and ".venv" not in file.parts:
            return f"{file.relative_to(ROOT)}:{frame.lineno}: {frame.line}"
    return "?"


@contextmanager
def marked_steps(mark):
    """Call mark(True) when a training step begins, and mark(False) when it ends."""
    steps, after_step = Run.steps, Run.after_step

    def begin(run, epoch, batches):
        for item in steps(run, epoch, batches):
            mark(True)
            yield item
            mark(True)  # the next batch is part of a step, too
        mark(False)

    def end(run, step, lr):
        mark((step + 1) % run.steps_per_epoch > 0)  # the last step of an epoch reports the loss and saves: it waits
        after_step(run, step, lr)
        mark(False)

    with patch.object(Run, "steps", begin), patch.object(Run, "after_step", end):
        yield


@contextmanager
def fake_cuda(script):
    """torch and a training script as on a machine with one GPU."""
    rehearsal, fakes = Rehearsal(), FakeTensorMode(allow_non_fake_inputs=True)
    build_model, load, save = script.build_model, torch.load, torch.save

    def build(*args):
        rehearsal.model = build_model(*args)
        return rehearsal.model

    def backward(_, *args, **kwargs):  # the autograd engine needs a device
        for param in rehearsal.model.parameters():
            if param.requires_grad:
                param.grad = torch.zeros_like(param)

    def pin_memory(tensor, device=None):
        tensor.pinned = True
        return tensor

    def save_zeros(record, file):
        def real(leaf):
            return torch.zeros(leaf.shape, dtype=leaf.dtype) if isinstance(leaf, FakeTensor) else leaf

        with unset_fake_temporarily():
            save(tree_map(real, record), file)

    def load_to(file, map_location=None, **kwargs):
        with unset_fake_temporarily():
            record = load(file, map_location="cpu", **kwargs)
        return tree_map(lambda leaf: leaf.to(map_location) if isinstance(leaf, torch.Tensor) else leaf, record)

    predict_all = torch.no_grad()(evaluation.predict_all.__wrapped__)  # inference_mode would hide compound operations
    cuda = {"is_available": True, "device_count": 1, "set_device": None, "is_bf16_supported": True,
            "get_device_name": "fake", "current_device": 0, "is_current_stream_capturing": False}  # fmt: skip
    with ExitStack() as stack:
        for name, answer in cuda.items():
            stack.enter_context(patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        for target, name, replacement in [
            (torch.Tensor, "backward", backward),
            (torch.Tensor, "pin_memory", pin_memory),
            (torch.accelerator, "set_device_index", lambda *_: None),
            (checkpoint, "provenance", lambda _: {}),
            (torch, "save", save_zeros),
            (torch, "load", load_to),
            (FakeTensorMode, "avoid_device_init", True),
            (script, "build_model", build),
            (evaluation, "predict_all", predict_all),
        ]:
            stack.enter_context(patch.object(target, name, replacement))
        if hasattr(fake_tensor, "init_gpu_context"):  # torch 2.11
            stack.enter_context(patch.object(fake_tensor, "init_gpu_context", lambda *_: None))
        stack.enter_context(marked_steps(lambda in_step: setattr(rehearsal, "in_step", in_step)))
        stack.enter_context(fakes)
        stack.enter_context(rehearsal)
        yield rehearsal


def rehearse(script, flags: list) -> Rehearsal:
    argv = [f"{script.__name__}.py", "--device", "cuda", *map(str, flags)]
    with patch.object(sys, "argv", argv), fake_cuda(script) as rehearsal:
        script.main()
    return rehearsal


def waits_in_steps(rehearsal: Rehearsal) -> list[str]:
    return [line for in_step, line in rehearsal.waits if in_step]


RECIPE = ["--epochs", "1", "--steps-per-epoch", "2", "--batch-size", "8", "--mixup", "0.8", "--cutmix", "1"]
RECIPE += ["--random-erasing", "0.25", "--grad-accum-steps", "2", "--clip-grad", "1", "--drop-path", "0.1"]
RECIPE += ["--warmup-epochs", "1", "--model", "convit_cifar_nano"]


@pytest.mark.parametrize(("script", "amp"), [(train_cifar, "fp16"), (train_imagenet, "bf16")])
def test_no_step_waits_for_the_device(script, amp, tree, tmp_path):
    flags = ["--data-dir", tree, "--run", tmp_path / "run", *RECIPE, "--amp", amp]
    flags += ["--workers", "2"] if script is train_imagenet else []
    rehearsals = [rehearse(script, flags)]
    if script is train_cifar:
        rehearsals.append(rehearse(script, [*flags, "--resume", "--epochs", "2"]))
    for rehearsal in rehearsals:
        assert waits_in_steps(rehearsal) == []
        assert any("evaluation.py" in line for _, line in rehearsal.waits)  # evaluation does wait
        assert not any(line.startswith("?") for _, line in rehearsal.waits)


PLANTED_BUGS = {
    "CPU tensor in the loop": lambda images: images * torch.ones(3, 1, 1),
    "index on the wrong device": lambda images: images[torch.arange(len(images))],
    "item in every step": lambda images: images + images.sum().item(),
    "mask by boolean index": lambda images: images[images[:, 0, 0, 0] >= 0],
    "copy from memory that is not pinned": lambda images: images + torch.ones(3, 1, 1).to(images.device),
}


@pytest.mark.parametrize("bug", PLANTED_BUGS)
def test_planted_bug_is_caught(bug, tree, tmp_path, monkeypatch):
    monkeypatch.setattr(train_cifar, "random_hflip", lambda images, _: PLANTED_BUGS[bug](images))
    flags = ["--data-dir", tree, "--run", tmp_path / "run", *RECIPE, "--steps-per-epoch", "1"]
    try:
        waits = waits_in_steps(rehearse(train_cifar, flags))
    except AssertionError as error:
        waits = [str(error)]
    assert waits and all("train_cifar.py" in line for line in waits)  # the line that called it


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize(("script", "amp"), [(train_cifar, "fp16"), (train_imagenet, "bf16")])
def test_no_step_waits_for_a_real_gpu(script, amp, tree, tmp_path, monkeypatch):
    flags = ["--data-dir", tree, "--run", tmp_path / "run", *RECIPE, "--amp", amp]
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--device", "cuda", *map(str, flags)])
    with marked_steps(lambda in_step: torch.cuda.set_sync_debug_mode("error" if in_step else "default")):
        script.main()
