"""The viewer's computations: image decoding, attention maps, exported figures, the training queue."""

import base64
import io
import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from conftest import DEMO
from matplotlib.figure import Figure
from PIL import Image, ImageSequence

from analysis import read_metrics
from convit_min import ConViT, ConViTConfig, create_model
from images import load_image, normalize
from training.checkpoint import save_weights
from viewer import export, sessions
from viewer.examples import Example, load_examples
from viewer.export import draw_gates, export_view
from viewer.inspector import AttentionInspector, open_run, open_weights
from viewer.limits import data_url, encode_image
from weights import load_weights, snapshot_files


@pytest.fixture(scope="module")
def inspector():
    return open_run(str(DEMO))


@pytest.fixture
def photo() -> bytes:
    """The file of a landscape image: left half dark red, right half light blue."""
    pixels = np.zeros((60, 100, 3), dtype=np.uint8)
    pixels[:, :50] = (120, 20, 20)
    pixels[:, 50:] = (150, 180, 250)
    return encode_image(Image.fromarray(pixels), "PNG")


def test_content_maps_match_the_model_to_one_byte(inspector, photo):
    image = inspector.prepare_image(photo)
    raw = np.frombuffer(base64.b64decode(image["pixels"]), dtype=np.uint8).reshape(32, 32, 3)
    assert raw[:, :10].mean((0, 1)) == pytest.approx((120, 20, 20), abs=2)
    files = sorted((DEMO / "snapshots").glob("*.pt"))
    answers = [inspector.layer_maps(image["pixels"], layer) for layer in range(inspector.config.depth)]
    for snapshot in (0, len(files) - 1):
        record = torch.load(files[snapshot], weights_only=True)
        model = ConViT(ConViTConfig(**record["model_config"])).eval()
        load_weights(model, files[snapshot])
        with torch.no_grad():
            logits, attention = model(normalize(torch.tensor(raw).permute(2, 0, 1)[None]), return_attention=True)
        for layer, answer in enumerate(answers):
            content = attention[layer].content[0, :, -64:, -64:]  # without the class token
            quantized = np.frombuffer(base64.b64decode(answer[snapshot]["content"]), dtype=np.uint8)
            peak = torch.tensor(answer[snapshot]["peaks"])[:, None, None]
            error = (torch.tensor(quantized).view_as(content) / 255 * peak - content).abs() / peak
            assert error.max() <= 0.5 / 255 + 1e-6
            name, before, after = answer[snapshot]["predictions"][0]
            assert before == after
            assert name == record["classes"][logits.argmax()]
            assert before == pytest.approx(logits.softmax(1).max().item(), abs=1e-3)


def test_description_matches_the_run(inspector):
    description = json.loads(json.dumps(inspector.describe()))
    metrics = [json.loads(line) for line in (DEMO / "metrics.jsonl").read_text().splitlines()]
    assert description["epochs"] == [0, 1, 3, 10, 30]
    assert description["kernel"] == [3, 3] and description["grid"] == [8, 8]
    assert description["curves"]["test_accuracy"] == [record["test_accuracy"] for record in metrics]
    assert description["curves"]["train_loss"][0] is None  # epoch 0 is before training
    assert description["last_epoch"] == 30
    np.testing.assert_allclose(description["gate"][-1][0], metrics[-1]["heads"]["gate"][0], atol=2e-3)
    np.testing.assert_allclose(np.array(description["v_pos"][0][:5])[:, :, 2], -1)
    assert description["gate"][0][5:] == description["v_pos"][0][5:] == [None, None]  # self-attention


def test_layer_maps_reject_invalid_arguments(inspector, photo):
    pixels = inspector.prepare_image(photo)["pixels"]
    for arguments in ((pixels, 99), (pixels, -1), (pixels, 1.0), (pixels[:400], 0)):
        with pytest.raises(ValueError, match=r"expected (32 x 32 pixels|a layer from 1 to 7)"):
            inspector.layer_maps(*arguments)


def test_examples_come_from_the_dataset_if_it_can_be_read(tmp_path, photo):
    for name in ("left", "right"):
        (tmp_path / "valid" / name).mkdir(parents=True)
        (tmp_path / "valid" / name / "1.png").write_bytes(photo)
    config = {"dataset": "folder", "data_dir": str(tmp_path), "val_fraction": None}
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "1.png").write_bytes(photo)  # as in the ImageNet archive, without a class
    assert load_examples(config | {"aug_repeats": 3}, None, ["left"])["left"] == Example(photo, "left")
    shutil.rmtree(tmp_path / "test")
    for flags in ({}, {"dataset": "imagenet", "aug_repeats": 3}):
        examples = load_examples(config | flags, None, ["left"])
        assert examples == {"left": Example(photo, "left"), "right": Example(photo)}
    (tmp_path / "valid" / "right" / "1.png").write_bytes(photo[:50])  # damaged
    assert load_examples(config, None, ["left"]) == {"left": Example(photo, "left")}
    (tmp_path / "test").mkdir()  # without images
    for other in (config, config | {"data_dir": str(tmp_path / "moved")}, config | {"dataset": "cifar10"}):
        assert "lion" in load_examples(other, None, [])


def test_unusable_uploads_raise_one_sentence(inspector, photo):
    for file, reason in (
        (b"not an image", "is not an image"),
        (photo[:100], "is truncated or damaged"),
        (b"", "is empty"),
        (b"<svg onload=alert(1)>", "has an unsupported format: convert it"),
        (encode_image(Image.new("RGB", (9, 9)), "PCX"), "has an unsupported format: convert it"),
        (encode_image(Image.new("1", (5001, 4000)), "PNG"), "has more than 20 megapixels"),
        (encode_image(Image.new("L", (8000, 6300)), "JPEG"), "has more than 50 megapixels"),
        (encode_image(Image.new("1", (14_000, 14_000)), "PNG"), "is too large to decode"),
        (bytes(20 * 2**20 + 1), "is larger than 20 MB"),
    ):
        with pytest.raises(ValueError, match=f"^This file {reason}.*; please choose"):
            inspector.prepare_image(file)


def test_phone_photo_of_48_megapixels_is_shown(inspector, photo):
    """Of a JPEG with EXIF orientation, also beside a PNG that may have only 20."""
    large = Image.open(io.BytesIO(photo)).resize((8000, 6000), Image.Resampling.NEAREST)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = encode_image(large.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif)
    shown, expected = (
        np.frombuffer(base64.b64decode(inspector.prepare_image(data)["pixels"]), dtype=np.uint8).astype(int)
        for data in (file, photo)
    )
    assert np.abs(shown - expected).mean() < 4


def test_open_run_rejects_missing_and_damaged_snapshots(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no snapshots"):
        open_run(tmp_path)
    (tmp_path / "long" / "snapshots").mkdir(parents=True)
    names = ["epoch_9999.pt", "epoch_10000.pt"]
    for name in names:
        (tmp_path / "long" / "snapshots" / name).touch()
    assert [file.name for file in snapshot_files(tmp_path / "long")] == names
    shutil.copytree(DEMO, tmp_path / "run")
    file = sorted((tmp_path / "run" / "snapshots").iterdir())[1]
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=file.name):
        open_run(tmp_path / "run")


def test_description_names_a_damaged_file(tmp_path):
    shutil.copytree(DEMO, tmp_path / "run")
    inspector = open_run(tmp_path / "run")
    for name, content in (("metrics.jsonl", "{,}\n"), ("config.json", '{"epochs": 30,}')):
        (tmp_path / "run" / name).write_text(content)
        with pytest.raises(ValueError, match=f"^run/{name} is damaged"):
            inspector.describe()


def test_new_run_in_the_same_folder_replaces_the_old_one(tmp_path):
    shutil.copytree(DEMO, tmp_path / "run")
    inspector = open_run(tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text('{"epochs": 6, "scale_epochs": true, "data_fraction": 0.1}')
    assert inspector.refresh().describe()["last_epoch"] == 60 and len(inspector.models) == 5
    for file in snapshot_files(tmp_path / "run"):
        file.unlink()
    model = ConViT(ConViTConfig(32, 8, num_classes=4, dim=36, depth=2, num_heads=9, gpsa_layers=1))
    save_weights(model, list("abcd"), 1.0, 0, tmp_path / "run" / "snapshots" / "epoch_0000.pt")
    shutil.copy(DEMO.parent / "patterns" / "config.json", tmp_path / "run")
    description = inspector.refresh().describe()
    assert description["epochs"] == [0] and description["grid"] == (4, 4)
    assert not any(example["queries"] for example in description["examples"])  # squares would not fill such patches


def test_others_do_not_see_changed_gates(photo):
    """While one client tries gates, another one opens the page."""
    inspector = open_run(DEMO)
    pixels, trained = inspector.prepare_image(photo)["pixels"], inspector.describe()["gate"]
    inspector.layer_maps(pixels, 0)  # cached
    inside, released = Event(), Event()

    def wait(*_):
        inside.set()
        released.wait(20)

    inspector.models[-1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as clients:
        clients.submit(inspector.recompute, pixels, 0, -1, [[0.0] * 9] * 7)
        assert inside.wait(20)
        description = clients.submit(inspector.describe)
        time.sleep(0.3)
        released.set()
        assert description.result()["gate"] == trained


def test_two_images_are_decoded_at_once(inspector, photo, monkeypatch):
    active, most = [], []

    def load(*args) -> Image.Image:
        active.append(1)
        most.append(len(active))
        time.sleep(0.02)
        active.pop()
        return load_image(*args)

    monkeypatch.setattr("viewer.limits.load_image", load)
    with ThreadPoolExecutor(10) as clients:
        assert len(list(clients.map(inspector.prepare_image, [photo] * 10))) == 10
    assert max(most) == 2


def test_opening_view_of_a_growing_run_follows_its_snapshots(tmp_path, monkeypatch):
    monkeypatch.setattr("viewer.inspector.CACHE_BYTES", 0)  # as for a large model
    demo, run = DEMO.parent / "patterns", tmp_path / "run"
    files = snapshot_files(demo)
    (run / "snapshots").mkdir(parents=True)
    shutil.copy(demo / "config.json", run)
    shutil.copy(files[0], run / "snapshots")
    growing, finished = open_run(run), open_run(demo)
    growing.examples = finished.examples = dict(reversed(finished.examples.items()))  # the first is not learned best
    before = growing.describe()["opening"]
    for file in (files[1], files[-1]):
        shutil.copy(file, run / "snapshots")
    growing.refresh()
    after = growing.describe()["opening"]
    assert (
        before["image"] == next(iter(finished.examples)) != after["image"] and after == finished.describe()["opening"]
    )
    image = growing.prepare_image(growing.examples[after["image"]].data)
    first, *_, last = (maps["predictions"] for maps in growing.layer_maps(image["pixels"], 0))
    assert first[0][0] != last[0][0] == after["image"]
    growing.layer_maps(image["pixels"], 1)
    assert growing._cached_maps.cache_info().misses == 3  # the maps of all layers are kept


def test_maps_for_one_query_patch(inspector, photo):
    pixels = inspector.prepare_image(photo)["pixels"]
    assert inspector.head_maps(pixels, 3, -1, 0) == inspector.head_maps(pixels, 3, 4, 0)
    assert inspector.head_maps(pixels, 6, -1, 0)[0]["position"] is None


def test_models_of_any_grid_open(tmp_path, photo):
    small = create_model("convit_tiny", img_size=96)
    torch.save(small.state_dict(), tmp_path / "small.pth")
    assert open_weights(tmp_path / "small.pth").config.grid == (6, 6)  # not resized to 224 px
    long = ConViT(ConViTConfig((1, 400), 1, num_classes=2, dim=12, depth=2, num_heads=1, gpsa_layers=1)).eval()
    long.crop_pct, long.classes, long.epoch = 1.0, ["a", "b"], None
    display = AttentionInspector("long", [long]).prepare_image(photo)["display"]
    with Image.open(io.BytesIO(base64.b64decode(display.partition(",")[2]))) as image:
        assert image.size == (400, 1)  # at least one pixel per patch


def test_figures_use_the_pages_epoch_scale_and_show_changed_gates(inspector):
    axes = Figure().add_subplot()
    draw_gates(axes, inspector.models, 3, 4, 4, [None] * 4 + [0.9] + [None] * 4)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "3", "10", "30"]
    np.testing.assert_allclose(axes.get_xticks(), np.log1p([0, 1, 3, 10, 30]))
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [line.get_ydata()[0] for line in crosses] == [0.9]


def test_display_of_an_exported_view_is_reduced(inspector, photo, monkeypatch):
    """The browser sends it back, and it may be anything."""
    gates = [[1.0] * 9] * 5 + [None] * 2
    view = inspector.prepare_image(photo) | {"layer": 3, "head": 4, "query": 21, "gates": gates, "snapshot": 4}
    view["display"] = data_url(encode_image(Image.new("RGB", (4000, 3000)), "PNG"), "png")
    drawn = []

    def draw_map(axes, pixels, maps, query, **_) -> tuple[list, list]:
        drawn.append((pixels.shape, maps, query))
        return [], []

    monkeypatch.setattr("viewer.export.draw_map", draw_map)
    monkeypatch.setattr("viewer.export.draw_lines", lambda *_: None)
    export_view(inspector, view, animated=False)
    assert drawn[0][0] == (288, 384, 3)
    expected = inspector.head_maps(view["pixels"], 3, 4, 21, gates)  # with the changed gates
    assert [maps for _, maps, _ in drawn] == [expected[4], *expected] and {query for *_, query in drawn} == {21}
    np.testing.assert_allclose(expected[4]["mixed"], expected[4]["position"], atol=1e-5)


def test_export_command(photo, tmp_path, monkeypatch):
    """Layers, heads, rows, and columns count from 1."""
    (tmp_path / "photo.png").write_bytes(photo)
    views = []
    monkeypatch.setattr("viewer.export.export_view", lambda _, view, animated: views.append(view) or b"GIF")
    argv = ["export", tmp_path / "heads.gif", "--run", DEMO, "--image", tmp_path / "photo.png", "--layer", 4]
    argv = [str(value) for value in [*argv, "--head", 9, "--patch"]]
    monkeypatch.setattr(sys, "argv", [*argv, "6", "2"])
    export.main()
    assert (tmp_path / "heads.gif").read_bytes() == b"GIF"
    assert [views[0][name] for name in ("layer", "head", "query")] == [3, 8, 5 * 8 + 1]
    monkeypatch.setattr(sys, "argv", [*argv, "9", "1"])
    with pytest.raises(SystemExit, match="expected a row from 1 to 8, not 9"):
        export.main()


def test_gif_has_one_distinct_frame_per_snapshot(inspector, photo):
    last = AttentionInspector("last", inspector.models[-2:])
    view = last.prepare_image(photo) | {"layer": 3, "head": 4, "query": 0, "gates": None}
    with Image.open(io.BytesIO(export_view(last, view, animated=True))) as animation:
        frames = [np.asarray(frame.convert("RGB")).astype(int) for frame in ImageSequence.Iterator(animation)]
    assert len(frames) == 2 and np.abs(frames[0] - frames[1]).mean() > 0.3


def raise_no_space(*_, **__):
    raise OSError(28, "No space left on device")


def test_exported_view_has_the_accuracy_and_gates_of_its_epoch(inspector, photo, monkeypatch):
    figures = []
    monkeypatch.setattr("viewer.export.Figure", lambda **size: figures.append(Figure(**size)) or figures[0])
    view = inspector.prepare_image(photo) | {"layer": 3, "head": 4, "query": 0, "gates": None, "snapshot": 2}
    export_view(inspector, view, animated=False)
    accuracy = read_metrics(DEMO)[3]["test_accuracy"]
    assert figures[0].get_suptitle() == f"epoch 3: accuracy {accuracy:.0f}%"
    expected = [model.blocks[3].attn.gate()[4].item() for model in inspector.models]
    np.testing.assert_allclose(figures[0].axes[-1].lines[4].get_ydata(), expected)


def test_training_queue_is_fair_and_drops_absent_sessions(tmp_path, monkeypatch, capfd):
    script = tmp_path / "train.py"  # stands in for train_cifar.py: writes one record, then waits
    script.write_text("""
import pathlib, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--run") + 1])
run.mkdir()
(run / "metrics.jsonl").write_text('{"epoch": 0}\\n')
while not (run / "finish").exists():
    if (run / "crash").exists(): sys.exit(f"out of memory, on a terminal: {sys.stderr.isatty()}")
    time.sleep(0.02)
""")
    monkeypatch.setattr(sessions, "SCRIPT", script)
    training_queue = sessions.TrainingQueue()

    def wait_for(session: str, state: str):
        deadline = time.monotonic() + 20
        while (status := training_queue.handle(session, "status"))["state"] != state or status.get("epoch", 0) < 0:
            assert time.monotonic() < deadline, status
            time.sleep(0.02)

    def finish(session: str):
        (training_queue.run_dirs[session] / "finish").touch()
        wait_for(session, "done")

    try:
        assert training_queue.handle("anna", "status") == {"state": "idle"}
        with monkeypatch.context() as full_disk:
            full_disk.setattr(subprocess, "Popen", raise_no_space)
            assert training_queue.handle("zoe", "start")["state"] == "failed"
        training_queue.handle("anna", "start")
        wait_for("anna", "training")
        assert training_queue.handle("anna", "start")["state"] == "training"  # a second click changes nothing
        assert training_queue.handle("bert", "start") == {"state": "waiting", "position": 1}
        assert training_queue.handle("carl", "start") == {"state": "waiting", "position": 2}
        process = training_queue.process
        training_queue.handle("anna", "stop")
        assert process.poll() is not None and training_queue.handle("anna", "status")["state"] == "done"
        wait_for("bert", "training")
        training_queue.last_seen["bert"] -= sessions.CLIENT_TIMEOUT + 1  # bert has closed the page
        wait_for("carl", "training")
        finish("carl")
        for session in ("d", "e", "f"):
            training_queue.handle(session, "start")
            wait_for(session, "training")
            finish(session)
        (training_queue.run_dirs["f"] / "first").touch()
        for _ in range(2):  # a second run that is stopped before its first epoch does not replace the first
            training_queue.handle("f", "start")
            wait_for("f", "training")
            training_queue.handle("f", "stop")
            assert training_queue.handle("f", "status")["state"] == "done"
            assert (training_queue.run_dirs["f"] / "first").exists()
        training_queue.handle("f", "start")
        wait_for("f", "training")
        (training_queue.run_dirs["f"] / "crash").touch()
        wait_for("f", "failed")  # the earlier run remains, and the server's log says why
        assert capfd.readouterr().err == "out of memory, on a terminal: False\n\n"
        assert (training_queue.run_dirs["f"] / "first").exists()
        training_queue.handle("g", "start")
        assert training_queue.handle("g", "stop") == {"state": "idle"}  # stopped before its first epoch: no failure
        kept = list(training_queue.folder.glob("*/"))
        assert len(kept) == sessions.MAX_KEPT_RUNS and "anna" not in training_queue.run_dirs
        states = [training_queue.handle(f"s{n}", "start")["state"] for n in range(sessions.MAX_QUEUE_LENGTH + 1)]
        assert states[-1] == "full"
        for session in training_queue.last_seen:
            training_queue.last_seen[session] -= sessions.CLIENT_TIMEOUT + 1  # all have closed the page
        assert training_queue.handle("late", "start")["state"] == "training"
        shutil.rmtree(training_queue.folder)  # as a cleaner of /tmp does
        training_queue.handle("late", "stop")
        assert training_queue.handle("later", "start")["state"] == "training"
        shutil.rmtree(training_queue.folder)  # while it trains
        training_queue.process.kill()
        training_queue.process.wait()
        assert training_queue.handle("later", "status")["state"] == "failed"
        assert training_queue.handle("last", "start")["state"] == "training"
        with pytest.raises(ValueError, match="letters and digits"):
            training_queue.handle("../../home", "start")
    finally:
        process = training_queue.process
        training_queue.close()
    assert process.poll() is not None and not training_queue.folder.exists()
