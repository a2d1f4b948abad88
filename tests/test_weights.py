"""load_weights: round trips, other sizes, and damaged or malicious files."""

import argparse
import math
import pathlib
import pickle
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import PosixPath

import numpy as np
import pytest
import torch
from conftest import CONFIG, free_port, perturb
from PIL import Image
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed

from convit_min import ConViT, ConViTConfig, create_model, resize_pos_embed
from images import normalize, preprocess
from predict import predict
from training.checkpoint import save_weights
from weights import load_weights, open_model


def same_weights(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def prefixed(state: dict, prefix: str) -> dict:
    return {prefix + name: value for name, value in state.items()}


FILES = {  # what people have
    "flat": lambda state: state,
    "authors' training": lambda state: {
        "model": state,
        "model_ema": {name: torch.zeros_like(value) for name, value in state.items()},  # not what they evaluate
        "epoch": 3,
        "args": argparse.Namespace(lr=5e-4, model="convit", output_dir=PosixPath("checkpoints")),
    },
    "timm's last.pth.tar": lambda state: {  # the moving average is what timm evaluates
        "state_dict": {name: torch.zeros_like(value) for name, value in state.items()},
        "state_dict_ema": state,
        "arch": "convit_tiny",
        "args": argparse.Namespace(seed=1),
    },
    "EMA": lambda state: {"model_ema": prefixed(state, "module.")},
    "timm's EMA": lambda state: {"state_dict_ema": state},
    "Lightning": lambda state: {  # with the weights of a loss, and the name of the model
        "state_dict": prefixed(state, "net.backbone.") | {"criterion.weight": torch.ones(5)},
        "pytorch-lightning_version": "2.5",
        "model": "convit_tiny",
    },
    "config beside them": lambda state: {"model": {"name": "convit_tiny"}, "state_dict": state},
    "compiled DDP": lambda state: {"model": prefixed(state, "_orig_mod.module.")},
    "AveragedModel": lambda state: {"n_averaged": torch.tensor(3)} | prefixed(state, "module."),
}


FILES["authors' training, written by Python 3.13"] = FILES["authors' training"]


@pytest.mark.parametrize("kind", FILES)
def test_save_and_load_round_trip(kind, tmp_path, monkeypatch):
    trained, fresh = perturb(ConViT(CONFIG)), ConViT(CONFIG)
    with monkeypatch.context() as python_3_13:
        if "written by Python 3.13" in kind:
            python_3_13.setitem(sys.modules, "pathlib._local", pathlib)
            python_3_13.setattr(PosixPath, "__module__", "pathlib._local")
        torch.save(FILES[kind](trained.state_dict()), tmp_path / "weights.pt")
    assert not same_weights(trained, fresh)
    load_weights(fresh, tmp_path / "weights.pt")
    assert same_weights(trained, fresh)


def test_safetensors(tmp_path):
    trained, fresh = perturb(ConViT(CONFIG)), ConViT(CONFIG)
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    load_weights(fresh, tmp_path / "weights.safetensors")
    assert same_weights(trained, fresh)


def test_download_is_cached_unless_it_is_damaged(web_server, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    folder, url = web_server
    trained, fresh = perturb(ConViT(CONFIG)), ConViT(CONFIG)
    for name in ("weights.pt", "weights.safetensors"):
        (folder / name).write_text("<html>")
        with pytest.raises(ValueError, match=rf"{name}\?download=true is damaged, or is not a PyTorch checkpoint"):
            load_weights(fresh, f"{url}/{name}?download=true")
    torch.save(trained.state_dict(), folder / "weights.pt")
    save_file(trained.state_dict(), folder / "weights.safetensors")
    for name in ("weights.pt", "weights.safetensors"):
        for _ in range(2):
            fresh = ConViT(CONFIG)
            load_weights(fresh, f"{url}/{name}?download=true")
            assert same_weights(trained, fresh)
            (folder / name).unlink(missing_ok=True)  # the second time, it comes from the cache


def test_error_names_the_model_of_the_file(tmp_path):
    torch.save(create_model("vit_cifar_nano").state_dict(), tmp_path / "weights.pt")
    with pytest.raises(
        ValueError, match=r"this model \(it is a vit_cifar_nano, it has gpsa_layers=0, not 5\); missing: "
    ):
        load_weights(create_model("convit_cifar_nano"), tmp_path / "weights.pt")
    save_weights(create_model("convit_cifar_nano", patch_size=8), list("abcdefghij"), 1.0, 3, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"this model \(it has patch_size=8, not 4\); with a different shape: patch"):
        load_weights(create_model("convit_cifar_nano"), tmp_path / "weights.pt")


def test_open_model_infers_the_size_or_says_that_it_is_unknown(tmp_path):
    trained = perturb(create_model("deit_tiny", num_classes=7))
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    opened = open_model(tmp_path / "weights.pt")
    assert not opened.training and same_weights(trained, opened)
    assert opened.classes[6] == "class 6" and not opened.has_class_names and opened.crop_pct == 0.875
    record = {"model": trained.state_dict(), "model_config": asdict(trained.config), "classes": opened.classes}
    torch.save(record, tmp_path / "named.pt")
    assert open_model(tmp_path / "named.pt").has_class_names  # also by these names
    torch.save(ConViT(CONFIG).state_dict(), tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="does not match any model"):
        open_model(tmp_path / "odd.pt")
    with pytest.raises(FileNotFoundError, match=r"neither best\.pt nor snapshots/"):
        open_model(tmp_path)


def test_weights_of_224_pixels_load_at_256_by_192(tmp_path):
    trained = perturb(create_model("convit_tiny", depth=2, gpsa_layers=1, num_classes=7))
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    other = create_model("convit_tiny", depth=2, gpsa_layers=1, num_classes=7, img_size=(256, 192)).eval()
    load_weights(other, tmp_path / "weights.pt")
    images = torch.randn(1, 3, 256, 192)
    with torch.no_grad():
        torch.testing.assert_close(other(images), trained(images))  # resized on loading, or on the way
    assert other.pos_embed.shape == (1, 16 * 12, 192)


@pytest.mark.parametrize(("old", "new"), [((14, 14), (16, 12)), ((2, 8), (4, 4)), ((5, 7), (9, 3))])
def test_resized_pos_embed_equals_timms(old, new):
    pos_embed = torch.randn(1, math.prod(old), 6)
    expected = resample_abs_pos_embed(pos_embed, list(new), list(old), num_prefix_tokens=0)
    torch.testing.assert_close(resize_pos_embed(pos_embed, old, new), expected)


def test_same_number_of_patches_on_another_grid_is_interpolated(tmp_path):
    wide, square = (ConViT(replace(CONFIG, img_size=size)) for size in ((8, 32), (16, 16)))
    perturb(wide)
    torch.save({"model": wide.state_dict(), "model_config": asdict(wide.config)}, tmp_path / "wide.pt")
    load_weights(square, tmp_path / "wide.pt")
    expected = resize_pos_embed(wide.pos_embed.detach(), (2, 8), (4, 4))
    torch.testing.assert_close(square.pos_embed.detach(), expected)
    assert not torch.equal(square.pos_embed, wide.pos_embed)


def test_released_weights_on_another_grid_of_196_patches(tmp_path, monkeypatch):
    trained, wide = perturb(create_model("convit_tiny")), create_model("convit_tiny", img_size=(112, 448))
    torch.save({"model": trained.state_dict()}, tmp_path / "tiny.pth")
    monkeypatch.setattr("weights.download", lambda url: str(tmp_path / "tiny.pth"))
    load_weights(wide, "convit_tiny")
    torch.testing.assert_close(wide.pos_embed, resize_pos_embed(trained.pos_embed, (14, 14), (7, 28)))


def test_grayscale_model_is_opened_as_rgb(tmp_path):
    """It sees the mean of the channels; `load_weights` still reads it into a grayscale model."""
    trained = perturb(create_model("convit_cifar_nano", in_chans=1))
    torch.save(trained.state_dict(), tmp_path / "flat.pt")
    save_weights(trained, list("abcdefghij"), 1.0, 3, tmp_path / "ours.pt")
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    for file in (tmp_path / "flat.pt", tmp_path / "ours.pt"):
        opened, again = open_model(file), create_model("convit_cifar_nano", in_chans=1)
        expected = trained(normalize(pixels.float().mean(1, keepdim=True)))
        torch.testing.assert_close(opened(normalize(pixels)), expected, atol=1e-4, rtol=1e-4)
        assert len(predict(opened, pixels[0].permute(1, 2, 0).numpy())) == 3
        load_weights(again, file)
        assert same_weights(again, trained)


def test_other_channels_than_gray_and_rgb_are_refused(tmp_path):
    model = create_model("convit_cifar_nano", in_chans=4)
    torch.save(model.state_dict(), tmp_path / "flat.pt")
    save_weights(model, list("abcdefghij"), 1.0, 3, tmp_path / "ours.pt")
    for name in ("flat", "ours"):
        with pytest.raises(ValueError, match=f"{name}.pt is for images of 4 channels: only grayscale and RGB"):
            open_model(tmp_path / f"{name}.pt")


def test_ten_patches_are_not_mistaken_for_deit_format(tmp_path):
    plain = replace(CONFIG, img_size=(8, 20), gpsa_layers=0)
    trained, fresh = perturb(ConViT(plain)), ConViT(plain)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    load_weights(fresh, tmp_path / "weights.pt")
    assert same_weights(trained, fresh)
    save_weights(trained, list("abcde"), 1.0, 1, tmp_path / "run.pt")
    with pytest.raises(ValueError, match=r"does not match this model \(it has num_heads=9, not 6\)$"):
        load_weights(ConViT(replace(plain, num_heads=6)), tmp_path / "run.pt")  # all shapes are the same


def test_other_number_of_classes_keeps_the_new_head(tmp_path):
    torch.save(perturb(ConViT(CONFIG)).state_dict(), tmp_path / "weights.pt")
    model = ConViT(ConViTConfig(**{**vars(CONFIG), "num_classes": 3}))
    head = model.head.weight.clone()
    with pytest.warns(UserWarning, match="other classes or no classifier: its classifier was not loaded"):
        load_weights(model, tmp_path / "weights.pt")
    assert torch.equal(model.head.weight, head)
    backbone = ConViT(ConViTConfig(**{**vars(CONFIG), "num_classes": 0}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has no classifier: there is nothing to warn of
        load_weights(backbone, tmp_path / "weights.pt")
    assert backbone(torch.randn(1, 3, 20, 28)).shape == (1, 36)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pt")
    with pytest.warns(UserWarning, match="other classes or no classifier: its classifier was not loaded"):
        load_weights(model, tmp_path / "backbone.pt")
    assert torch.equal(model.head.weight, head)


def test_mismatched_keys_are_named_and_nothing_changes(tmp_path):
    model = ConViT(CONFIG)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = perturb(ConViT(CONFIG)).state_dict()
    del state["norm.weight"]
    state["stranger"] = torch.zeros(1)
    state["blocks.0.attn.gating_param"] = torch.zeros(4)
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ValueError) as caught:
        load_weights(model, tmp_path / "weights.pt")
    for name in ("norm.weight", "stranger", "blocks.0.attn.gating_param"):
        assert name in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_new_parameters_keep_their_initial_values(tmp_path):
    class Extended(ConViT):
        def __init__(self, config):
            super().__init__(config)
            self.blocks[0].attn.relative_bias = torch.nn.Parameter(torch.full((9,), 7.0))

    trained, extended = perturb(ConViT(CONFIG)), Extended(CONFIG)
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"missing: .*relative_bias"):
        load_weights(extended, tmp_path / "weights.pt")
    for new in (("relative_bias",), "relative_bias"):
        load_weights(extended, tmp_path / "weights.pt", new=new)
        assert (extended.blocks[0].attn.relative_bias == 7).all()
        assert torch.equal(extended.blocks[0].attn.v.weight, trained.blocks[0].attn.v.weight)


def test_any_rgb_model_predicts_once_its_weights_are_loaded(tmp_path):
    """Also one that open_model cannot recognize, and says so."""
    trained = perturb(create_model("convit_cifar_nano", patch_size=8))
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    torch.save({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "resnet.pt")
    for name, reason in (("weights", "does not match any model.*: build its model with create_model"),
                         ("resnet", "has no patch_embed.proj.weight: it is not a ConViT")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"{name}\.pt {reason}"):
            open_model(tmp_path / f"{name}.pt")
    model, image = create_model("convit_cifar_nano", patch_size=8).eval(), Image.new("RGB", (40, 30), "red")
    load_weights(model, tmp_path / "weights.pt")
    (name, p), *_ = predict(model, image)
    with torch.no_grad():
        probabilities = trained(preprocess(model, image)).softmax(dim=1)[0]
    assert name == f"class {probabilities.argmax()}" and p == pytest.approx(probabilities.max().item())
    with pytest.warns(UserWarning, match="has no class names: its classifier was loaded"):
        load_weights(model, tmp_path / "weights.pt", classes=list("abcdefghij"))
    assert predict(model, image)[0][0] == "abcdefghij"[probabilities.argmax()]
    with pytest.raises(ValueError, match="the model has 10 classes, not 2"):
        load_weights(model, tmp_path / "weights.pt", classes=["a", "b"])


def test_an_error_names_five_keys_and_counts_the_rest(tmp_path):
    deeper = ConViT(replace(CONFIG, depth=5))
    torch.save(deeper.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError) as caught:
        load_weights(ConViT(CONFIG), tmp_path / "weights.pt")
    assert str(caught.value).count("blocks.") == 5
    num_unexpected = len(deeper.state_dict()) - len(ConViT(CONFIG).state_dict())
    assert f"and {num_unexpected - 5} more" in str(caught.value)
    torch.save(ConViT(replace(CONFIG, depth=5, dim=72)).state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"unexpected: .*; with a different shape: ") as caught:
        load_weights(ConViT(CONFIG), tmp_path / "weights.pt")
    assert str(caught.value).count("blocks.") <= 5


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.filterwarnings("ignore")  # the files are meant to be odd
def test_bad_files_give_one_sentence_and_execute_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    model = ConViT(CONFIG)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FileNotFoundError, match="no file"):
        load_weights(model, tmp_path / "missing.pt")

    whole = tmp_path / "whole.pt"
    torch.save(model.state_dict(), whole)
    bad = {
        "truncated": whole.read_bytes()[: whole.stat().st_size // 2],
        "empty": b"",
        "text": b"these are no weights",
        "malicious": pickle.dumps({"model": Malicious(tmp_path / "ran")}),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"weights": Malicious(tmp_path / "ran")}, tmp_path / "malicious_zip")
    torch.save([1, 2, 3], tmp_path / "list")
    torch.save({"model": torch.zeros(3)}, tmp_path / "tensor")
    torch.save({"model": model.state_dict(), "model_config": {"layers": 3}}, tmp_path / "config")
    torch.save({"conv1.weight": torch.zeros(3, 3), "pos_embed": torch.zeros(2)}, tmp_path / "foreign")
    torch.save({"pos_embed": torch.zeros(1, 5, 36), "head.weight": torch.tensor(1.0)}, tmp_path / "short")
    torch.save(prefixed(model.state_dict(), "student.") | prefixed(model.state_dict(), "teacher."), tmp_path / "two")
    torch.save(model, tmp_path / "pickled")
    torch.save({"state_dict": model.state_dict(), "best_accuracy": np.float64(70)}, tmp_path / "numpy")
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(tmp_path / "traced")
    reasons = {
        "config": r"was written by another version of convit_min\.py \(.*layers",
        "list": "contains no weights, neither directly nor under ema, ",
        "pickled": r"contains convit_min\.ConViT, which is not a tensor: save only the state_dict",
        "numpy": r"contains numpy\S*scalar, which is not a tensor",
        "traced": "is a TorchScript file: save the state_dict of the model",
        "two": r"contains several models \(student\..*, teacher\..*\): save the state_dict of one",
        "whole.pt/file": "cannot be read: Not a directory",
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=f"{name} {reason}"):
            load_weights(model, tmp_path / name)
    for name in (*bad, "malicious_zip", "list", "tensor", "config", "foreign", "short"):
        with pytest.raises(ValueError, match=name):
            load_weights(model, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"neither best\.pt nor snapshots/"):
        load_weights(model, tmp_path)
    with pytest.raises(ValueError, match=r"cannot be downloaded \(.*refused.*\): pass a local file"):
        load_weights(model, f"http://127.0.0.1:{free_port()}/weights.pth")  # nobody listens there
    assert not (tmp_path / "ran").exists()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
