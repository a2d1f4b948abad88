"""The page without a server, in a browser, from a plain file server under a sub-path."""

import functools
import http.server
import threading

import pytest
from conftest import open_page

from viewer import publish
from viewer.examples import load_examples, open_demos


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def models():
    return open_demos()


@pytest.fixture(scope="module")
def site(models, tmp_path_factory):
    """The URL of a page with one image per model."""
    root = tmp_path_factory.mktemp("host")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(publish, "load_examples", lambda model: dict([*load_examples(model).items()][:1]))
        publish.publish(models, root / "some" / "path")
    handler = functools.partial(QuietHandler, directory=root)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/some/path/"
    server.shutdown()


def shown_predictions(page) -> list:
    return page.evaluate(
        "(convit.state.recomputed ?? { predictions: convit.state.maps.predictions.at(-1) }).predictions"
    )


def test_page_works_without_a_server(browser, site, models):
    for key, model in models.items():
        name, example = next(iter(load_examples(model).items()))
        pixels, last = model.prepare_image(example.data)["pixels"], len(model.epochs) - 1
        with open_page(browser, f"{site}#model={key}&image={name}&epoch={model.epochs[last]}&layer=2") as page:
            assert page.evaluate("convit.state.snapshot") == last
            answer = model.layer_maps(pixels, 1)
            assert page.evaluate("convit.state.maps.peaks") == answer["peaks"]
            assert shown_predictions(page) == [list(row) for row in answer["predictions"][last]]
            for pin in (1, 0):
                page.locator(f"[data-scope=model][data-pin='{pin}']").click()
                page.wait_for_function(f"convit.state.recomputed && convit.state.gates.get('0,0') === {pin}")
                gates = [heads and [pin] * len(heads) for heads in model.describe()["gate"][last]]
                expected = model.recompute(pixels, 1, last, gates)["predictions"]
                assert shown_predictions(page) == [list(row) for row in expected]
            page.locator("[data-scope=layer][data-pin='1']").click()
            page.wait_for_function("document.querySelector('.error').textContent.includes('python app.py')")


def test_published_page_is_small(models, tmp_path):
    """GitHub Pages and a visitor's first load: only one image's maps are counted, times the number of images."""
    inspector = next(iter(models.values()))
    name, example = next(iter(load_examples(inspector).items()))
    size = sum(len(publish.encode(answer)) for answer in publish.image_answers(inspector, name, example.data).values())
    assert size * sum(len(load_examples(model)) for model in models.values()) < 25 * 2**20
