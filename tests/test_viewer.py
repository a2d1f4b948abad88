"""viewer/probe.py: pictures of every kind in, the model's own maps out."""

import base64
import io
import json
import shutil
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import DEMO
from PIL import Image, ImageSequence

from convit_min import ConViT, ConViTConfig, load_weights, normalise
from pictures import open_picture
from viewer import trainer
from viewer.figures import animation
from viewer.probe import check_upload, open_run, story


@pytest.fixture(scope="module")
def probe():
    return open_run(DEMO)


@pytest.fixture
def photo(tmp_path):
    """A picture whose left half is dark red and right half light blue, wider than high."""
    pixels = np.zeros((60, 100, 3), dtype=np.uint8)
    pixels[:, :50] = (120, 20, 20)
    pixels[:, 50:] = (150, 180, 250)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_content_maps_are_the_models_to_one_step(probe, photo):
    picture = probe.picture(photo)
    raw = np.frombuffer(base64.b64decode(picture["pixels"]), dtype=np.uint8).reshape(32, 32, 3)
    assert raw[:, :10].mean((0, 1)) == pytest.approx((120, 20, 20), abs=2)
    files = sorted((DEMO / "snapshots").glob("*.pt"))
    layers = [probe.read_layer(picture["pixels"], layer) for layer in range(len(probe.layers))]
    for checkpoint in (0, len(files) - 1):
        record = torch.load(files[checkpoint], weights_only=True)
        model = ConViT(ConViTConfig(**record["model_config"])).eval()
        load_weights(model, files[checkpoint])
        with torch.no_grad():
            logits, attention = model(normalise(torch.tensor(raw).permute(2, 0, 1)[None]), return_attention=True)
        for layer, read in enumerate(layers):
            content = attention[layer].content[0]
            sent = np.frombuffer(base64.b64decode(read["content"][checkpoint]), dtype=np.uint8)
            peak = torch.tensor(read["peaks"][checkpoint])[:, None, None]
            error = (torch.tensor(sent).view_as(content) / 255 * peak - content).abs() / peak
            assert error.max() <= 0.5 / 255 + 1e-6
            name, share, same = read["classes"][checkpoint][0]
            assert share == same
            assert name == record["classes"][logits.argmax()]
            assert share == pytest.approx(logits.softmax(1).max().item(), abs=1e-3)


def test_description_is_of_the_run(probe):
    description = json.loads(json.dumps(probe.description()))
    metrics = [json.loads(line) for line in (DEMO / "metrics.jsonl").read_text().splitlines()]
    assert description["epochs"][0] == 0 and len(description["epochs"]) >= 8
    assert description["kernel"] == [3, 3] and description["grid"] == [8, 8]
    assert description["story"]["test_accuracy"] == [line["test_accuracy"] for line in metrics]
    assert description["story"]["train_loss"][0] is None  # epoch 0 is before training
    assert description["finished"] and story(DEMO / "snapshots", "") is None
    np.testing.assert_allclose(description["gate"][-1][0], metrics[-1]["heads"]["gate"][0], atol=2e-3)
    np.testing.assert_allclose(np.array(description["v_pos"][0])[:, :, 2], -1)


def test_what_the_panel_may_not_ask(probe, photo):
    pixels = probe.picture(photo)["pixels"]
    for asked in ((pixels, 99), (pixels, -1), (pixels, 1.0), (pixels[:400], 0)):
        with pytest.raises(ValueError, match="expected 32 x 32 pixels"):
            probe.read_layer(*asked)


@pytest.mark.parametrize("kind", ["grey", "palette", "rgba", "cmyk", "16 bit", "animated", "rotated", "tiny", "long"])
def test_every_kind_of_picture_opens_upright_in_rgb(kind, photo, tmp_path):
    original, file = Image.open(photo), tmp_path / f"{kind}.png"
    if kind == "grey":
        original.convert("L").save(file)
    elif kind == "palette":
        original.convert("P").save(file)
    elif kind == "rgba":
        original.putalpha(0)
        original.save(file)
    elif kind == "cmyk":
        file = file.with_suffix(".jpg")
        original.convert("CMYK").save(file)
    elif kind == "16 bit":
        Image.fromarray(np.asarray(original.convert("L")).astype(np.uint16) * 256).save(file)
    elif kind == "animated":
        file = file.with_suffix(".gif")
        original.save(file, save_all=True, append_images=[Image.new("RGB", original.size, "green")])
    elif kind == "rotated":
        file = file.with_suffix(".jpg")
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees to show
        original.rotate(90, expand=True).save(file, exif=exif, quality=95)
    else:
        original.resize((1, 1) if kind == "tiny" else (2000, 3)).save(file)
    picture = open_picture(file)
    assert picture.mode == "RGB"
    if kind in ("palette", "cmyk", "animated", "rotated", "long"):
        left, right = (np.array(picture)[:, part].mean((0, 1)) for part in (slice(0, 30), slice(-30, None)))
        assert left[0] > left[2] + 50 and right[2] > right[0] + 50
    elif kind == "rgba":
        assert np.array(picture).min() == 255  # transparent is white
    elif kind in ("grey", "16 bit"):
        expected = np.asarray(Image.open(photo).convert("L"))
        assert np.abs(np.asarray(picture)[..., 0].astype(int) - expected).max() <= 1


def test_no_picture_gives_the_visitor_one_sentence(probe, tmp_path, photo):
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "cut.png").write_bytes(photo.read_bytes()[:100])
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("text", "cut", "empty"):
        with pytest.raises(ValueError, match="cannot be read as a picture; please"):
            probe.picture(tmp_path / f"{name}.png")
    for name, size in (("huge", (5001, 4000)), ("bomb", (40_000, 40_000))):
        Image.new("1", size).save(tmp_path / f"{name}.png")
        with pytest.raises(ValueError, match="20 million pixels; please"):
            check_upload((tmp_path / f"{name}.png").read_bytes())
    (tmp_path / "heavy.png").write_bytes(b"\0" * (10 * 2**20 + 1))
    with pytest.raises(ValueError, match="10 MB; please"):
        check_upload((tmp_path / "heavy.png").read_bytes())


def test_folders_that_hold_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no snapshots"):
        open_run(tmp_path)
    shutil.copytree(DEMO, tmp_path / "run")
    file = sorted((tmp_path / "run" / "snapshots").iterdir())[1]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=file.name):
        open_run(tmp_path / "run")


def test_the_figure_of_a_layer_moves_and_keeps_its_size(probe, photo):
    with Image.open(io.BytesIO(animation(probe, probe.picture(photo), 4, 0))) as moving:
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(moving)]
    assert len(frames) == len(probe.epochs)
    assert all(np.abs(one - other).mean() > 0.3 for one, other in pairwise(frames))


def test_visitors_train_in_turn_and_those_who_leave_lose_their_place(tmp_path, monkeypatch):
    script = tmp_path / "train.py"  # takes the place of train_cifar.py: it writes a line of metrics, and stays
    script.write_text("""
import pathlib, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
run.mkdir()
(run / "metrics.jsonl").write_text('{"epoch": 0}\\n')
while not (run / "enough").exists(): time.sleep(0.02)
""")
    monkeypatch.setattr(trainer, "SCRIPT", script)
    line = trainer.Trainer()

    def wait(visitor: str, state: str):
        deadline = time.monotonic() + 20
        while (standing := line.ask(visitor, "look"))["state"] != state or standing.get("epoch", 0) < 0:
            assert time.monotonic() < deadline, standing
            time.sleep(0.02)

    try:
        assert line.ask("anna", "look") == {"state": "idle"}
        line.ask("anna", "start")
        wait("anna", "training")
        assert line.ask("anna", "start")["state"] == "training"  # a second click changes nothing
        assert line.ask("bert", "start") == {"state": "waiting", "place": 1}
        assert line.ask("carl", "start") == {"state": "waiting", "place": 2}
        process = line.process
        line.ask("anna", "stop")
        assert process.poll() is not None and line.ask("anna", "look")["state"] == "done"
        wait("bert", "training")
        line.heard["bert"] -= trainer.PATIENCE + 1  # bert has closed the page
        wait("carl", "training")
        (line.run("carl") / "enough").touch()
        wait("carl", "done")
        for visitor in ("d", "e", "f"):
            line.ask(visitor, "start")
            wait(visitor, "training")
            (line.run(visitor) / "enough").touch()
            wait(visitor, "done")
        assert len(list(line.folder.iterdir())) == trainer.KEPT and not line.run("anna").exists()
        assert [line.ask(f"v{n}", "start")["state"] for n in range(trainer.LONGEST_LINE + 1)][-1] == "full"
        with pytest.raises(ValueError, match="letters and digits"):
            line.ask("../../home", "start")
    finally:
        process = line.process
        line.close()
    assert process.poll() is not None and not line.folder.exists()
