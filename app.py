"""Watch the heads of a ConViT leave position for content, in the browser.

    python app.py                        opens the run that ships in demo/, on http://127.0.0.1:7860
    python app.py --run runs/cifar       a run of your own

Layout and callbacks only: viewer/ computes what is shown (probe.py) and draws it (panel.*).
"""

import argparse
import json
import os
import socket
import sys
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import: no outbound request, ever

import gradio as gr
import torch
from gradio.media import get_image

from viewer.probe import Probe

HERE = Path(__file__).parent
EXAMPLES = ["cheetah1.jpg", "lion.jpg", "bus.png", "tower.jpg"]  # they ship inside Gradio
INTRODUCTION = """# Watch attention heads leave position for content
Every head of a ConViT mixes a **position** map, the same for all pictures, with a **content** map, by a learned
**gate**. It starts as one tap of a convolution. Click a patch, move through training, choose another picture."""


def build(run: Path) -> gr.Blocks:
    """The page for a run folder. Raises FileNotFoundError or ValueError where there is nothing to show."""
    probe = Probe(run)
    examples = [get_image(name) for name in EXAMPLES]

    def read_layer(asked: dict) -> dict:
        return probe.read_layer(asked["pixels"], asked["layer"])

    def show(file: str | None):
        if file is None:
            return gr.skip(), gr.skip()
        try:
            return json.dumps(probe.picture(file)), gr.skip()
        except ValueError as problem:
            gr.Warning(str(problem))
            return gr.skip(), None  # the refused file leaves the box

    with gr.Blocks(title="ConViT: watch heads escape", fill_width=True) as page:
        gr.Markdown(INTRODUCTION)
        panel = gr.HTML(
            value=json.dumps(probe.picture(examples[0])),
            html_template=(HERE / "viewer/panel.html").read_text(),
            css_template=(HERE / "viewer/panel.css").read_text(),
            js_on_load=(HERE / "viewer/panel.js").read_text(),
            server_functions=[read_layer],
            run=probe.description(),
            elem_id="panel",
        )
        with gr.Row():
            upload = gr.Image(
                sources=["upload", "clipboard"], type="filepath", label="Your own picture", height=220, elem_id="upload"
            )
            # The file as it is, not what Gradio makes of it: open_picture reads more kinds, and says what is wrong.
            upload.preprocess = lambda file: file and file.path
            gr.Examples([[file] for file in examples], upload, label="Or one of these", elem_id="examples")
        # fmt: off
        upload.change(show, upload, [panel, upload],
                      show_progress="hidden", trigger_mode="multiple", api_visibility="private")
        # fmt: on
    return page


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--run", default=HERE / "demo", type=Path, help="run folder of train_cifar.py (default: demo/)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    given = parser.parse_args()
    torch.set_num_threads(2)
    try:
        page = build(given.run)
    except (FileNotFoundError, ValueError) as problem:
        sys.exit(f"app.py: {problem}")
    try:
        socket.create_server((given.host, given.port or 0)).close()
    except (OSError, OverflowError) as problem:
        sys.exit(f"app.py: cannot listen on --host {given.host} --port {given.port or 'any'}: {problem}")
    page.launch(server_name=given.host, server_port=given.port, footer_links=[], quiet=True, prevent_thread_lock=True)
    print(f"The page is at {page.local_url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
