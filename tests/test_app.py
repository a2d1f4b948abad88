"""The page in a real browser, as a visitor uses it."""

import base64
import io
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO
from PIL import Image

from convit_min import ConViT, ConViTConfig, load_weights, normalise

ROOT = Path(__file__).parent.parent
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """app.py as `python app.py` runs it, on a free port and from another folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("elsewhere")
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(folder / "gradio")}
    environment.pop("GRADIO_ANALYTICS_ENABLED", None)  # app.py itself must see to it
    process = subprocess.Popen([sys.executable, ROOT / "app.py", "--port", str(port)], cwd=folder, env=environment)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(address).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, "app.py did not start"
            time.sleep(0.2)
    yield address
    process.terminate()
    process.wait(20)


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="pip install -r requirements-dev.txt")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=QUIET)
        except api.Error:
            pytest.skip("no Chromium here: apt install chromium, or playwright install chromium")
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    """The page, opened; after the test: no script error, and no request to anywhere else."""
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(server)
    page.wait_for_selector("[data-head][data-gate]", timeout=30_000)
    yield page
    page.close()
    assert not errors
    assert all(url.startswith((server, "data:", "blob:")) for url in requests), requests


def maps(page, name="mixed") -> list[str]:
    """The pixels of one kind of map of every head, in the order of the heads."""
    script = f"""Array.from({{length: 9}}, (_, head) => {{
        const canvas = document.querySelector(`[data-head="${{head}}"] canvas.{name}`);
        return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.join();
    }})"""
    return page.evaluate(script)


def gates(page) -> list[float]:
    return page.eval_on_selector_all("[data-head]", "cards => cards.map(card => Number(card.dataset.gate))")


def brightest(pixels: str) -> int:
    rgba = np.array(pixels.split(","), dtype=int).reshape(64, 4)
    return int(rgba[:, :3].sum(1).argmax())


def click_patch(page, row, column):
    box = page.locator(".picture").bounding_box()
    position = {"x": (column + 0.5) * box["width"] / 8, "y": (row + 0.5) * box["height"] / 8}
    page.locator(".picture").click(position=position)


def test_the_page_opens_on_nine_taps_around_the_query(page):
    assert gates(page) == [0.731] * 9
    assert "epoch 0" in re.sub(r"\s+", " ", page.locator(".time").inner_text())
    places = [brightest(pixels) for pixels in maps(page, "position")]
    assert places == [(4 + head % 3 - 1) * 8 + 4 + head // 3 - 1 for head in range(9)]
    cards = page.eval_on_selector_all("[data-head]", "cards => cards.map(card => Number(card.dataset.head))")
    assert cards == [0, 3, 6, 1, 4, 7, 2, 5, 8]  # laid out as the kernel: rows look up, here and down
    picture = page.evaluate("document.querySelector('.picture').toDataURL()")
    pixels = np.array(Image.open(io.BytesIO(base64.b64decode(picture.split(",")[1]))).convert("L"))
    assert pixels.shape == (384, 384) and pixels.std() > 20  # a real picture, at once


def test_a_click_and_the_arrow_keys_move_the_query(page):
    before = maps(page)
    click_patch(page, 2, 6)
    assert [brightest(pixels) for pixels in maps(page, "position")][4] == 2 * 8 + 6
    assert all(one != other for one, other in zip(before, maps(page), strict=True))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    assert [brightest(pixels) for pixels in maps(page, "position")][4] == 3 * 8 + 5


def test_the_checkpoint_changes_gates_and_maps_and_play_runs_to_the_end(page):
    start, before = gates(page), maps(page)
    last = page.locator(".checkpoint").get_attribute("max")
    page.locator(".checkpoint").fill(last)
    assert gates(page) != start and maps(page) != before
    assert max(gates(page)) - min(gates(page)) > 0.1  # training has told the heads apart
    end = page.locator(".epoch").inner_text()
    page.locator(".checkpoint").fill(str(int(last) - 1))
    page.get_by_role("button", name="play training").click()
    page.wait_for_function("end => document.querySelector('.epoch').textContent === end", arg=end, timeout=5000)
    page.wait_for_timeout(1200)
    assert page.locator(".epoch").inner_text() == end  # it stops there
    assert "test accuracy" in page.locator(".status").inner_text()
    for row in page.locator(".guess > div").all():
        share = row.locator(".fill").bounding_box()["width"] / row.locator(".track").bounding_box()["width"]
        assert share == pytest.approx(int(row.locator("span").last.inner_text().rstrip("%")) / 100, abs=0.02)


def test_the_layer_changes_the_maps(page):
    page.locator(".checkpoint").fill(page.locator(".checkpoint").get_attribute("max"))
    before = maps(page, "content")
    page.locator(".layer").select_option("0")
    page.wait_for_function("before => document.querySelector('[data-head=\"0\"] canvas.content').getContext('2d')"
                           ".getImageData(0, 0, 8, 8).data.join() !== before", arg=before[0])  # fmt: skip
    assert maps(page, "content") != before


def test_the_maps_of_the_browser_are_the_models(page):
    """The page's own JavaScript against HeadAttention, at the last checkpoint, in the last GPSA layer."""
    checkpoint = int(page.locator(".checkpoint").get_attribute("max"))
    page.locator(".checkpoint").fill(str(checkpoint))
    file = sorted((DEMO / "snapshots").glob("*.pt"))[checkpoint]
    record = torch.load(file, weights_only=True)
    model = ConViT(ConViTConfig(**record["model_config"])).eval()
    load_weights(model, file)
    pixels = base64.b64decode(page.evaluate("window.convit.pixels()"))
    raw = np.frombuffer(pixels, dtype=np.uint8).reshape(32, 32, 3)
    with torch.no_grad():
        attention = model(normalise(torch.tensor(raw).permute(2, 0, 1)[None]), return_attention=True)[1]
    heads = attention[model.config.gpsa_layers - 1]
    expected = {"position": heads.position, "content": heads.content[0], "mixed": heads.mixed[0]}
    for head, query in ((0, 0), (4, 27), (8, 63)):
        shown = page.evaluate("([head, query]) => window.convit.mapsOf(head, query)", [head, query])
        step = heads.content[0, head].max().item() / 255  # content comes as bytes
        for name, reference in expected.items():
            values = list(shown[name].values()) if isinstance(shown[name], dict) else shown[name]
            np.testing.assert_allclose(values, reference[head, query].numpy(), atol=step + 1e-5)


def test_examples_and_uploads_change_the_picture_and_its_maps(page, tmp_path):
    def shown():
        return page.evaluate("document.querySelector('.picture').toDataURL()")

    before = shown()
    page.locator("#examples button, #examples .gallery-item").nth(2).click()
    page.wait_for_function("before => document.querySelector('.picture').toDataURL() !== before", arg=before)
    example, content = shown(), maps(page, "content")

    Image.effect_noise((80, 50), 90).convert("RGB").save(tmp_path / "mine.png")
    page.locator("#upload button[aria-label*='lear'], #upload button[aria-label*='emove']").first.click()
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "mine.png")
    page.wait_for_function("before => document.querySelector('.picture').toDataURL() !== before", arg=example)
    page.wait_for_timeout(500)
    assert maps(page, "content") != content


def test_a_file_that_is_no_picture_is_refused_and_the_page_lives_on(page, tmp_path):
    before = page.evaluate("document.querySelector('.picture').toDataURL()")
    (tmp_path / "broken.png").write_bytes(b"this is no picture")
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "broken.png")
    page.wait_for_selector("text=cannot be read as a picture", timeout=10_000)
    assert "Traceback" not in page.content()
    assert page.evaluate("document.querySelector('.picture').toDataURL()") == before
    click_patch(page, 0, 0)
    assert brightest(maps(page, "position")[4]) == 0


def test_a_run_that_is_not_there_gives_one_sentence():
    command = [sys.executable, ROOT / "app.py", "--run", "nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.strip() == "app.py: nowhere holds no snapshots; give a run folder of train_cifar.py with --run"
