"""The page without a server, in a browser, from a plain file server under a sub-path."""

import pytest
from conftest import file_server, open_page

from viewer import publish as script
from viewer.inspector import open_demos
from viewer.publish import publish


@pytest.fixture(scope="module")
def models():
    """The demos, each with the first of its images."""
    models = open_demos()
    for model in models.values():
        name = next(iter(model.examples))
        model.examples = {name: model.examples[name]}
    return models


@pytest.fixture(scope="module")
def folder(models, tmp_path_factory):
    """The page of these models."""
    folder = tmp_path_factory.mktemp("host") / "some" / "path"
    publish(models, folder)
    return folder


@pytest.fixture(scope="module")
def site(folder):
    """Its URL."""
    with file_server(folder.parent.parent) as url:
        yield f"{url}/some/path/"


def shown_predictions(page) -> list:
    return page.evaluate("(convit.state.recomputed ?? convit.state.maps.at(-1)).predictions")


def test_page_works_without_a_server(browser, site, models):
    for key, model in models.items():
        (name, example), last = *model.examples.items(), len(model.models) - 1
        pixels = model.prepare_image(example.data)["pixels"]
        with open_page(browser, f"{site}#model={key}&image={name}&epoch={model.models[last].epoch}&layer=2") as page:
            assert page.evaluate("convit.state.snapshot") == last
            answer = model.layer_maps(pixels, 1)
            assert page.evaluate("convit.state.maps.map(({ peaks }) => peaks)") == [maps["peaks"] for maps in answer]
            assert shown_predictions(page) == [list(row) for row in answer[last]["predictions"]]
            for pin in (1, 0):
                page.locator(f"[data-scope=model][data-pin='{pin}']").click()
                page.wait_for_function(f"convit.state.recomputed && convit.state.gates.get('0,0') === {pin}")
                gates = [heads and [pin] * len(heads) for heads in model.describe()["gate"][last]]
                expected = model.recompute(pixels, 1, last, gates)["predictions"]
                assert shown_predictions(page) == [list(row) for row in expected]
            page.locator("[data-scope=layer][data-pin='1']").click()
            page.wait_for_function("document.querySelector('.error').textContent.includes('python app.py')")


def test_published_page_is_small(models, folder):
    """GitHub Pages and a visitor's first load."""
    for key in models:
        assert sum(file.stat().st_size for file in (folder / "data" / key).iterdir()) < 2 * 2**20  # of one image


def test_demos_of_other_code_are_one_sentence(monkeypatch, tmp_path, run_script):
    def fail():
        raise ValueError("epoch_0000.pt does not match this model")

    monkeypatch.setattr(script, "open_demos", fail)
    assert run_script(script, tmp_path)[0] == "viewer.publish: epoch_0000.pt does not match this model"


def test_page_without_a_server_offers_only_what_it_can_do(browser, site):
    with open_page(browser, site) as page:
        for text in ("Upload", "sent only to this page", "Save view", "Save training", "Train a tiny model"):
            found = page.get_by_text(text)
            assert found.count() == 1 and found.is_hidden()
        assert "python app.py" in page.get_by_text("To see your own images").inner_text()
        page.locator("[data-scope=model][data-pin='1']").click()  # in epoch 0
        page.wait_for_selector("text=gates can be pinned only in the last epoch")
        for scheme, is_dark in (("light", False), ("dark", True)):
            page.emulate_media(color_scheme=scheme)
            color = page.evaluate("getComputedStyle(document.querySelector('.viewer')).color")
            assert (int(color.removeprefix("rgb(").split(",")[0]) > 128) is is_dark
