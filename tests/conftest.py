"""Fixtures shared by several test files."""

import contextlib
import http.server
import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is imported: tests run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("no_proxy", "127.0.0.1,127.0.0.2,localhost")

import multiprocessing
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convit_min import MODELS, ConViTConfig
from training.run import Run

ROOT = Path(__file__).parent.parent
SERVER_PIDS = {}  # by URL
DEMO = ROOT / "demo" / "cifar10"
# a small model on a grid of 5 x 7 patches, 9 heads, two GPSA blocks and a plain one
CONFIG = ConViTConfig(img_size=(20, 28), patch_size=4, num_classes=5, dim=36, num_heads=9, depth=3, gpsa_layers=2)

CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
                  "--disable-sync", "--no-first-run"]  # fmt: skip
# sitecustomize.py of the server: logs every connection and every name look-up
AUDIT_HOOK = """
import os, sys
def log(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        with open(os.environ["CONNECTIONS_FILE"], "a") as file:
            print(event, args[1] if event != "socket.getaddrinfo" else args[0], file=file)
sys.addaudithook(log)
"""

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

# a process that has imported what is slow, but has no threads: its children start within milliseconds
forkserver = multiprocessing.get_context("forkserver")
forkserver.set_forkserver_preload(["experiments.reproduce", "train_imagenet", "predict", "benchmarks.model", "pytest",
                                   "torch.distributed.run", "torch._dynamo"])  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts with the same random seed, and in full float32 precision."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")


def perturb(model: torch.nn.Module) -> torch.nn.Module:
    """Perturb all weights of a structured initialization, gates and positions most, so that every term matters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if name.endswith(("gating_param", "pos_proj.weight", "pos_proj.bias")) else 0.02
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return model.eval()


SMALL_MODEL = replace(MODELS["convit_cifar_nano"], depth=3, gpsa_layers=2)


def train_quickly():
    """In a child process: `small_model` and `no_plots`."""
    MODELS["convit_cifar_nano"] = SMALL_MODEL
    Run._plot = lambda *_, **__: None


@pytest.fixture
def small_model(monkeypatch):
    """Train three blocks, one of them self-attention, unless a test names another model."""
    monkeypatch.setitem(MODELS, "convit_cifar_nano", SMALL_MODEL)


@pytest.fixture
def no_plots(monkeypatch):
    """Train without plots, which are slow."""
    monkeypatch.setattr(Run, "_plot", lambda *_, **__: None)


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Run a training script in this process; return its exit status and output."""

    def run(script, *flags) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        status = 0
        try:
            script.main()
        except SystemExit as stopped:
            status = stopped.code
        return status, "".join(capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def tree(tmp_path_factory) -> Path:
    """96 training and 16 test images of two classes that are hard to distinguish."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, least, *counts in (("bright", 8, 48, 10), ("dark", 0, 48, 6)):
        for split, count in zip(("train", "test"), counts, strict=True):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(least, 240, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def free_port() -> int:
    """Below the ports that systems give to other connections, which could take it before it is used."""
    for port in random.sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port


@contextlib.contextmanager
def serving(folder: Path, *flags, space: bool = False):
    """Run app.py in another folder and yield its URL; on exit, check that it made no outbound connection.

    With `space`, host and port come from the environment variables of a Hugging Face Space.
    """
    port = free_port()
    connections = folder / "connections.txt"
    (folder / "sitecustomize.py").write_text(AUDIT_HOOK)
    env = os.environ | {"PYTHONPATH": str(folder), "CONNECTIONS_FILE": str(connections), "TMPDIR": str(folder),
                        "GRADIO_TEMP_DIR": str(folder / "gradio")}  # fmt: skip
    env.pop("GRADIO_ANALYTICS_ENABLED", None)  # app.py must disable them
    if space:
        env |= {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SERVER_PORT": str(port), "GRADIO_NUM_PORTS": "1"}
        connections.touch()  # may stay empty: only on a local address does Gradio connect to itself
    else:
        flags = ["--port", port, *flags]
    command = [sys.executable, ROOT / "app.py", *map(str, flags)]
    with open(folder / "server.log", "w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 90
    while True:
        try:
            urllib.request.urlopen(url).close()
            break
        except OSError:
            assert process.poll() is None and time.monotonic() < deadline, (folder / "server.log").read_text()
            time.sleep(0.1)
    SERVER_PIDS[url] = process.pid
    try:
        yield url
    finally:
        process.terminate()
        process.wait(20)
    assert re.search(rf"Viewer running at http://\S+:{port}\b", (folder / "server.log").read_text())
    assert not list(folder.glob("convit-viewer-*")), "training runs were left behind"
    assert "Traceback" not in (folder / "server.log").read_text()
    outbound = [line for line in connections.read_text().splitlines()
                if not re.search(r"127\.0\.0\.1|0\.0\.0\.0|localhost|'::1'|^socket.connect /", line)]  # fmt: skip
    assert not outbound


@pytest.fixture(scope="session")
def browser():
    from playwright import sync_api as api

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with api.sync_playwright() as playwright:
        if not Path(chromium or playwright.chromium.executable_path).exists():
            pytest.skip("Chromium is missing: apt install chromium, or playwright install chromium")
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def open_page(browser, url: str, width: int = 1440):
    """Yield the loaded page; on exit, check that it had no script errors and sent no requests to other hosts."""
    page = browser.new_page(viewport={"width": width, "height": 1000})
    page.set_default_timeout(20_000)
    page.add_init_script("localStorage.setItem('convit-tour', 'seen')")  # the tour would cover controls
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(url)
    page.wait_for_selector(".viewer:not(.loading)")
    yield page
    page.close()
    assert not errors
    host = re.match(r"http://[^/]+", url)[0]
    assert all(request.startswith((host, "data:", "blob:")) for request in requests), requests


def page_map(page, head: int, query: int, kind: str) -> np.ndarray:
    """One attention map, as the page computes it."""
    script = "([head, query, kind]) => Array.from(convit.headMaps(head, query)[kind])"
    return np.array(page.evaluate(script, [head, query, kind]))


def assert_maps(page, attention, heads_and_queries):
    """Check the page's maps against a HeadAttention, to the precision of content maps: one byte."""
    expected = {"position": attention.position, "content": attention.content[0], "mixed": attention.mixed[0]}
    for head, query in heads_and_queries:
        byte_step = attention.content[0, head].max().item() / 255
        for kind, maps in expected.items():
            shown = page_map(page, head, query, kind)
            np.testing.assert_allclose(shown, maps[head, query].numpy(), atol=byte_step + 1e-5)


@contextlib.contextmanager
def file_server(folder: Path) -> Iterator[str]:
    """The URL of a local web server for a folder."""
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def web_server(tmp_path) -> Iterator[tuple[Path, str]]:
    """A folder that a local web server serves, and its URL."""
    folder = tmp_path / "www"
    folder.mkdir()
    with file_server(folder) as url:
        yield folder, url
