"""Fixtures that several test files share."""

import contextlib
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
from PIL import Image

from convit_min import ConViTConfig

ROOT = Path(__file__).parent.parent
PROCESSES = {}  # of servers, by address
DEMO = ROOT / "demo"
# a small model on a grid of 5 x 7 patches, 9 heads, two GPSA blocks and a plain one
CONFIG = ConViTConfig(img_size=(20, 28), patch_size=4, num_classes=5, dim=36, num_heads=9, depth=3, gpsa_layers=2)

QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip
# Python tells an audit hook of every connection and every look-up of a name
WATCH = """
import os, sys
def note(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open(os.environ["WATCH_FILE"], "a") as file:
            print(event, arguments[1] if event != "socket.getaddrinfo" else arguments[0], file=file)
sys.addaudithook(note)
"""

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random numbers."""
    torch.manual_seed(0)


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Move all weights away from their structured start, gates and positions the most, so that no term can hide."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name.endswith(("gating_param", "pos_proj.weight", "pos_proj.bias")) else 0.02
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """96 training and 16 test pictures of two classes, hard to tell apart."""
    root, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, least, *counts in (("bright", 8, 48, 10), ("dark", 0, 48, 6)):
        for split, count in zip(("train", "test"), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(least, 240, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


@contextlib.contextmanager
def serving(folder: Path, *flags, space: bool = False):
    """app.py as `python app.py` runs it, on a free port and from another folder; its connections go to watch.txt.

    With `space` the address comes the way a Hugging Face Space gives it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "sitecustomize.py").write_text(WATCH)
    environment = os.environ | {"PYTHONPATH": str(folder), "WATCH_FILE": str(folder / "watch.txt"),
                                "TMPDIR": str(folder), "GRADIO_TEMP_DIR": str(folder / "gradio")}  # fmt: skip
    environment.pop("GRADIO_ANALYTICS_ENABLED", None)  # app.py itself must see to it
    if space:
        environment |= {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": str(port), "GRADIO_NUM_PORTS": "1"}
        (folder / "watch.txt").touch()  # it may connect to nobody; elsewhere Gradio at least sees whether it is up
    else:
        flags = ["--port", port, *flags]
    command = [sys.executable, ROOT / "app.py", *map(str, flags)]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(address).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.1)
    PROCESSES[address] = process.pid
    try:
        yield address
    finally:
        process.terminate()
        process.wait(20)
    assert not list(folder.glob("convit-page-*")), "runs of visitors are left behind"
    assert "Traceback" not in (folder / "server.log").read_text()
    outbound = [line for line in (folder / "watch.txt").read_text().splitlines()
                if not re.search(r"127\.0\.0\.1|0\.0\.0\.0|localhost|'::1'|^socket.connect /", line)]  # fmt: skip
    assert not outbound


@pytest.fixture(scope="session")
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


@contextlib.contextmanager
def visiting(browser, address: str, width: int = 1440):
    """The page, opened; in the end: no script error, and no request to anywhere else."""
    page = browser.new_page(viewport={"width": width, "height": 1000})
    page.set_default_timeout(20_000)
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(address)
    page.wait_for_selector(".panel:not(.loading)")
    yield page
    page.close()
    assert not errors
    own = re.match(r"http://[^/]+", address)[0]
    assert all(url.startswith((own, "data:", "blob:")) for url in requests), requests


def assert_maps(page, attention, places):
    """The maps that the page computes, of these (head, query), are those of a HeadAttention to one step of a byte."""
    expected = {"position": attention.position, "content": attention.content[0], "mixed": attention.mixed[0]}
    for head, query in places:
        shown = page.evaluate("([head, query]) => convit.mapsOf(head, query)", [head, query])
        step = attention.content[0, head].max().item() / 255  # content comes as bytes
        for name, reference in expected.items():
            values = list(shown[name].values()) if isinstance(shown[name], dict) else shown[name]
            np.testing.assert_allclose(values, reference[head, query].numpy(), atol=step + 1e-5)
