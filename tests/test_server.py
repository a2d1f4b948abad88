"""The viewer's server: other models than the demo, hostile files, invalid requests."""

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import random
import re
import socket
import sys
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT, SERVER_PIDS, assert_maps, open_page, page_map, perturb, serving
from gradio_client import Client
from PIL import Image

import app
from analysis import head_statistics
from convit_min import ConViT, ConViTConfig, create_model
from images import normalize
from predict import predict
from training.checkpoint import save_weights
from viewer.inspector import open_run, open_weights
from weights import RELEASED, infer_model, open_model

# a grid of 4 x 6 patches and 2 x 3 kernel taps, so that swapped rows and columns fail
OBLONG = ConViTConfig((32, 48), 8, num_classes=3, dim=24, depth=3, num_heads=6, gpsa_layers=2)
CLASSES = ["<img src=x onerror=alert(1)>", "a & b", "plain"]


def add_epoch(run: Path, model: ConViT, epoch: int):
    """Write a snapshot and a metrics record, as train_cifar.py does after each epoch."""
    (run / "snapshots").mkdir(parents=True, exist_ok=True)
    heads = head_statistics(model, torch.randn(4, 3, *model.config.image_shape))
    heads = {name: value.tolist() for name, value in heads._asdict().items()}
    record = {"epoch": epoch, "test_accuracy": 30.0 + epoch, "test_loss": 1.0, "heads": heads}
    with open(run / "metrics.jsonl", "a") as file:
        line = json.dumps(record | ({"train_loss": 1.1} if epoch else {}))
        file.write(line.replace("NaN", "null") + "\n")
    save_weights(model, CLASSES, 1.0, epoch, run / "snapshots" / f"epoch_{epoch:04d}.pt")


def attention_of(page, model: ConViT) -> list:
    """The attention of every layer for the image on display."""
    shape = (*model.config.image_shape, 3)
    raw = np.frombuffer(base64.b64decode(page.evaluate("convit.pixels()")), dtype=np.uint8).reshape(shape)
    with torch.no_grad():
        return model(normalize(torch.tensor(raw).permute(2, 0, 1)[None]), return_attention=True)[1]


@pytest.fixture(scope="module")
def oblong(tmp_path_factory) -> Path:
    """A run in progress, with two of four epochs, next to two finished ones."""
    run = tmp_path_factory.mktemp("runs") / "oblong <b>run"
    torch.manual_seed(0)
    model = ConViT(OBLONG).eval()
    add_epoch(run, model, 0)
    config = {"epochs": 4, "dataset": "folder", "data_dir": "moved", "val_fraction": None}
    (run / "config.json").write_text(json.dumps(config))
    add_epoch(run, perturb(model), 1)
    plain = run.parent / "plain ViT"
    add_epoch(plain, ConViT(dataclasses.replace(OBLONG, gpsa_layers=0)).eval(), 0)
    add_epoch(run.parent / "again" / run.name, ConViT(dataclasses.replace(OBLONG, conv_init=False)).eval(), 0)
    return run


@pytest.fixture(scope="module")
def server(oblong, tmp_path_factory):
    """The viewer of that run, and of two others, one of the same name."""
    runs = [oblong, oblong.parent / "plain ViT", oblong.parent / "again" / oblong.name]
    with serving(tmp_path_factory.mktemp("server"), "--run", *runs, "--host", "localhost") as url:
        yield url


def test_non_square_grid_and_run_in_progress(browser, server, oblong):
    with open_page(browser, server) as page:
        cards = page.eval_on_selector_all("[data-head]", "cards => cards.map(card => Number(card.dataset.head))")
        assert cards == [0, 2, 4, 1, 3, 5]
        assert "<img" in page.locator(".prediction").inner_text() or "a & b" in page.locator(".prediction").inner_text()
        assert page.locator(".prediction img, .models b, .facts b").count() == 0
        assert page.locator(".growing").inner_text() == "epoch 1 of 4 so far"
        assert "test" not in page.locator(".bar").inner_text()  # it may be a validation set
        page.locator(".snapshot").fill("1")
        page.locator(".layer").select_option(label="2")
        page.wait_for_function("convit.state.layer === 1")
        model = perturb(ConViT(OBLONG))
        model.load_state_dict(torch.load(oblong / "snapshots/epoch_0001.pt", weights_only=True)["model"])
        assert_maps(page, attention_of(page, model)[1], [(0, 0), (3, 10), (5, 23)])
        page.locator(".image").click(position={"x": page.locator(".image").bounding_box()["width"] - 3, "y": 3})
        assert page.evaluate("convit.state.query") == 5  # the last patch of the first row
        page.get_by_role("tab", name="Training curves").click()
        names = [f"{oblong.parent.name}/oblong <b>run", "plain ViT", "again/oblong <b>run"]
        assert page.locator(".run-names li").all_inner_texts() == names
        assert page.locator(".models button").all_inner_texts() == names
        assert page.locator(".score-charts figure").count() == 2
        curves = page.locator(".score-charts figure").first.locator("polyline, circle")
        assert curves.count() == 3  # of all runs; one with a single epoch is a dot
        assert "test" not in page.locator(".score-charts").inner_text()

        page.add_init_script("const { setInterval } = window;"  # the page polls every five seconds
                             "window.setInterval = (handler, ms) => setInterval(handler, ms / 20)")  # fmt: skip
        page.wait_for_function("location.hash.includes('epoch=1')")
        page.reload()
        page.wait_for_selector(".viewer:not(.loading)")
        assert page.evaluate("convit.state.snapshot") == 1
        add_epoch(oblong, perturb(model), 2)
        page.wait_for_function("document.querySelector('.snapshot').max === '2'")
        page.wait_for_function("convit.state.snapshot === 2")  # a view of the last snapshot stays on the last one

        page.get_by_role("tab", name="Watch heads escape").click()
        for file in (oblong / "snapshots").iterdir():  # another run takes the folder
            file.unlink()
        (oblong / "metrics.jsonl").unlink()
        add_epoch(oblong, ConViT(OBLONG).eval(), 0)
        page.wait_for_function("convit.state.model.epochs.length === 1 && convit.state.maps?.length === 1")
        add_epoch(oblong, perturb(model), 1)  # for other tests
        assert page.locator(".arrow").count() == 6
        page.locator("[data-model^=again]").click()  # whose heads do not start at the taps of a kernel
        page.wait_for_function("convit.state.key.startsWith('again') && convit.state.maps")
        assert page.locator(".head").count() == 6 and page.locator(".arrow").count() == 0
        assert "looks mostly at fixed offsets" in page.locator(".caption").inner_text()
        page.locator("[data-model='plain ViT']").click()
        page.wait_for_function("convit.state.key === 'plain ViT' && convit.state.maps")
        assert "no head has a gate or a position map" in page.locator(".heatmap-summary").inner_text()
        assert page.locator(".kinds").is_hidden() and page.locator(".meter").is_hidden()
        content = page_map(page, 2, 5, "content")
        assert 0.5 < content.sum() < 1.01 and (page_map(page, 2, 5, "mixed") == content).all()


def test_page_of_released_weights(browser, tmp_path):
    """A file in the released format, with random weights, since the released ones need a download."""
    for name in RELEASED:
        with torch.device("meta"):
            assert infer_model(create_model(name).state_dict())[0] == name
    model = perturb(create_model("convit_tiny"))
    torch.save({"model": model.state_dict()}, tmp_path / "released.pth")
    server = app.build_page({"weights": open_weights(tmp_path / "released.pth")})
    server.launch(server_name="127.0.0.1", **app.LAUNCH_OPTIONS)  # in this process: importing Gradio takes seconds
    with contextlib.closing(server), open_page(browser, server.local_url) as page:
        assert page.locator("[data-head]").count() == 4
        assert page.locator(".play").is_hidden()  # one snapshot has no training time
        assert "After training" in page.locator(".caption").inner_text()
        facts = page.locator(".facts").inner_text()
        assert "convit_tiny" in facts and "14 × 14 patches, 1000 classes" in facts
        assert page.evaluate("convit.state.model.classes[207]") == "golden retriever"
        page.locator("[data-example=bus]").click()
        page.wait_for_function("convit.state.example === 'bus'")
        assert "not one of" not in page.locator(".verdict").inner_text()  # ImageNet has a minibus
        page.locator(".layer").select_option(label="10")
        page.wait_for_function("convit.state.layer === 9")
        assert page.locator(".heads-title").inner_text() == "The 4 heads of layer 10"
        assert_maps(page, attention_of(page, model)[9], [(0, 0), (2, 97), (3, 195)])
        with page.expect_download() as event:
            page.locator(".save-csv").click()
        rows = Path(event.value.path()).read_text().splitlines()
        assert rows[1].startswith(",1,1,")  # the epoch of these weights is unknown
        with page.expect_download() as event:
            page.locator(".save-png").click()
        assert Image.open(event.value.path()).size == (1026, 387)
        page.get_by_role("tab", name="Training curves").click()
        assert "No training history for these weights" in page.locator("#curves").inner_text()
        page.get_by_role("tab", name="Attention as convolution").click()
        page.set_viewport_size({"width": 390, "height": 1000})
        box = page.locator(".kernel-map .map").bounding_box()
        assert box["width"] == pytest.approx(box["height"], abs=1)  # with 14 rows, too


def test_invalid_arguments_exit_with_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # it would outlast this test
    monkeypatch.setattr("signal.signal", lambda *_: None)
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    for flags, message in (
        (["--weights", "convit_huge"], "there is no file convit_huge, and no released model of that name"),
        (["--weights", __file__], "is damaged, or is not a PyTorch checkpoint"),
        (["--run", "nowhere"], "there is no folder nowhere"),
        (["--run", DEMO, tmp_path], "has no snapshots; pass a run folder"),
        (["--run", DEMO, "--port", port], f"cannot listen on --host 127.0.0.1 --port {port}: "),
    ):
        monkeypatch.setattr(sys, "argv", ["app.py", *map(str, flags)])
        with pytest.raises(SystemExit) as exit_info:
            app.main()
        error = exit_info.value.code
        assert error.startswith("app.py: ") and message in error and "\n" not in error
    monkeypatch.setattr(sys, "argv", ["app.py", "--runs", str(DEMO)])
    with pytest.raises(SystemExit) as exit_info:
        app.main()
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"app.py: unrecognized arguments: --runs {DEMO}; did you mean --run?\n"
    taken.close()


def test_api_returns_the_models_maps(server, oblong):
    client = Client(server, verbose=False)
    file = encode(Image.effect_noise((96, 64), 80).convert("RGB"))
    heads = client.predict(base64.b64encode(file).decode(), 2, 1, 3, 5, api_name="/heads")
    inspector = open_run(oblong)
    pixels = inspector.prepare_image(file)["pixels"]
    assert heads == json.loads(json.dumps(inspector.head_maps(pixels, 1, 1, 23)))
    predictions = client.predict(base64.b64encode(file).decode(), 2, api_name="/predict")
    assert predictions == [list(row) for row in predict(open_model(oblong), file, top=2)]
    assert np.array(heads[4]["mixed"]).shape == (4, 6) and np.sum(heads[4]["mixed"]) == pytest.approx(1, abs=1e-5)
    for arguments, message in (
        (["bm90aGluZw==", 1], "is not an image"),
        ([base64.b64encode(file).decode(), 9], "a layer from 1 to 3"),
        (["", 1, 9], "a snapshot from -"),
        (["", 1, 0, 4], "a row from 0 to 3"),
        ([base64.b64encode(file).decode(), "x"], "invalid arguments"),
        ([{"path": "http://example.com/x.png", "meta": {"_type": "gradio.FileData"}}, 1], "a file in base64"),
    ):
        with pytest.raises(Exception, match=message):
            client.predict(*arguments, api_name="/heads")
    assert len(client.predict(base64.b64encode(file).decode(), 9, api_name="/predict")) == 3
    with pytest.raises(Exception, match="expected a number of classes from 1 to 3, not -1"):
        client.predict(base64.b64encode(file).decode(), -1, api_name="/predict")
    added, again = perturb(ConViT(OBLONG)), f"again/{oblong.name}"  # on whose snapshots no other test depends
    add_epoch(oblong.parent / again, added, 3)
    heads = client.predict(base64.b64encode(file).decode(), 1, model=again, api_name="/heads")
    assert [head["gate"] for head in heads] == pytest.approx(added.blocks[0].attn.gate().tolist(), abs=1e-3)


def encode(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def hostile_files() -> list[bytes]:
    """Truncated, corrupted, mislabeled and oversized files, and decompression bombs."""
    rng = random.Random(0)
    photo = Image.effect_noise((120, 90), 90).convert("RGB")
    valid = [encode(photo, file_format) for file_format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]
    valid.append(encode(photo, "TIFF", compression="tiff_lzw"))
    valid.append(encode(photo.convert("P"), "GIF", save_all=True, append_images=[photo]))
    files = []
    for file in valid:
        files += [file[: rng.randrange(len(file))] for _ in range(20)]
        for _ in range(45):
            corrupted = bytearray(file)
            for _ in range(rng.choice((1, 5, 50))):
                corrupted[rng.randrange(min(len(corrupted), rng.choice((40, 400, 10**9))))] = rng.randrange(256)
            files.append(bytes(corrupted))
    files += [rng.randbytes(rng.randrange(2000)) for _ in range(20)]
    files.append(encode(Image.new("1", (14_000, 14_000))))  # 24 kB that decode to 196 million pixels
    files += [
        b"",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit",
        b"<svg onload=alert(1)>",
        bytes(21 * 2**20),
    ]
    files += [encode(Image.new("L", size)) for size in ((1, 1), (1, 60_000), (60_000, 1), (5000, 3999))]
    return files


def test_server_survives_hostile_files(server, oblong):
    """More than 500 files, two at a time: each returns an image or an error, and memory use does not grow."""
    files = hostile_files()
    assert len(files) > 500
    call = server_function(server)
    pid = SERVER_PIDS[server]
    before = memory(pid)

    def send(file: bytes) -> dict:
        return call("prepare_image", {"model": "", "file": base64.b64encode(file).decode()})

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(send, files))
    opened = [answer for answer in answers if answer.keys() == {"display", "input", "pixels"}]
    errors = [answer["error"] for answer in answers if answer.keys() == {"error"}]
    assert len(opened) + len(errors) == len(files) and min(len(opened), len(errors)) > 50
    assert all(error.startswith("This ") and len(error) < 150 for error in errors)
    assert memory(pid) - before < 400 * 2**20
    assert not list(Path(f"/proc/{pid}/cwd").resolve().glob("gradio/**/*.*"))  # nothing was stored


def test_invalid_requests_return_one_sentence(server):
    call = server_function(server)
    pixels = base64.b64encode(bytes(32 * 48 * 3)).decode()
    maps = {"model": "", "pixels": pixels, "layer": 1}
    valid = maps | {"snapshot": 0, "gates": [[0.5] * 6, [None] * 6, None]}
    assert "predictions" in call("recompute", valid)
    display = "data:image/png;base64," + base64.b64encode(encode(Image.new("RGB", (9, 6)))).decode()
    export = valid | {"animated": False, "display": display, "head": 0, "query": 3}
    assert "file" in call("export", export)
    invalid = [("layer_maps", maps | change) for change in (
        {"layer": 7}, {"layer": -1}, {"layer": 1.0}, {"layer": None}, {"pixels": "%%"}, {"pixels": pixels[:8]},
        {"pixels": None}, {"model": "../../demo"}, {"model": "nobody"}, {"model": None},
        {"model": ["a"]}, {"unknown": 1})]  # fmt: skip
    invalid += [("recompute", valid | change) for change in (
        {"gates": [[0.5] * 6]}, {"gates": [[2] * 6] * 3}, {"gates": "x"}, {"gates": [["x"] * 6] * 3}, {"gates": 1},
        {"gates": [[10**400] * 6] * 3},
        {"snapshot": 99}, {"snapshot": "1"})]  # fmt: skip
    invalid += [("export", export | change) for change in (
        {"query": 24}, {"query": -1}, {"head": 6}, {"display": "x"}, {"display": None}, {"gates": [1]})]  # fmt: skip
    invalid += [("train", {"model": session, "action": "start"}) for session in ("../x", 3)]
    invalid += [("prepare_image", {"model": "", "example": "none"}), ("prepare_image", None)]
    invalid += [("describe", []), ("export", "x")]
    for name, request in invalid:
        answer = call(name, request)
        assert answer.keys() == {"error"} and "Traceback" not in answer["error"], (name, request, answer)
        assert "/" not in answer["error"], answer  # no paths of the server
    assert "predictions" in call("recompute", valid)


def test_server_exposes_no_files_and_limits_requests(server, oblong):
    host, port = server.removeprefix("http://").split(":")
    for path in ("/etc/passwd", str(ROOT / "app.py"), "app.py", str(oblong / "config.json"), "../../../etc/passwd"):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/stream/", "/static/", "/assets/"):
            with pytest.raises(urllib.error.HTTPError) as response:
                urllib.request.urlopen(server + route + urllib.parse.quote(path))
            assert response.value.code in (403, 404, 405, 422)

    page = urllib.request.urlopen(f"{server}/web/main.js")
    assert page.headers["cache-control"] == "no-cache"  # after an update, old modules would not fit the new page

    def status(path: str, headers: dict) -> int:
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.request("POST", path, body=b"{}", headers=headers)
        return connection.getresponse().status

    assert status("/gradio_api/component_server", {"Content-Length": str(10**9)}) == 413
    assert status("/gradio_api/component_server", {"Transfer-Encoding": "chunked"}) == 411
    for path in ("upload", "component_server"):
        assert status(f"/gradio_api/{path}", {"Content-Type": "multipart/form-data; boundary=x"}) == 403
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.putrequest("POST", "/gradio_api/upload")
    for content_type in ("multipart/form-data; boundary=x", "application/json"):
        connection.putheader("Content-Type", content_type)
    connection.putheader("Content-Length", "0")
    connection.endheaders()
    assert connection.getresponse().status == 403
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{server}/gradio_api/deep_link?session_hash=x")


def memory(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status")
    if not status.exists():
        pytest.skip("memory is read from /proc")
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])


def server_function(url: str):
    """Call server functions the way the page's JavaScript does."""
    config = json.loads(urllib.request.urlopen(url + "/config").read())
    component = next(item["id"] for item in config["components"] if item["props"].get("elem_id") == "viewer")

    def call(name: str, data) -> dict:
        body = {"session_hash": "tests", "component_id": component, "fn_name": name, "data": data}
        request = urllib.request.Request(url + "/gradio_api/component_server", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})  # fmt: skip
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    return call
