"""How fast the page answers: the hand of one visitor in Chromium, then many visitors at once.

    python benchmark_viewer.py                two minutes on two cores; needs requirements-dev.txt and Chromium

Starts app.py, moves and clicks as a visitor does, and takes the time from the event until the frame after it is
painted. Then 20 visitors each ask the server for something else every second for a minute, as the page's own code asks.
Writes results/viewer.{json,md}, and viewer.png, the page as it looks.
"""

import argparse
import base64
import io
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from training.checkpoint import provenance

HERE = Path(__file__).parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--no-first-run"]  # fmt: skip
VISITORS = 20
# milliseconds from an event's handler to the end of the frame that shows what it changed
WATCH = """name => { window.taken = [];
    addEventListener(name, () => { const start = performance.now();
        requestAnimationFrame(() => { const channel = new MessageChannel();
            channel.port1.onmessage = () => window.taken.push(performance.now() - start);
            channel.port2.postMessage(0); }); }, { capture: true }); }"""


def start_server() -> tuple[subprocess.Popen, str]:
    """app.py on a free port, and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, HERE / "app.py", "--port", str(port)], **quiet)
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}").close()
            return process, f"http://127.0.0.1:{port}"
        except OSError:
            if process.poll() is not None:
                sys.exit("benchmark_viewer.py: app.py did not start")
            time.sleep(0.1)


def open_page(browser: Browser, address: str) -> tuple[Page, float]:
    """A new visitor's page, and the milliseconds until its first picture and maps."""
    page = browser.new_context(viewport={"width": 1440, "height": 1000}).new_page()
    start = time.perf_counter()
    page.goto(address)
    page.wait_for_selector(".panel:not(.loading)")
    return page, 1000 * (time.perf_counter() - start)


def hover(page: Page) -> list[float]:
    """Milliseconds of 300 moves of the mouse over the picture."""
    page.evaluate(WATCH, "pointermove")
    box = page.locator(".picture").bounding_box()
    for step in range(300):
        page.mouse.move(
            box["x"] + (7 * step % 97) / 97 * box["width"], box["y"] + (13 * step % 89) / 89 * box["height"]
        )
    page.wait_for_timeout(100)
    return page.evaluate("taken")


def checkpoints(page: Page) -> list[float]:
    """Milliseconds of 60 moves of the checkpoint slider."""
    page.evaluate(WATCH, "input")
    last = int(page.locator(".checkpoint").get_attribute("max"))
    for step in range(60):
        page.locator(".checkpoint").fill(str((5 * step + 1) % (last + 1)))
    page.wait_for_timeout(100)
    return page.evaluate("taken")


def layers(page: Page) -> list[float]:
    """Milliseconds of 40 changes of the layer, each a question to the server."""
    script = """layer => new Promise(done => { const start = performance.now();
        const choice = document.querySelector(".layer");
        choice.value = layer; choice.dispatchEvent(new Event("change"));
        const look = () => requestAnimationFrame(() => convit.state.layer === layer
            ? requestAnimationFrame(() => done(performance.now() - start)) : look()); look(); })"""
    return [page.evaluate(script, step % 5) for step in range(40)]


def uploads(page: Page, file: bytes) -> list[float]:
    """Milliseconds from choosing a file to its maps, ten times, each time another file of that kind."""
    taken = []
    for step in range(10):
        page.locator("[data-example=lion]").click()
        page.wait_for_function("convit.state.example === 'lion'")
        script = """([data, more]) => new Promise(done => {
            const file = new File([Uint8Array.from(atob(data), c => c.charCodeAt(0)), more], "x.jpg");
            const transfer = new DataTransfer(); transfer.items.add(file);
            const start = performance.now();
            const drop = new DragEvent("drop", { dataTransfer: transfer, bubbles: true });
            document.querySelector(".picture").dispatchEvent(drop);
            const look = () => requestAnimationFrame(() => convit.state.example === null
                ? requestAnimationFrame(() => done(performance.now() - start)) : look()); look(); })"""
        taken.append(page.evaluate(script, [base64.b64encode(file).decode(), str(step)]))
    return taken


def photo(width: int, height: int) -> bytes:
    """A JPEG as a camera makes it."""
    stream = io.BytesIO()
    noise = Image.effect_noise((width // 8, height // 8), 60).resize((width, height)).convert("RGB")
    noise.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def visitor(address: str, seed: int, seconds: float) -> list[float]:
    """Milliseconds that each wish of one visitor took; one wish a second. Raises for any answer that is an error."""
    numbers, taken = random.Random(seed), []
    config = json.loads(urllib.request.urlopen(address + "/config").read())
    panel = next(part["id"] for part in config["components"] if part["props"].get("elem_id") == "panel")

    def ask(name: str, **question) -> dict:
        body = {"session_hash": str(seed), "component_id": panel, "fn_name": name, "data": {"run": ""} | question}
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(address + "/gradio_api/component_server", json.dumps(body).encode(), kind)
        answer = json.loads(urllib.request.urlopen(request, timeout=30).read())
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    run = ask("describe")
    picture = ask("choose", example="cheetah")
    gates = [[0.5] * len(run["gate"][0][0])] * len(run["layers"])
    own = [base64.b64encode(photo(400 + seed, 300 + index)).decode() for index in range(4)]

    def new_picture():
        picture.update(ask("choose", file=numbers.choice(own)))
        ask("read_layer", pixels=picture["pixels"], layer=0)

    wishes: list[Callable] = [
        lambda: ask("read_layer", pixels=picture["pixels"], layer=numbers.randrange(len(run["layers"]))),
        lambda: ask("what_if", pixels=picture["pixels"], layer=0, checkpoint=0, gates=gates),
        new_picture,
    ]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        numbers.choice(wishes)()
        taken.append(1000 * (time.perf_counter() - start))
        time.sleep(max(1 - (time.perf_counter() - start), 0))
    return taken


def memory(process: subprocess.Popen) -> float:
    """What a process holds in memory, in MiB."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1024


def percentile(values: list[float]) -> float:
    return statistics.quantiles(values, n=20)[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--seconds", type=float, default=60, help="how long the many visitors stay")
    given = parser.parse_args()
    process, address = start_server()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            first = [open_page(browser, address)[1] for _ in range(5)]
            page, _ = open_page(browser, address)
            measured = {
                "page to first picture and maps": (first, 2000),
                "hover to repaint": (hover(page), 16),
                "another checkpoint": (checkpoints(page), 100),
                "another layer": (layers(page), 100),
                "own picture to maps, 0.5 megapixels": (uploads(page, photo(800, 600)), 500),
                "own picture to maps, 12 megapixels": (uploads(page, photo(4000, 3000)), 500),
            }
            last = int(max((HERE / "demo" / "snapshots").iterdir()).stem.removeprefix("epoch_"))
            page, _ = open_page(browser, f"{address}/#layer=5&head=5&epoch={last}")
            page.screenshot(path=given.out / "viewer.png")
            version = browser.version
            browser.close()
        with ThreadPoolExecutor(VISITORS) as pool:
            list(pool.map(lambda seed: visitor(address, seed, 10), range(VISITORS)))  # fills the caches
            before = memory(process)
            crowd = list(pool.map(lambda seed: visitor(address, seed, given.seconds), range(VISITORS)))
        after = memory(process)
    finally:
        process.terminate()
    wishes = [one for taken in crowd for one in taken]
    measured[f"{VISITORS} visitors, one wish a second each"] = (wishes, 1000)

    header = provenance(torch.device("cpu")) | {
        "chromium": version,
        "gradio": gradio.__version__,
        "cores": os.cpu_count(),
    }
    lines = [", ".join(f"{key}: {value}" for key, value in header.items()), "",
             "| ms | median | 95th percentile | aim | times |", "|---|---|---|---|---|"]  # fmt: skip
    lines += [f"| {name} | {statistics.median(taken):.1f} | {percentile(taken):.1f} | {aim} | {len(taken)} |"
              for name, (taken, aim) in measured.items()]  # fmt: skip
    lines += ["", f"No error. The server held {before:.0f} MiB after ten seconds of {VISITORS} visitors, "
              f"{after:.0f} MiB after {given.seconds:.0f} more."]  # fmt: skip
    print("\n".join(lines))
    (given.out / "viewer.md").write_text("\n".join(lines) + "\n")
    result = {"header": header, "milliseconds": {name: taken for name, (taken, _) in measured.items()}}
    memories = {"mebibytes": {"before": before, "after": after}}
    (given.out / "viewer.json").write_text(json.dumps(result | memories) + "\n")


if __name__ == "__main__":
    main()
