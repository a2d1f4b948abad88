"""Watch the heads of a ConViT leave position for content, in the browser.

    python app.py                              opens the run that ships in demo/, on http://127.0.0.1:7860
    python app.py --run runs/cifar             a run of your own, also one that is still training
    python app.py --run runs/a --compare runs/b runs/c      with others' curves beside it
    python app.py --weights convit_tiny        released weights, or a file of weights

Layout and callbacks only: viewer/ computes what is shown (probe.py), trains what a visitor asks for (trainer.py), draws
pictures to keep (figures.py) and holds the page itself (panel/).
"""

import argparse
import atexit
import base64
import functools
import io
import os
import signal
import socket
import sys
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: no outbound request, ever

import gradio as gr
import torch
from gradio.media import get_image
from PIL import Image
from starlette.middleware import Middleware

from pictures import middle, open_picture
from training.patterns import patterns
from viewer.figures import animation, view
from viewer.guard import Guard
from viewer.probe import Probe, data_url, open_run, open_weights, story
from viewer.trainer import Trainer

HERE = Path(__file__).parent
PANEL = HERE / "viewer" / "panel"
SCRIPTS = ["maps.js", "charts.js", "heads.js", "story.js", "kernel.js", "train.js", "controls.js", "main.js"]
EXAMPLES = {"cheetah": "cheetah1.jpg", "lion": "lion.jpg", "bus": "bus.png", "tower": "tower.jpg"}  # ship inside Gradio
PAGE_CSS = """.gradio-container { overflow: visible !important; }
@media (max-width: 700px) { .gradio-container .main { padding: 8px !important; } }"""
REFUSED = "The page and its server do not understand each other; please reload the page."


def build(probe: Probe, compare: list[Path] = ()) -> gr.Blocks:
    """The page for a model, with the curves of other runs beside its own. Raises ValueError for runs without any."""
    names = [probe.name, *(run.name for run in compare)]
    longer = {run: f"{run.parent.name}/{run.name}" for run in compare}  # tells runs of one name apart
    others = [story(run, run.name if names.count(run.name) == 1 else longer[run]) for run in compare]
    if None in others:
        raise ValueError(f"{compare[others.index(None)]} holds no metrics.jsonl; give run folders with --compare")
    trainer, trained = Trainer(), {}
    atexit.register(trainer.close)

    def probe_of(asked: dict) -> Probe:
        """The model that a visitor looks at: the page's own, or the one that they have trained here."""
        for gone in [name for name, one in list(trained.items()) if not one.run.exists()]:
            trained.pop(gone, None)
        visitor = asked["run"]
        if visitor == "":
            return probe
        run = trainer.run(visitor)
        if not run.exists():
            raise ValueError("What was trained here is no longer kept; please choose the other model.")
        return trained.get(visitor) or trained.setdefault(visitor, open_run(run, "trained here"))

    def describe(asked: dict) -> dict:
        chosen = probe_of(asked)
        chosen.refresh()
        begin = [{"name": name, "thumb": thumb(file)} for name, file in examples(chosen.flags.get("dataset")).items()]
        return chosen.description() | {"others": [] if asked["run"] else others, "examples": begin}

    def choose(asked: dict) -> dict:
        chosen = probe_of(asked)
        if "example" in asked:
            return chosen.picture(examples(chosen.flags.get("dataset"))[asked["example"]])
        return chosen.picture(base64.b64decode(asked["file"], validate=True))

    def read_layer(asked: dict) -> dict:
        return probe_of(asked).read_layer(asked["pixels"], asked["layer"])

    def what_if(asked: dict) -> dict:
        return probe_of(asked).what_if(asked["pixels"], asked["layer"], asked["checkpoint"], asked["gates"])

    def export(asked: dict) -> dict:
        chosen, layer, query = probe_of(asked), asked["layer"], asked["query"]
        picture = {"display": asked["display"], "pixels": asked["pixels"]}
        if asked["moving"]:
            return {"file": data_url(animation(chosen, picture, layer, query), "image/gif")}
        other = asked["gates"], asked["recomputed"]
        return {"file": data_url(view(chosen, picture, layer, asked["checkpoint"], query, *other), "image/png")}

    def train(asked: dict) -> dict:
        if asked["wish"] == "start":
            trained.pop(asked["visitor"], None)  # an earlier run of theirs
        return trainer.ask(asked["visitor"], asked["wish"])

    def heads(picture: str, layer: int, checkpoint: int = -1, row: int = 0, column: int = 0) -> list[dict]:
        """What every head of a layer looks at from one patch of a picture (a file in base64).

        Layers are counted from 1 as on the page, checkpoints, rows and columns from 0; checkpoint -1 is the last.
        """
        (rows, columns), count = probe.config.grid, len(probe.epochs)
        ranges = {"layer": (layer, 1, len(probe.layers)), "checkpoint": (checkpoint, -count, count - 1),
                  "row": (row, 0, rows - 1), "column": (column, 0, columns - 1)}  # fmt: skip
        for name, (value, lowest, highest) in ranges.items():
            if not (isinstance(value, int) and lowest <= value <= highest):
                raise gr.Error(f"expected a {name} from {lowest} to {highest}", print_exception=False)
        try:
            pixels = probe.picture(base64.b64decode(picture, validate=True))["pixels"]
            return probe.heads(pixels, layer - 1, checkpoint % count, row * columns + column)
        except ValueError as problem:
            raise gr.Error(str(problem), print_exception=False) from None

    with gr.Blocks(title="ConViT: watch heads escape", fill_width=True) as page:
        gr.HTML(
            html_template=(PANEL / "panel.html").read_text(),
            css_template=(PANEL / "panel.css").read_text(),
            js_on_load="\n".join((PANEL / name).read_text() for name in SCRIPTS),
            server_functions=[answered(one) for one in (describe, choose, read_layer, what_if, export, train)],
            apply_default_css=False,
            elem_id="panel",
        )
        gr.api(heads, api_name="heads", concurrency_limit=2)
    return page


def answered(function):
    """A server function whose errors are words for the visitor, whatever they may have sent."""

    @functools.wraps(function)
    def answer(asked: dict) -> dict:
        try:
            return function(asked)
        except ValueError as problem:
            return {"error": str(problem)}
        except (KeyError, TypeError, IndexError, AttributeError, FileNotFoundError):
            return {"error": REFUSED}

    return answer


@functools.cache
def examples(dataset: str | None) -> dict[str, bytes]:
    """Pictures to begin with, by name: those that ship inside Gradio, or patterns where a model has learned these."""
    if dataset == "patterns":
        return {f"pattern {index}": png(image) for index, image in enumerate(patterns(4, "test")[0], 1)}
    return {name: Path(get_image(file)).read_bytes() for name, file in EXAMPLES.items()}


def png(pixels: torch.Tensor) -> bytes:
    """A picture (uint8, 3 H W) as a file."""
    stream = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(stream, "PNG")
    return stream.getvalue()


@functools.lru_cache(maxsize=16)
def thumb(file: bytes) -> str:
    """A small version of a picture, as the address of an <img>."""
    stream = io.BytesIO()
    middle(open_picture(io.BytesIO(file)), 96, 96).save(stream, "JPEG", quality=85)
    return data_url(stream.getvalue(), "image/jpeg")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", default=HERE / "demo", type=Path, help="run folder of train_cifar.py (default: demo/)")
    what.add_argument("--weights", metavar="NAME|FILE", help="released weights by name, or a file of weights, instead")
    parser.add_argument(
        "--compare", nargs="+", type=Path, default=[], metavar="RUN", help="runs to show curves of, too"
    )
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # a Hugging Face Space sets this
    parser.add_argument("--host", default=host, help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    given = parser.parse_args()
    torch.set_num_threads(2)
    try:
        page = build(open_weights(given.weights) if given.weights else open_run(given.run), given.compare)
    except (OSError, ValueError) as problem:
        sys.exit(f"app.py: {problem}")
    try:
        socket.create_server((given.host, given.port or 0)).close()
    except (OSError, OverflowError) as problem:
        sys.exit(f"app.py: cannot listen on --host {given.host} --port {given.port or 'any'}: {problem}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that what visitors train ends, too
    # fmt: off
    page.launch(server_name=given.host, server_port=given.port, footer_links=[], quiet=True, run_history=False,
                css=PAGE_CSS, share=False, ssr_mode=False, prevent_thread_lock=True,
                app_kwargs={"middleware": [Middleware(Guard)]})
    # fmt: on
    print(f"The page is at {page.local_url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
