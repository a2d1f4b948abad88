"""predict.py, plot_attention, and one preprocessing on every path."""

import copy
import csv
import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import DEMO, ROOT, perturb
from PIL import Image

from analysis import plot_attention
from convit_min import create_model
from images import default_crop_pct, normalize, preprocess
from predict import main, predict
from train_cifar import Config
from training.checkpoint import save_weights
from training.data import InMemoryData
from training.image_folder import ImageFolderDataset
from viewer.inspector import open_run
from weights import open_model


@pytest.fixture(scope="module")
def demo():
    return open_model(DEMO)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A photo-like image whose four quarters differ, not square."""
    y, x = np.mgrid[0:96, 0:128]
    pixels = np.stack([255 * (x > 64), 255 * (y > 48), (x + y) % 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def test_predictions_of_a_path_bytes_image_and_array_agree(demo, photo, tmp_path):
    photo.save(tmp_path / "photo.png")
    expected = predict(demo, tmp_path / "photo.png", top=10)
    assert sorted(name for name, _ in expected) == sorted(demo.classes)
    assert sum(p for _, p in expected) == pytest.approx(1, abs=1e-4)
    assert [p for _, p in expected] == sorted((p for _, p in expected), reverse=True)
    for image in (str(tmp_path / "photo.png"), (tmp_path / "photo.png").read_bytes(), photo, np.array(photo)):
        assert predict(demo, image, top=10) == expected
    gray = photo.convert("L")
    assert predict(demo, np.array(gray)) == predict(demo, gray)
    pixels = np.array(photo)
    wrong = [pixels / 255, pixels.astype(np.uint16), pixels.transpose(2, 0, 1), torch.tensor(pixels), None, [photo]]
    for image in wrong:
        with pytest.raises(ValueError, match="a PIL image, or a uint8 array"):
            predict(demo, image)
    with Image.open(tmp_path / "photo.png") as closed:
        pass
    noise = Image.effect_noise((512, 512), 60)  # more than one IDAT chunk
    noise.save(tmp_path / "noise.png")
    first, rest = (tmp_path / "noise.png").read_bytes().split(b"IDAT", 1)
    damaged = first + b"IDAT" + rest.replace(b"IDAT", b"!!!!", 1)
    for image, message in (
        (closed, "its file was closed"),
        (Image.open(io.BytesIO(damaged)), "damaged"),
        (damaged, "damaged"),
        (pixels[10:10], "has no pixels"),
        (photo.crop((5, 5, 5, 9)), "has no pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            predict(demo, image)


def test_model_in_half_precision(demo, photo):
    half = copy.deepcopy(demo).half()
    assert dict(predict(half, photo, 10)) == pytest.approx(dict(predict(demo, photo, 10)), abs=0.02)
    maps = [plot_attention(model, photo, 1, 5).axes[3].images[0].get_array() for model in (demo, half)]
    np.testing.assert_allclose(*maps, atol=0.01)


@pytest.mark.parametrize("size", [32, 96])
def test_all_paths_preprocess_identically(size, photo, tmp_path):
    """Scripts, predict, and page see the same pixels: all of the center up to 64 pixels, 7/8 of it above."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            photo.save(tmp_path / split / name / "photo.png")
    file = tmp_path / "test" / "a" / "photo.png"
    model = perturb(create_model("convit_cifar_nano", num_classes=2, img_size=size))
    (tmp_path / "run" / "snapshots").mkdir(parents=True)
    save_weights(model, ["a", "b"], default_crop_pct(size, size), 1, tmp_path / "run" / "snapshots" / "epoch_0001.pt")
    test = InMemoryData(Config(data_dir=tmp_path, img_size=size, eval=True), torch.device("cpu")).test
    streamed = ImageFolderDataset([file], torch.zeros(1), size, crop_pct=default_crop_pct(size, size)).read(file)
    assert torch.equal(test.images[0], streamed)
    inspector = open_run(tmp_path / "run")
    page = inspector._decode_pixels(inspector.prepare_image(file.read_bytes())["pixels"], 0)
    assert page == streamed.permute(1, 2, 0).numpy().tobytes()
    with torch.no_grad():
        expected = model(normalize(streamed[None]))[0].softmax(0)
    assert dict(predict(open_model(tmp_path / "run"), file)) == pytest.approx(
        dict(zip("ab", expected.tolist(), strict=True))
    )
    shown = inspector.layer_maps(inspector.prepare_image(file.read_bytes())["pixels"], 0)[-1]["predictions"]
    predicted = dict(predict(open_model(tmp_path / "run"), file))
    assert {name: p for name, p, _ in shown} == pytest.approx(predicted, abs=1e-4)
    box = {32: (16, 0, 112, 96), 96: (22, 6, 106, 90)}[size]  # of 96: 7/8 of the largest square, 84 pixels
    expected = np.array(photo.resize((size, size), Image.Resampling.BICUBIC, box=box))
    assert np.array_equal(expected, streamed.permute(1, 2, 0).numpy())
    assert [default_crop_pct(side, side) for side in (64, 65)] == [1.0, 0.875]


def test_normalization_is_that_of_imagenet():
    pixels = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    expected = torchvision.transforms.functional.normalize(pixels / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(normalize(pixels), expected)


def test_command_line(demo, photo, tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    (photos / "nested").mkdir(parents=True)
    files = [photos / "b.jpg", photos / "nested" / "a.png", tmp_path / ".hidden"]
    for file in files:
        photo.save(file, "PNG")
    (photos / "a.jpg").write_text("not an image")
    (photos / "c.txt").write_text("not an image, either")
    (photos / "d.png").symlink_to("missing")
    attention = tmp_path / "heads.png"

    def run(*args) -> str:
        monkeypatch.setattr(sys, "argv", ["predict.py", *map(str, args)])
        monkeypatch.setattr("signal.signal", lambda *_: None)  # of the process that runs the tests
        with pytest.raises(SystemExit) as stop:
            main()
        return str(stop.value)

    assert run(DEMO, photos, "--jsn") == "2"
    assert capsys.readouterr().err == ("predict.py: unrecognized arguments: --jsn; did you mean --json?\n")

    assert run(DEMO, photos, files[2], "--json", "--attention", attention, "--layer", "5") == "1"
    output = capsys.readouterr()
    records = [json.loads(line) for line in output.out.splitlines()]
    assert [record["file"] for record in records] == list(map(str, files))
    assert len(records[0]["classes"]) == 3 and Image.open(attention).width > 300
    assert output.err.splitlines() == [
        f"note: skipped 1 of an unsupported type ({photos}/c.txt)",
        f"predict.py: {photos}/a.jpg is not an image",
        f"predict.py: {photos}/d.png cannot be opened: No such file or directory",
    ]
    (photos / "a.jpg").unlink()
    (photos / "d.png").unlink()
    read_end, write_end = os.pipe()
    os.close(read_end)  # as `| head` does
    command = [sys.executable, ROOT / "predict.py", DEMO, photos, "--json"]
    result = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True)
    os.close(write_end)
    assert result.stderr.count("\n") == 1 and "c.txt" in result.stderr
    assert run(DEMO, photos, "--csv", "--top", "2") == "0"
    header, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert header == ["file", "class 1", "probability 1", "class 2", "probability 2"]
    for row, file in zip(rows, files[:2], strict=True):
        assert row == [str(file), *(cell for name, p in predict(demo, file, 2) for cell in (name, f"{p:.4f}"))]
    for option in ([], ["--csv"]) if sys.platform == "linux" else ():  # macOS refuses such names
        photo.save(photos / os.fsdecode(b"\xe9.png"))
        command = [sys.executable, ROOT / "predict.py", DEMO, photos, *option]
        result = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONUTF8": "1"})
        assert result.returncode == 0 and b"/\xe9.png" in result.stdout
    assert "neither best.pt nor snapshots/" in run(tmp_path, "b.jpg")
    assert "predict.py: expected a layer from 1 to 7, not 8" in run(
        DEMO, photos, "--attention", attention, "--layer", "8"
    )


def test_ctrl_c_keeps_the_results_so_far():
    code = ("import signal, predict as script; predict, calls = script.predict, iter((0, 1))\n"
            "script.predict = lambda *args: signal.raise_signal(signal.SIGINT) if next(calls) else predict(*args)\n"
            "script.main()")  # fmt: skip
    command = [sys.executable, "-c", code, str(DEMO), *[str(DEMO / "images/cat.jpg")] * 2, "--csv"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 130 and process.stdout.count("\n") == 2 and not process.stderr


def test_plot_attention(demo, photo):
    figure = plot_attention(demo, photo, layer=5)
    assert len(figure.axes) == 9 * 4
    with torch.no_grad():
        gate = demo.blocks[4].attn.gate()
    assert f"mixed, gate {gate[2]:.2f}\n" in figure.axes[11].get_title()
    assert "uniform attention 0.016" in figure.get_suptitle()
    assert plot_attention(create_model("convit_cifar_nano"), photo, layer=1)  # before training, too
    single = plot_attention(demo, photo, layer=7, head=9, query=(0, 7))  # self-attention, with a class token
    assert [axes.get_title().split("\n")[0] for axes in single.axes[1:]] == ["content", "mixed"]
    assert single.axes[0].get_ylabel() == "head 9"  # without a gate
    assert single.axes[1].images[0].get_array().shape == (8, 8)
    assert single.axes[1].images[0].get_clim() == (0, pytest.approx(4 / 65))  # nearly uniform
    figure = plot_attention(demo, photo, layer=4, head=5, query=(2, 6))
    with torch.no_grad():
        content, position, _, mixed = demo(preprocess(demo, photo), return_attention=True)[1][3]
    for axes, maps in zip(figure.axes[1:], (position, content[0], mixed[0]), strict=True):
        np.testing.assert_allclose(axes.images[0].get_array(), maps[4, 2 * 8 + 6].unflatten(0, (8, 8)), atol=1e-6)
        assert axes.patches[0].get_xy() == (6, 2)
    wrong = [
        ({"layer": 8}, "layer from 1 to 7, not 8"),
        ({"layer": 0}, "layer from 1 to 7, not 0"),
        ({"layer": 1.5}, "layer from 1 to 7, not 1.5"),
        ({"layer": 1, "head": 0}, "head from 1 to 9, not 0"),
        ({"layer": 1, "head": 10}, "head from 1 to 9, not 10"),
        ({"layer": 1, "query": (8, 0)}, "row from 0 to 7, not 8"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=f"expected a {message}"):
            plot_attention(demo, photo, **arguments)
