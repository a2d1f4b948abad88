"""Latency of the viewer: first for one user in Chromium, then for 20 clients at once.

    python -m benchmarks.viewer        two minutes on two cores; needs requirements-dev.txt and Chromium

Starts app.py, uses the page, and measures how long the browser takes to show the result. Then 20 clients each act once
per second (an upload is two requests), for a minute.
Writes results/benchmarks/viewer.{json,md} and viewer.png, a screenshot.
"""

import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gradio
import torch
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from benchmarks.timing import benchmark_parser, time_calls, write_results
from training.checkpoint import provenance
from viewer.limits import encode_base64, encode_image

ROOT = Path(__file__).parent.parent
CLIENTS = 20
# timeUntil: milliseconds from `action` to the first paint after `isDone`; hovers: from every mouse move to its paint
TIMERS = """
const painted = () => new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
window.timeUntil = async (isDone, action) => {
    const start = performance.now();
    action();
    for (let done = false; !done; await painted()) done = isDone();
    return performance.now() - start;
};
window.hovers = [];
addEventListener("pointermove", async () => hovers.push(await timeUntil(() => true, () => {})), { capture: true });
"""


def start_server() -> tuple[subprocess.Popen, str]:
    """Run app.py; return the process and the URL that it prints."""
    process = subprocess.Popen([sys.executable, ROOT / "app.py"], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if url := re.search(r"http://[\w.:]+", line):
            return process, url[0]
    sys.exit("benchmarks.viewer: app.py did not start")


def open_page(browser: Browser, url: str) -> Page:
    """Open the page in a new browser session and wait for its first attention maps."""
    page = browser.new_context(viewport={"width": 1440, "height": 1000}).new_page()
    page.add_init_script(TIMERS)
    page.add_init_script("localStorage.setItem('convit-tour', 'seen')")  # the tour would cover the page
    page.goto(url)
    page.wait_for_selector(".viewer:not(.loading)")
    return page


def hover(page: Page) -> list[float]:
    """Milliseconds from each of 300 mouse moves over the image to its paint."""
    box = page.locator(".image").bounding_box()
    for step in range(300):
        x, y = 7 * step % 97 / 97, 13 * step % 89 / 89
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    page.wait_for_timeout(100)
    return page.evaluate("hovers")


def change(page: Page, name: str, event: str, count: int) -> list[float]:
    """Milliseconds from each of 40 changes of the snapshot or the layer to its maps."""
    script = f"""(index) => timeUntil(() => convit.state.{name} === index, () => {{
        const control = document.querySelector(".{name}");
        control.value = index;
        control.dispatchEvent(new Event("{event}"));
    }})"""
    return [page.evaluate(script, step % count) for step in range(1, 41)]


def pin(page: Page) -> list[float]:
    """Milliseconds from each of 40 clicks that pin all gates, to position or to content, to the prediction."""
    script = """(gate) => timeUntil(() => convit.state.gates.get("0,0") === gate && convit.state.recomputed,
        () => document.querySelector(`[data-scope="model"][data-pin="${gate}"]`).click())"""
    return [page.evaluate(script, step % 2) for step in range(1, 41)]


def upload(page: Page) -> list[float]:
    """Milliseconds from dropping each of ten images of 12 megapixels on the page to its maps."""
    script = """(data) => {
        const dataTransfer = new DataTransfer(), { image } = convit.state;
        const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
        dataTransfer.items.add(new File([bytes], "noise.jpg"));
        return timeUntil(() => convit.state.image !== image,
            () => document.body.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true })));
    }"""
    return [page.evaluate(script, noise_jpeg(4000, 3000)) for _ in range(10)]


def noise_jpeg(width: int, height: int) -> str:
    """A JPEG of smooth random noise, about as detailed as a photo, in base64."""
    noise = Image.effect_noise((width // 8, height // 8), 60).resize((width, height)).convert("RGB")
    return encode_base64(encode_image(noise, "JPEG", quality=90))


def run_client(url: str, seed: int, seconds: float) -> list[float]:
    """Milliseconds of random requests, one per second. Raises RuntimeError if the server responds with an error."""
    config = json.loads(urllib.request.urlopen(f"{url}/config").read())
    component = next(item["id"] for item in config["components"] if item["props"].get("elem_id") == "viewer")

    def call(function: str, **arguments) -> dict:
        data = {"model": "cifar10"} | arguments
        body = {"session_hash": str(seed), "component_id": component, "fn_name": function, "data": data}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/gradio_api/component_server", json.dumps(body).encode(), headers)
        response = json.loads(urllib.request.urlopen(request, timeout=30).read())
        if "error" in response:
            raise RuntimeError(response["error"])
        return response

    rng = random.Random(seed)
    pixels = call("prepare_image", example="cheetah")["pixels"]
    uploads = [noise_jpeg(400, 300) for _ in range(4)]

    def upload_image():
        nonlocal pixels
        pixels = call("prepare_image", file=rng.choice(uploads))["pixels"]
        call("layer_maps", pixels=pixels, layer=0)

    requests = [
        lambda: call("layer_maps", pixels=pixels, layer=rng.randrange(7)),
        lambda: call("recompute", pixels=pixels, layer=0, snapshot=0, gates=[[0.5] * 9] * 7),  # 7 layers of 9 heads
        upload_image,
    ]
    samples, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        duration = time_calls(rng.choice(requests))
        samples.append(1000 * duration)
        time.sleep(max(1 - duration, 0))
    return samples


def load_test(server: subprocess.Popen, url: str, seconds: float) -> tuple[list[float], float]:
    """Milliseconds of the requests of CLIENTS concurrent clients, and then the resident memory of the server in MiB."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        clients = pool.map(lambda seed: run_client(url, seed, seconds), range(CLIENTS))
        samples = [sample for client_samples in clients for sample in client_samples]
    kib = subprocess.check_output(["ps", "-o", "rss=", "-p", str(server.pid)])
    return samples, int(kib) / 1024


def main():
    parser = benchmark_parser("viewer", __doc__)
    parser.add_argument("--seconds", type=float, default=60, help="duration of the load test (default: %(default)s)")
    args = parser.parse_args()
    header = provenance(torch.device("cpu"))
    server, url = start_server()
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--disable-gpu"])
            load_times = [1000 * time_calls(lambda: open_page(browser, url)) for _ in range(5)]
            page = open_page(browser, f"{url}/#model=cifar10")
            measured = {  # name: (samples, target), in ms
                "page load to first maps": (load_times, 2000),
                "hover to repaint, with the wait for a frame (up to 16.7)": (hover(page), 16),
                "change snapshot": (change(page, "snapshot", "input", 5), 100),
                "change layer": (change(page, "layer", "change", 7), 100),
                "upload to maps, 12 megapixels": (upload(page), 500),
                "pin all gates to prediction": (pin(page), 200),
            }
            page = open_page(browser, f"{url}/#epoch=24")  # the last snapshot of the first model
            page.screenshot(path=args.out / "viewer.png")
            versions = {"chromium": browser.version, "gradio": gradio.__version__, "cores": os.cpu_count()}
            browser.close()
        _, before = load_test(server, url, 10)  # fills the caches
        samples, after = load_test(server, url, args.seconds)
        measured[f"{CLIENTS} clients, one request per second each"] = (samples, 1000)
    finally:
        server.terminate()

    lines = ["| ms | median | 95th percentile (n < 20: maximum) | target | n |", "|---|---|---|---|---|"]
    for name, (samples, target) in measured.items():
        count = len(samples)
        high = statistics.quantiles(samples, n=20)[-1] if count >= 20 else max(samples)  # do not extrapolate
        lines.append(f"| {name} | {statistics.median(samples):.1f} | {high:.1f} | {target} | {count} |")
    lines.append(f"\nNo request failed. The server used {before:.0f} MiB after 10 s of {CLIENTS} clients and "
                 f"{after:.0f} MiB after {args.seconds:.0f} s more.\n")  # fmt: skip
    milliseconds = {name: [round(sample, 2) for sample in samples] for name, (samples, _) in measured.items()}
    results = {"milliseconds": milliseconds, "mebibytes": {"before": before, "after": after}}
    write_results(args.out, "viewer", header | versions, "\n".join(lines), results)


if __name__ == "__main__":
    main()
