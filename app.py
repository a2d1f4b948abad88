"""Interactive viewer: watch the heads of a ConViT escape locality.

    python app.py                            opens the models in demo/ on http://127.0.0.1:7860
    python app.py --run runs/cifar           opens a run folder, which may still be training
    python app.py --run runs/a runs/b        opens both, and plots the curves of each alongside those of the other
    python app.py --weights convit_tiny      opens a released model, a weights file, or a URL

This file connects the page (viewer/web/) to what it shows (viewer/inspector.py), to the training runs that users start
(viewer/sessions.py), and to the figures that they save (viewer/export.py).
"""

import argparse
import atexit
import base64
import contextlib
import ctypes
import functools
import gc
import itertools
import os
import signal
import socket
import sys
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: no outbound requests
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends imports without a traceback

import gradio as gr
import torch
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.routing import Mount
from starlette.staticfiles import StaticFiles

from analysis import check_index
from images import decode_size
from predict import predict
from training.config import Parser
from viewer.inspector import AttentionInspector, open_demos, open_run, open_weights, worker
from viewer.limits import data_url, limit_requests, load_upload
from viewer.sessions import MAX_KEPT_RUNS, TrainingQueue


class PageFiles(StaticFiles):
    """Files that browsers revalidate at every visit: after an update, old modules would not fit the new page."""

    def file_response(self, *args, **kwargs) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


WEB = Path(__file__).parent / "viewer" / "web"
M_MMAP_THRESHOLD = -3  # in malloc.h
LAUNCH_OPTIONS = {
    "max_threads": 200,  # most wait for the worker thread; page files keep the default pool
    "footer_links": [],
    "app_kwargs": {"middleware": [Middleware(limit_requests)], "routes": [Mount("/web", PageFiles(directory=WEB))]},
    "prevent_thread_lock": True,
    "quiet": True,
    "run_history": False,
    "share": False,
    "ssr_mode": False,
    "state_session_capacity": 20,  # Gradio keeps the last request of each
}


def build_page(models: dict[str, AttentionInspector], compare: bool = False) -> gr.Blocks:
    """The page for some models, by key; the first one opens. With `compare`, it plots their curves together."""
    first, training_queue = next(iter(models)), TrainingQueue()
    atexit.register(training_queue.close)

    @functools.lru_cache(MAX_KEPT_RUNS)
    def open_trained(run_dir: Path) -> AttentionInspector:
        gc.collect()  # models that the cache has dropped are in reference cycles
        return open_run(run_dir, "your tiny model")

    def select(key: str) -> AttentionInspector:
        """The model of a key ("" for the first one), or the one that a session has trained."""
        if key == "" or key in models:
            return models[key or first]
        if run_dir := training_queue.run_dirs.get(key):
            return open_trained(run_dir)
        raise ValueError("There is no such model, or its training run has expired; please select another model.")

    def newest(key: str) -> AttentionInspector:
        """The same, with what its run has written since."""
        inspector = select(key).refresh()
        if key == "" or key in models:
            models[key or first] = inspector
        return inspector

    # the functions that the page's JavaScript calls, with the fields of a JSON object as arguments
    def describe(model: str) -> dict:
        selected = newest(model)
        others = [other.curves() for other in models.values() if compare and other is not selected]
        return selected.describe() | {
            "key": model or first,
            "started": selected.started,  # changes if a new run takes the folder
            "models": [{"key": key, "name": other.name} for key, other in models.items()],
            "other_curves": [curves for curves in others if curves],
        }

    def prepare_image(model: str, example: str = "", file: str = "") -> dict:
        data = select(model).examples[example].data if example else base64.b64decode(file, validate=True)
        return select(model).prepare_image(data)

    def layer_maps(model: str, pixels: str, layer: int) -> list[dict]:
        return select(model).layer_maps(pixels, layer)

    def recompute(model: str, pixels: str, layer: int, snapshot: int, gates: list) -> dict:
        return select(model).recompute(pixels, layer, snapshot, gates)

    def export(model: str, animated: bool, **view) -> dict:
        from viewer.export import export_view  # matplotlib takes a second and 20 MB

        return {"file": data_url(export_view(select(model), view, animated), "gif" if animated else "png")}

    def train(model: str, action: str) -> dict:
        return training_queue.handle(model, action)

    # the functions that Python clients call; images are files in base64, `model` is a key as in the page's URL
    @api_errors()
    def heads(image: str, layer: int, snapshot: int = -1, row: int = 0, column: int = 0, model: str = "") -> list[dict]:
        """Gate and attention maps of every head of a layer, for one query patch of an image.

        Layers count from 1, as on the page; snapshots, rows, and columns from 0. Snapshot -1 is the last one.
        """
        inspector = newest(model)
        (rows, columns), count = inspector.config.grid, len(inspector.models)
        check_index("snapshot", snapshot, -count, count - 1)
        check_index("row", row, 0, rows - 1)
        check_index("column", column, 0, columns - 1)
        pixels = inspector.prepare_image(base64.b64decode(image, validate=True))["pixels"]
        return inspector.head_maps(pixels, layer - 1, snapshot, row * columns + column)

    @api_errors()
    def classes(image: str, top: int = 3, model: str = "") -> list[tuple[str, float]]:
        """The most likely classes of an image and their probabilities, the best first."""
        last = newest(model).models[-1]
        upload = load_upload(base64.b64decode(image, validate=True), decode_size(*last.config.image_shape))
        return worker.submit(predict, last, upload, top).result()

    with gr.Blocks(title="ConViT: watch heads escape locality", fill_width=True) as page:
        gr.HTML(
            html_template=(WEB / "page.html").read_text(),
            css_template=(WEB / "page.css").read_text(),
            js_on_load='import(new URL("web/main.js", document.baseURI)).then((page) => page.start(server))'
            '.catch((error) => { element.querySelector(".error").textContent = "Please reload the page.";'
            "throw error; });",
            server_functions=list(map(json_errors, (describe, prepare_image, layer_maps, recompute, export, train))),
            apply_default_css=False,
            elem_id="viewer",
        )
        gr.api(heads, api_name="heads", concurrency_limit=2)
        gr.api(classes, api_name="predict", concurrency_limit=2)
    for block in page.blocks.values():  # else, Gradio downloads the URLs that requests contain
        block.async_move_resource_to_block_cache = refuse_file
    return page


async def refuse_file(_):
    raise gr.Error("an image must be a file in base64", print_exception=False)


def open_models(runs: list[Path]) -> dict[str, AttentionInspector]:
    """Run folders by name; where names repeat, they include parent folders. Raises OSError or ValueError."""
    parts = {run.resolve().parts for run in runs}

    def key_of(run: Path) -> str:
        endings = (run.resolve().parts[-count:] for count in itertools.count(1))
        return "/".join(next(key for key in endings if sum(other[-len(key) :] == key for other in parts) == 1))

    return {key_of(run): open_run(run, key_of(run)) for run in runs}


def json_errors(function):
    """Return a server function's errors to the page as a message for the user."""

    def call(request) -> dict | list:
        try:
            with api_errors("Invalid request. Please reload the page."):
                return function(**request)
        except gr.Error as error:
            return {"error": error.message}

    call.__name__ = function.__name__  # what the page calls it
    return call


@contextlib.contextmanager
def api_errors(invalid: str = "invalid arguments"):
    """Raise a function's errors as those that Gradio shows to its clients; requests may contain anything."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from None
    except (KeyError, TypeError, IndexError, AttributeError, OverflowError, FileNotFoundError):
        raise gr.Error(invalid, print_exception=False) from None


def main():
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # while loading: removes a partial download
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--run", nargs="+", type=Path, metavar="FOLDER", help="run folders (default: those in demo/)")
    model.add_argument(
        "--weights", metavar="NAME|FILE|URL", help="released model, weights file, or URL to open instead"
    )
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # set by Hugging Face Spaces
    parser.add_argument("--host", default=host, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, help="port to listen on (default: first free port from 7860)")
    args = parser.parse_or_exit()
    torch.set_num_threads(2)
    if sys.platform == "linux":  # else, freed buffers of less than 32 MB stay in a heap, which fragments and grows
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**17)
    try:
        if args.weights:
            models = {"weights": open_weights(args.weights)}
        elif args.run:
            models = open_models(args.run)
        else:
            models = open_demos()
    except (OSError, ValueError) as error:
        sys.exit(f"app.py: {error}")
    page = build_page(models, compare=bool(args.run))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # both signals then run atexit, which stops training
    try:
        socket.create_server((args.host, args.port or 0)).close()
        page.launch(server_name=args.host, server_port=args.port or None, **LAUNCH_OPTIONS)
    except (OSError, OverflowError) as error:
        sys.exit(f"app.py: cannot listen on --host {args.host} --port {args.port or 'any'}: {error}")
    print(f"Viewer running at {page.local_url} (press Ctrl-C to stop)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
