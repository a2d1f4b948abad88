"""The server of the page: other models than the demo's, many kinds of files, and visitors who mean ill."""

import base64
import dataclasses
import http.client
import io
import json
import random
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PROCESSES, ROOT, assert_maps, perturb, serving, visiting
from PIL import Image

import app
from analysis import head_statistics
from convit_min import ConViT, ConViTConfig, create_model, normalise
from training.checkpoint import append_metrics, nested_list, save_weights
from viewer.probe import open_run, open_weights

# a grid of 4 x 6 patches, 6 heads in 2 x 3 taps: rows and columns cannot be mistaken for each other
OBLONG = ConViTConfig((32, 48), 8, num_classes=3, dim=24, depth=3, num_heads=6, gpsa_layers=2)
CLASSES = ["<img src=x onerror=alert(1)>", "a & b", "plain"]


def add_epoch(run: Path, model: ConViT, epoch: int):
    """Write what a run writes at the end of an epoch."""
    (run / "snapshots").mkdir(parents=True, exist_ok=True)
    heads = head_statistics(model, torch.randn(4, 3, *model.config.image_shape))
    numbers = {name: nested_list(value) for name, value in heads._asdict().items()}
    line = {"epoch": epoch, "test_accuracy": 30.0 + epoch, "test_loss": 1.0, "heads": numbers}
    append_metrics(run, line | ({"train_loss": 1.1} if epoch else {}))
    save_weights(model, CLASSES, epoch, run / "snapshots" / f"epoch_{epoch:04d}.pt")


@pytest.fixture(scope="module")
def oblong(tmp_path_factory) -> Path:
    """A run that is still training: two epochs of four."""
    run = tmp_path_factory.mktemp("runs") / "oblong <b>run"
    torch.manual_seed(0)
    model = ConViT(OBLONG).eval()
    add_epoch(run, model, 0)
    (run / "config.json").write_text('{"epochs": 4, "dataset": "folder"}')
    add_epoch(run, perturb(model), 1)
    plain = run.parent / "plain ViT"
    for other in (plain, run.parent / "again" / run.name):
        add_epoch(other, ConViT(dataclasses.replace(OBLONG, gpsa_layers=0)).eval(), 0)
    return run


@pytest.fixture(scope="module")
def server(oblong, tmp_path_factory):
    """The page of that run, with the curves of two others beside it, one of its own name."""
    others = [oblong.parent / "plain ViT", oblong.parent / "again" / oblong.name]
    flags = ["--run", oblong, "--compare", *others, "--host", "localhost"]
    with serving(tmp_path_factory.mktemp("elsewhere"), *flags) as address:
        yield address


def test_any_grid_and_kernel_is_shown_right_and_a_run_that_goes_on_is_followed(browser, server, oblong):
    with visiting(browser, server) as page:
        cards = page.eval_on_selector_all("[data-head]", "cards => cards.map(card => Number(card.dataset.head))")
        assert cards == [0, 2, 4, 1, 3, 5]
        assert "<img" in page.locator(".guess").inner_text() or "a & b" in page.locator(".guess").inner_text()
        assert page.locator(".guess img, .runs b").count() == 0
        page.locator(".checkpoint").fill("1")
        model = perturb(ConViT(OBLONG))
        model.load_state_dict(torch.load(oblong / "snapshots/epoch_0001.pt", weights_only=True)["model"])
        raw = np.frombuffer(base64.b64decode(page.evaluate("convit.pixels()")), dtype=np.uint8).reshape(32, 48, 3)
        with torch.no_grad():
            attention = model(normalise(torch.tensor(raw).permute(2, 0, 1)[None]), return_attention=True)[1][1]
        assert_maps(page, attention, [(0, 0), (3, 10), (5, 23)])
        page.locator(".picture").click(position={"x": page.locator(".picture").bounding_box()["width"] - 3, "y": 3})
        assert page.evaluate("convit.state.query") == 5  # the last patch of the first row
        page.get_by_role("tab", name="Training story").click()
        assert page.locator(".names li").all_inner_texts() == ["oblong <b>run", "plain ViT", "again/oblong <b>run"]
        assert page.locator(".score-charts figure").count() == 2

        add_epoch(oblong, perturb(model), 2)
        page.wait_for_function("document.querySelector('.checkpoint').max === '2'")
        page.wait_for_function("convit.state.checkpoint === 2")  # who stood at the end goes along


@pytest.mark.parametrize("name", ["convit_tiny", "convit_base"])
def test_released_weights_are_shown_as_one_checkpoint(name, tmp_path):
    """A file in the released format, with weights of our own: the real ones cannot be had everywhere."""
    model = perturb(create_model(name))
    torch.save(model.state_dict(), tmp_path / "released.pth")
    probe = open_weights(str(tmp_path / "released.pth"))
    heads = model.config.num_heads
    assert probe.name == name and probe.config.grid == (14, 14) and probe.classes[207] == "golden retriever"
    picture = probe.picture(png(Image.effect_noise((300, 200), 80).convert("RGB")))
    read = probe.read_layer(picture["pixels"], 9)
    content = np.frombuffer(base64.b64decode(read["content"][0]), dtype=np.uint8).reshape(heads, 196, 196)
    raw = np.frombuffer(base64.b64decode(picture["pixels"]), dtype=np.uint8).reshape(224, 224, 3)
    with torch.no_grad():
        attention = model(normalise(torch.tensor(raw).permute(2, 0, 1)[None]), return_attention=True)[1][9]
    error = content / 255 * np.array(read["peaks"][0])[:, None, None] - attention.content[0].numpy()
    assert np.abs(error).max() <= attention.content.max() / 255


def test_the_page_of_released_weights(browser, tmp_path):
    torch.save({"model": perturb(create_model("convit_tiny")).state_dict()}, tmp_path / "released.pth")
    with serving(tmp_path, "--weights", tmp_path / "released.pth") as address, visiting(browser, address) as page:
        assert page.locator("[data-head]").count() == 4
        assert page.locator(".play").is_hidden()  # one checkpoint has no training time
        before = page.locator(".caption").inner_text()
        assert before.startswith("After training, ")
        page.locator(".layer").select_option(label="3")
        page.wait_for_function("convit.state.layer === 2")
        page.wait_for_function("document.querySelector('.layer-name').textContent === '3'")
        page.get_by_role("tab", name="Training story").click()
        assert "without the story of their training" in page.locator("#story").inner_text()


def test_what_cannot_be_shown_is_told_in_one_sentence(tmp_path, monkeypatch):
    for flags, words in (
        (["--weights", "convit_huge"], "there is no file convit_huge, and no released model of that name"),
        (["--weights", __file__], "is out of reach, damaged, or nothing that torch.save wrote"),
        (["--run", "nowhere"], "nowhere holds no snapshots; give a run folder of train_cifar.py with --run"),
        (["--compare", tmp_path], "holds no metrics.jsonl"),
    ):
        monkeypatch.setattr(sys, "argv", ["app.py", *map(str, flags)])
        with pytest.raises(SystemExit) as end:
            app.main()
        assert end.value.code.startswith("app.py: ") and words in end.value.code and "\n" not in end.value.code


def test_the_api_gives_the_models_maps(server, oblong):
    client = pytest.importorskip("gradio_client").Client(server, verbose=False)
    file = png(Image.effect_noise((96, 64), 80).convert("RGB"))
    heads = client.predict(base64.b64encode(file).decode(), 2, 1, 3, 5, api_name="/heads")
    probe = open_run(oblong)
    assert heads == json.loads(json.dumps(probe.heads(probe.picture(file)["pixels"], 1, 1, 23)))
    assert np.array(heads[4]["mixed"]).shape == (4, 6) and np.sum(heads[4]["mixed"]) == pytest.approx(1, abs=1e-5)
    for arguments, words in (
        (["bm90aGluZw==", 1], "cannot be read as a picture"),
        (["", 9], "a layer from 1 to 2"),
        (["", 1, 0, 4], "a row from 0 to 3"),
    ):
        with pytest.raises(Exception, match=words):
            client.predict(*arguments, api_name="/heads")


def png(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def hostile_files() -> list[bytes]:
    """Files cut short, altered, mis-named, too large, and bombs."""
    numbers = random.Random(0)
    photo = Image.effect_noise((120, 90), 90).convert("RGB")
    whole = [png(photo, kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]
    whole += [
        png(photo, "TIFF", compression="tiff_lzw"),
        png(photo.convert("P"), "GIF", save_all=True, append_images=[photo]),
    ]
    files = []
    for file in whole:
        files += [file[: numbers.randrange(len(file))] for _ in range(20)]
        for _ in range(45):
            altered = bytearray(file)
            for _ in range(numbers.choice((1, 5, 50))):
                altered[numbers.randrange(min(len(altered), numbers.choice((40, 400, 10**9))))] = numbers.randrange(256)
            files.append(bytes(altered))
    files += [numbers.randbytes(numbers.randrange(2000)) for _ in range(20)]
    bomb = png(Image.new("1", (20_000, 20_000)))  # 50 kB that open to 400 million pixels
    files += [
        b"",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit",
        b"<svg onload=alert(1)>",
        bomb,
        bytes(11 * 2**20),
    ]
    files += [png(Image.new("L", size)) for size in ((1, 1), (1, 60_000), (60_000, 1), (5000, 3999))]
    return files


def test_no_file_brings_the_server_down(server, oblong):
    """More than 500 hostile files, two at a time: each gives maps or a sentence, and memory stays where it is."""
    files = hostile_files()
    assert len(files) > 500
    ask = asker(server)
    process = PROCESSES[server]
    before = memory(process)

    def send(file: bytes) -> dict:
        return ask("choose", {"run": "", "file": base64.b64encode(file).decode()})

    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(send, files))
    opened = [answer for answer in answers if answer.keys() == {"display", "seen", "pixels"}]
    refused = [answer["error"] for answer in answers if answer.keys() == {"error"}]
    assert len(opened) + len(refused) == len(files) and min(len(opened), len(refused)) > 50
    assert all(words.startswith("This ") and len(words) < 100 for words in refused)
    assert memory(process) - before < 400 * 2**20
    assert not list(Path(f"/proc/{process}/cwd").resolve().glob("gradio/**/*.*"))  # nothing was kept


def test_nonsense_from_a_browser_gets_a_sentence(server):
    ask = asker(server)
    pixels = base64.b64encode(bytes(32 * 48 * 3)).decode()
    fine = {"run": "", "pixels": pixels, "layer": 1, "checkpoint": 1, "query": 3, "gates": [[0.5] * 6] * 2}
    assert "classes" in ask("what_if", fine)
    display = "data:image/png;base64," + base64.b64encode(png(Image.new("RGB", (9, 6)))).decode()
    bad = [("read_layer", fine | change) for change in (
        {"layer": 7}, {"layer": -1}, {"layer": 1.0}, {"layer": None}, {"pixels": "%%"}, {"pixels": pixels[:8]},
        {"pixels": None}, {"run": "../../demo"}, {"run": "nobody"}, {"run": None}, {"run": ["a"]})]  # fmt: skip
    bad += [("what_if", fine | change) for change in (
        {"gates": [[0.5] * 6]}, {"gates": [[2] * 6] * 2}, {"gates": "x"}, {"gates": [[None] * 6] * 2},
        {"gates": [[float("nan")] * 6] * 2}, {"checkpoint": 99}, {"checkpoint": "1"})]  # fmt: skip
    bad += [("export", fine | {"moving": False, "display": display, "recomputed": False} | change) for change in (
        {"query": 24}, {"query": -1}, {"display": "x"}, {"display": None}, {"gates": [[0.5]]})]  # fmt: skip
    bad += [("train", {"visitor": "../x", "wish": "start"}), ("train", {"visitor": 3, "wish": "start"})]
    bad += [("choose", {"run": "", "example": "none"}), ("choose", None), ("describe", []), ("export", "x")]
    for name, question in bad:
        answer = ask(name, question)
        assert answer.keys() == {"error"} and "Traceback" not in answer["error"], (name, question, answer)
        assert "/" not in answer["error"].replace("x 6", ""), answer  # no path of the server
    assert "classes" in ask("what_if", fine)


def test_the_server_keeps_its_files_and_its_memory(server, oblong):
    host, port = server.removeprefix("http://").split(":")
    for path in ("/etc/passwd", str(ROOT / "app.py"), "app.py", str(oblong / "config.json"), "../../../etc/passwd"):
        for route in ("/gradio_api/file=", "/file=", "/gradio_api/stream/", "/static/", "/assets/"):
            with pytest.raises(urllib.error.HTTPError) as refusal:
                urllib.request.urlopen(server + route + urllib.parse.quote(path))
            assert refusal.value.code in (403, 404, 405, 422)

    def status(path: str, headers: dict) -> int:
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        connection.request("POST", path, body=b"{}", headers=headers)
        return connection.getresponse().status

    assert status("/gradio_api/component_server", {"Content-Length": str(10**9)}) == 413
    assert status("/gradio_api/component_server", {"Transfer-Encoding": "chunked"}) == 411
    assert status("/gradio_api/upload", {"Content-Type": "multipart/form-data; boundary=x"}) == 403


def memory(process: int) -> int:
    """What a process holds in memory, in bytes."""
    status = Path(f"/proc/{process}/status")
    if not status.exists():
        pytest.skip("memory is read from /proc")
    return 1024 * int(re.search(r"VmRSS:\s+(\d+)", status.read_text())[1])


def asker(server: str):
    """What the page's own JavaScript does to ask the server."""
    config = json.loads(urllib.request.urlopen(server + "/config").read())
    panel = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "panel")

    def ask(name: str, question) -> dict:
        body = {"session_hash": "tests", "component_id": panel, "fn_name": name, "data": question}
        request = urllib.request.Request(server + "/gradio_api/component_server", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})  # fmt: skip
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    return ask
