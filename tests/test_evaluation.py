"""--eval: scores, report, and class names, against a loop over single images."""

import csv
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import perturb
from PIL import Image

import train_cifar
import train_imagenet
from analysis import read_metrics
from convit_min import create_model
from images import preprocess
from training import checkpoint
from weights import open_model

CLASSES = ["other", "dark", "gray", "bright", "pale", "red"]  # the images have only some, and in another order


@pytest.fixture
def weights(tmp_path):
    """A weights file that was evaluated on half of each side of an image of 64 pixels."""
    model = perturb(create_model("convit_cifar_nano", depth=2, gpsa_layers=1, img_size=64, num_classes=len(CLASSES)))
    checkpoint.save_weights(model, CLASSES, 0.5, 3, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


@pytest.fixture
def output_of(tmp_path, run_script):
    """The output of a script with these flags."""
    return lambda script, *flags: run_script(script, "--run", tmp_path / "run", "--device", "cpu", *flags)[1]


@pytest.mark.parametrize("script", [train_cifar, train_imagenet])
def test_report_agrees_with_a_loop_over_single_images(tree, weights, tmp_path, output_of, script):
    for split in ("train", "test"):
        shutil.copytree(tree / split, tmp_path / "images" / split)
    (tmp_path / "images" / "train" / "bright" / "0.png").write_text("training images are not read")
    Image.new("RGB", (100, 40), "red").save(tmp_path / "images" / "test" / "dark" / "wide.png")
    flags = ["--data-dir", tmp_path / "images", "--eval", "--weights", weights, "--batch-size", "4", "--csv"]
    output = output_of(script, *flags)
    report = json.loads((tmp_path / "run" / "eval.json").read_text())
    with open(tmp_path / "run" / "eval.csv") as file:
        rows = list(csv.DictReader(file))

    model = open_model(weights)
    assert model.crop_pct == 0.5
    losses, top5, confusion = [], [], torch.zeros(6, 6, dtype=torch.int64)
    assert len(rows) == 17 and len({row["file"] for row in rows}) == 17
    for row in rows:
        with torch.no_grad():
            logits = model(preprocess(model, row["file"]))[0]
        label = CLASSES.index(row["class"])
        assert row["class"] in row["file"] and row["predicted"] == CLASSES[logits.argmax()]
        assert float(row["probability"]) == pytest.approx(logits.softmax(0).max().item(), abs=1e-4)
        assert float(row["loss"]) == pytest.approx(F.cross_entropy(logits, torch.tensor(label)).item(), abs=1e-3)
        losses.append(float(row["loss"]))
        top5.append(label in logits.topk(5).indices)
        confusion[label, logits.argmax()] += 1
    assert report["confusion"] == confusion.tolist() and report["images"] == 17
    assert report["test_loss"] == pytest.approx(sum(losses) / 17, abs=1e-3)
    assert report["test_accuracy"] == pytest.approx(100 * confusion.trace().item() / 17)
    assert report["test_accuracy_top5"] == pytest.approx(100 * sum(top5) / 17)
    assert report["classes"]["dark"] == {"images": 7, "test_accuracy": pytest.approx(100 * confusion[1, 1].item() / 7)}
    assert report["classes"]["red"] == {"images": 0, "test_accuracy": None}
    assert f"test_accuracy {report['test_accuracy']:.3f}" in output and report["provenance"]["command"]


def test_run_is_evaluated_on_other_images(tree, tmp_path, output_of, small_model, no_plots):
    """The flags of its own split do not apply to them."""
    output_of(train_cifar, "--data-dir", tree, "--val-fraction", "0.25", "--epochs", "1", "--batch-size", "72")
    for data_dir in ([], ["--data-dir", f"{tree}/"]):  # the same, by another name
        assert "24 validation images" in output_of(train_cifar, "--eval", "--csv", *data_dir)
    assert (tmp_path / "run" / "eval.csv").exists()
    shutil.copytree(tree / "test", tmp_path / "other" / "val")
    output = output_of(train_cifar, "--eval", "--data-dir", tmp_path / "other")
    assert "16 validation images" in output and "its --val-fraction does not apply" in output
    assert not (tmp_path / "run" / "eval.csv").exists()  # it was that of the other images
    output = output_of(train_cifar, "--eval", "--data-dir", tmp_path / "other" / "val")
    assert "16 validation images" in output and "has no splits: all its images are evaluated" in output


def test_class_names_must_match_the_weights(tree, weights, tmp_path, output_of):
    for split in ("train", "test"):
        shutil.copytree(tree / split, tmp_path / "images" / split)
        (tmp_path / "images" / split / "dark").rename(tmp_path / "images" / split / "shadow")
    output = output_of(train_cifar, "--data-dir", tmp_path / "images", "--eval", "--weights", weights)
    _, error = output.splitlines()
    assert "weights.pt lacks: shadow (it has bright, dark, gray, other, pale and 1 more); rename the folders" in error
    checkpoint.save_weights(create_model("convit_cifar_nano", img_size=(32, 64)), [], 1.0, 3, weights)
    output = output_of(train_cifar, "--data-dir", tree, "--eval", "--weights", weights)
    assert "uses square images, but" in output and "is for 32 x 64: add --img-size" in output
    assert not (tmp_path / "run").exists()
    for count, words in ((2, "test_accuracy"), (3, "has 3 classes, but the images have 2: fine-tune it first")):
        torch.save(create_model("convit_cifar_nano", num_classes=count).state_dict(), weights)  # without names
        output = output_of(train_cifar, "--data-dir", tree, "--eval", "--weights", weights)
        assert words in output and ("no class names: classes are matched by order" in output) == (count == 2)


@pytest.mark.usefixtures("small_model", "no_plots")
def test_other_classes_of_the_same_number_get_a_new_classifier(tree, tmp_path, output_of):
    """Classes that are renamed for fine-tuning are other classes."""
    model = perturb(create_model("convit_cifar_nano", num_classes=2))
    flags = ["--data-dir", tree, "--epochs", "1", "--batch-size", "96", "--weights", tmp_path / "weights.pt"]
    for classes, is_kept in ((["bright", "dark"], True), (["cat", "dog"], False)):
        checkpoint.save_weights(model, classes, 1.0, 3, tmp_path / "weights.pt")
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        if is_kept:
            output_of(train_cifar, *flags)
        else:
            assert "note:" in (output := output_of(train_cifar, *flags)) and "classifier was not loaded" in output
        start = torch.load(tmp_path / "run" / "snapshots" / "epoch_0000.pt", weights_only=True)["model"]
        assert torch.equal(start["norm.weight"], model.norm.weight.half())
        assert torch.equal(start["head.weight"], model.head.weight.half()) == is_kept
    assert len(read_metrics(tmp_path / "run")) == 2
