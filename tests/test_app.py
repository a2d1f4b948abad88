"""End-to-end tests of the page in Chromium."""

import base64
import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT, assert_maps, open_page, page_map, serving
from PIL import Image

from analysis import mean_distance
from convit_min import ConViT, ConViTConfig
from images import normalize
from weights import load_weights


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("server")) as url:
        yield url


@pytest.fixture(scope="module")
def shared_page(browser, server):
    """One page for most tests, since it takes more than a second to load."""
    with open_page(browser, server) as page:
        page.clock.install()  # so that tests need not wait
        yield page


@pytest.fixture
def page(shared_page):
    """Layer 5 of the model of CIFAR-10, before training."""
    show(shared_page, "model=cifar10&layer=5&head=1")
    return shared_page


@pytest.fixture
def own_page(browser, server):
    """A page with a session of its own."""
    with open_page(browser, server + "/#model=cifar10&layer=5") as page:
        yield page


def show(page, view: str):
    """Show the view of a URL as if the page had just been opened with it."""
    page.mouse.move(0, 0)
    script = """view => {
        for (const option of document.querySelectorAll(".options input")) {
            option.value = option.defaultValue;
            option.checked = option.defaultChecked;
        }
        convit.state.maps = null;
        location.hash = `map=mixed&tab=watch&${view}&opened=${performance.now()}`;
    }"""
    page.evaluate(script, view)
    page.wait_for_function("convit.state.maps")


def play_until(page, condition: str):
    """Play the training, without waiting, until the page meets a condition in JavaScript."""
    page.locator(".play").click()
    for _ in range(int(page.locator(".snapshot").get_attribute("max"))):
        if page.evaluate(condition):
            return
        page.clock.run_for(1200)  # of a snapshot
    assert page.evaluate(condition)


def maps(page, kind="mixed") -> list[str]:
    """Pixels of one kind of map, for every head in order."""
    page.locator(f".kinds [data-kind={kind}]").click()
    pixels = page.evaluate("""[...document.querySelectorAll("[data-head]")]
        .sort((a, b) => a.dataset.head - b.dataset.head).map(card => { const canvas = card.querySelector("canvas");
            return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.join(); })""")
    page.locator(".kinds [data-kind=mixed]").click()
    return pixels


def gates(page) -> list[float]:
    return page.evaluate("""[...document.querySelectorAll("[data-head]")]
        .sort((a, b) => a.dataset.head - b.dataset.head).map(card => Number(card.dataset.gate))""")


def brightest(pixels: str) -> int:
    return int(np.array(pixels.split(","), dtype=int)[3::4].argmax())  # opacity


def image(page) -> str:
    """What the large image shows: its background, overlay, and lines."""
    return page.evaluate("""(() => { const image = document.querySelector(".image");
        return [getComputedStyle(image).backgroundImage, image.querySelector("canvas").toDataURL(),
            image.querySelector(".lines").innerHTML].join(); })()""")


def canvas_pixels(page, selector: str) -> np.ndarray:
    """Content of a canvas: H W 3."""
    url = page.evaluate("selector => document.querySelector(selector).toDataURL()", selector)
    return np.array(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")).astype(int)


def patch(page, row: int, column: int) -> dict:
    """Center of a patch of an 8 x 8 grid, in pixels of the displayed image."""
    box = page.locator(".image").bounding_box()
    return {"x": (column + 0.5) * box["width"] / 8, "y": (row + 0.5) * box["height"] / 8}


def query(page) -> int:
    return page.evaluate("convit.state.query")


def show_last_snapshot(page):
    page.locator(".snapshot").fill(page.locator(".snapshot").get_attribute("max"))


def test_initial_view_shows_nine_kernel_taps(page):
    assert gates(page) == [0.731] * 9
    assert page.locator(".epoch").inner_text() == "0"
    assert "every head of layer 5 looks mostly at neighbors" in page.locator(".caption").inner_text()
    centers = [brightest(pixels) for pixels in maps(page, "position")]
    assert centers == [(4 + head % 3 - 1) * 8 + 4 + head // 3 - 1 for head in range(9)]
    cards = page.eval_on_selector_all("[data-head]", "cards => cards.map(card => Number(card.dataset.head))")
    assert cards == [0, 3, 6, 1, 4, 7, 2, 5, 8]  # kernel layout: rows look up, at the query, down
    assert page.locator(".head .arrow").all_inner_texts() == list("↖↑↗←•→↙↓↘")
    page.mouse.move(0, 0)
    with Image.open(io.BytesIO(page.locator(".image").screenshot())) as shown:
        colors = np.asarray(shown.convert("RGB")).astype(int)
    assert colors.std() > 20  # a photo, and on it the orange of position, in lines from the framed patch
    assert page.locator(".lines line").count() > 4 and (colors[..., 0] - colors[..., 2] > 150).any()


def test_query_follows_hover_click_lock_and_arrow_keys(page):
    before = maps(page)
    page.locator(".image").hover(position=patch(page, 2, 6))
    assert query(page) == 22 and brightest(maps(page, "position")[4]) == 22
    assert all(old != new for old, new in zip(before, maps(page), strict=True))
    page.locator(".image").click(position=patch(page, 2, 5))
    page.locator(".image").hover(position=patch(page, 7, 7))
    assert query(page) == 21  # locked
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Control+ArrowLeft")  # of the browser
    assert query(page) == 28 and brightest(maps(page, "position")[4]) == 28
    page.locator(".image").click(position=patch(page, 3, 4))  # a second click unlocks
    page.locator(".image").hover(position=patch(page, 0, 0))
    assert query(page) == 0
    page.locator(".image").press("Enter")
    page.locator(".image").hover(position=patch(page, 7, 7))
    assert query(page) == 0  # locked
    page.locator(".image").press("Enter")
    page.locator(".image").hover(position=patch(page, 7, 6))
    assert query(page) == 62


def test_play_step_and_reset_change_gates_and_maps(page):
    start, before = gates(page), maps(page)
    last = int(page.locator(".snapshot").get_attribute("max"))
    page.locator(".step").click()
    assert gates(page) != start and page.locator(".epoch").inner_text() == "1"
    page.locator(".snapshot").fill(str(last - 1))
    play_until(page, f"convit.state.snapshot === {last}")
    page.clock.run_for(2400)
    assert page.evaluate("convit.state.snapshot") == last  # playback has stopped
    assert "Play" in page.locator(".play").inner_text()
    assert max(gates(page)) - min(gates(page)) > 0.1 and maps(page) != before  # training has separated the heads
    assert "head 5 of layer 5 attends more by content" in page.locator(".caption").inner_text()
    assert page.locator(".accuracy").inner_text() == "accuracy 84.1%"
    for row in page.locator(".prediction > div").all():
        filled = row.locator(".fill").bounding_box()["width"] / row.locator(".track").bounding_box()["width"]
        assert filled == pytest.approx(float(row.locator("span").last.inner_text().rstrip("%")) / 100, abs=0.02)
    page.locator(".reset").click()
    assert gates(page) == start and maps(page) == before


def test_selected_head_is_highlighted_everywhere(page):
    show_last_snapshot(page)
    image_before, content_before = image(page), maps(page, "content")
    page.locator("[data-layer='1'][data-cell='4']").click()
    page.wait_for_function("document.querySelector('.layer').value === '1'")
    page.wait_for_function("convit.state.head === 4")
    assert maps(page, "content") != content_before  # another layer
    assert page.locator(".head.selected").get_attribute("data-head") == "4"
    assert page.locator(".run-charts polyline.selected").get_attribute("data-curve") == "4"
    assert page.locator(".gate-heatmap .selected").get_attribute("data-cell") == "4"
    assert image(page) != image_before  # overlaid with its map
    page.locator("[data-head='2']").hover()
    assert page.locator(".run-charts polyline.selected").get_attribute("data-curve") == "2"
    page.locator("[data-head='3'] .select-head").click()
    assert page.locator(".hero-title").inner_text().endswith("layer 2, head 4")


def test_scale_overlay_and_mass_options(page):
    show_last_snapshot(page)
    page.clock.run_for(700)  # the overlay moves for 600 ms
    maps_before, image_before = maps(page), image(page)
    page.locator(".options summary").click()
    page.locator(".same-scale").check()
    assert maps(page) != maps_before
    page.locator(".same-scale").uncheck()
    page.locator(".opacity").fill("0")
    without_overlay = image(page)
    assert without_overlay != image_before
    page.locator(".show-input").check()
    assert image(page) != without_overlay
    page.locator(".mass").fill("0.5")
    values = page_map(page, 3, query(page), "mixed")
    alpha = np.array(maps(page)[3].split(","), dtype=int).reshape(-1, 4)[:, 3]
    kept = values[alpha > 0]
    assert kept.sum() >= 0.5 > kept.sum() - kept.min()  # as few patches as possible hold half
    assert kept.min() > values[alpha == 0].max()


def test_pins_and_sliders_rerun_the_model(page):
    show_last_snapshot(page)
    trained_gates, trained_maps = gates(page), maps(page)
    page.locator("[data-head='4'] input").fill("1")
    page.wait_for_selector(".prediction .before-label")
    assert gates(page)[4] == 1 and maps(page)[4] != trained_maps[4] and maps(page)[3] == trained_maps[3]
    assert maps(page)[4] == maps(page, "position")[4]
    assert "1 gate has been changed by hand" in page.locator(".caption").inner_text()
    page.locator("[data-scope=model][data-pin='0']").click()
    page.wait_for_function("convit.state.recomputed && convit.state.gates.size === 45")
    assert gates(page) == [0] * 9 and "All gates are pinned to content." in page.locator(".caption").inner_text()
    name, after, _, before = page.locator(".prediction > div").first.inner_text().split("\n")
    model, pixels = last_model(), model_input(page)
    with torch.no_grad():
        trained = model(pixels).softmax(1)[0]
        for block in model.blocks[:5]:
            block.attn.gating_param.fill_(-14)
        logits, attention = model(pixels, return_attention=True)
    classes = torch.load(last_file(), weights_only=True)["classes"]
    index = classes.index(name)
    assert float(before.rstrip("%")) == pytest.approx(100 * trained[index].item(), abs=0.6)
    assert float(after.rstrip("%")) == pytest.approx(100 * logits.softmax(1)[0, index].item(), abs=0.6)
    expected = attention[4].content[0, 7, 20]  # changed too: its input depends on the gates of earlier layers
    byte_step = attention[4].content[0, 7].max().item() / 255
    np.testing.assert_allclose(page_map(page, 7, 20, "content"), expected, atol=byte_step)
    with page.expect_response("**/component_server/"):
        page.locator("[data-scope=layer][data-pin='1']").click()
        page.locator("[data-scope=model][data-pin='']").click()  # before the answer arrives
    page.wait_for_timeout(50)
    assert gates(page) == trained_gates and maps(page) == trained_maps
    assert page.locator(".prediction .before-label").count() == 0


def test_opening_view_shows_a_head_that_escapes(shared_page):
    page = shared_page
    show(page, "")  # the first model
    run = ROOT / "demo" / "patterns"
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    layer, head, queries, target = page.evaluate("""(({ layer, head, example, model }) => {
        const { queries, target } = model.examples.find(({ name }) => name === example);
        return [layer, head, queries, target]; })(convit.state)""")
    assert query(page) in queries and len(target) == 4
    gates_of_head = [record["heads"]["gate"][layer][head] for record in metrics]
    assert gates_of_head[0] > 0.7 and gates_of_head[-1] < 0.5
    assert page.locator(".verdict .wrong").count() == 1
    event = next(record["epoch"] for record in metrics if record["heads"]["gate"][layer][head] < 0.5)
    play_until(page, f"document.querySelector('.headline').textContent.startsWith('Epoch {event}: head')")
    assert f"head {head + 1} let" in page.locator(".headline").inner_text()
    page.locator(".play").click()  # pause
    play_until(page, "document.querySelector('.headline').textContent.includes('left its neighbors')")
    assert f"Head {head + 1} of layer {layer + 1}" in page.locator(".headline").inner_text()
    attention = page_map(page, head, query(page), "mixed")[target].sum()
    assert attention > 0.5 and f"{100 * attention:.0f}% of its attention" in page.locator(".details").inner_text()
    assert page.locator(".verdict .correct").count() == 1
    page.locator("[data-scope=model][data-pin='1']").click()
    page.wait_for_selector(".verdict .wrong")
    masked = json.loads((run / "masking.json").read_text())["masked_in_first_layers"]["content"]
    assert f"accuracy is {masked[-1]:.1f}% instead of {masked[0]:.1f}%" in page.locator(".details").inner_text()


def last_file() -> Path:
    return sorted((DEMO / "snapshots").glob("*.pt"))[-1]


def last_model() -> ConViT:
    record = torch.load(last_file(), weights_only=True)
    model = ConViT(ConViTConfig(**record["model_config"])).eval()
    load_weights(model, last_file())
    return model


def model_input(page) -> torch.Tensor:
    """The displayed image, as the model receives it."""
    raw = np.frombuffer(base64.b64decode(page.evaluate("convit.pixels()")), dtype=np.uint8).reshape(32, 32, 3)
    return normalize(torch.tensor(raw).permute(2, 0, 1)[None])


def test_browser_maps_match_the_model(page):
    """JavaScript against HeadAttention, in the last snapshot and GPSA layer."""
    show_last_snapshot(page)
    model = last_model()
    with torch.no_grad():
        attention = model(model_input(page), return_attention=True)[1][model.config.gpsa_layers - 1]
    assert_maps(page, attention, [(0, 0), (4, 27), (8, 63)])
    shown = [float(page.locator(f"[data-head='{head}'] .distance").inner_text()) for head in range(9)]
    np.testing.assert_allclose(shown, mean_distance(attention.mixed, (8, 8)), atol=0.06)


def test_url_restores_the_view(page, browser):
    page.locator("[data-example=lion]").click()
    page.wait_for_function("convit.state.example === 'lion'")
    show_last_snapshot(page)
    page.locator("[data-layer='2'][data-cell='6']").click()
    page.wait_for_function("convit.state.head === 6 && convit.state.layer === 2")
    page.locator(".image").click(position=patch(page, 1, 3))
    page.locator("[data-head='4'] input").fill("0.25")
    page.locator("[data-scope=layer][data-pin='1']").focus()
    page.wait_for_function("location.hash.includes('patch=2,4') && location.hash.includes('gates=3.5:0.25')")
    page.wait_for_selector(".prediction .before-label")
    with open_page(browser, page.url) as other:
        assert gates(other) == gates(page) and gates(other)[4] == 0.25
        assert maps(other) == maps(page) and query(other) == 11
        assert other.locator(".head.selected").get_attribute("data-head") == "6"
        assert other.evaluate("convit.state.example") == "lion"
    show(page, "layer=99&epoch=-3&head=x&patch=9,9&image=<img src=x>&tab=none&map=no&model=cifar10"
               "&gates=9.1:1;1.99:1;1.1:7;1.2:0.5.5;x")  # fmt: skip
    assert page.evaluate("convit.state.gates.size") == 0
    assert gates(page) == [0.731] * 9


def test_a_model_is_shown_as_it_was_left(page):
    for view in ("model=patterns", "model=cifar10"):
        show(page, view)
    show_last_snapshot(page)
    page.locator("[data-head='2'] .select-head").click()
    page.locator("[data-model=patterns]").click()
    page.wait_for_function("convit.state.key === 'patterns' && convit.state.maps")
    assert page.locator(".epoch").inner_text() == "0"
    page.locator("[data-model=cifar10]").click()
    page.wait_for_function("convit.state.key === 'cifar10' && convit.state.maps")
    assert page.locator(".epoch").inner_text() == "30" and page.evaluate("convit.state.head") == 2


def test_failed_switch_of_models_can_be_repeated(own_page):
    """Meanwhile, the controls of the model that was left do nothing."""
    page, requests = own_page, []

    def fail_once(route):
        if '"prepare_image"' in route.request.post_data and not requests:
            requests.append(route.request.post_data)
            return route.abort()
        return route.continue_()

    page.route("**/component_server/", fail_once)
    page.locator("[data-model=patterns]").click()
    page.wait_for_selector("text=The server is not responding; please try again.")
    assert page.locator("[data-model=patterns]").get_attribute("aria-pressed") == "true"
    assert page.evaluate("['.heads', '.gate-heatmap', '.exports'].every(part => document.querySelector(part).inert)")
    page.locator("[data-model=patterns]").click()
    page.wait_for_function("convit.state.maps")
    assert page.evaluate("!document.querySelector('.heads').inert") and page.locator(".error").inner_text() == ""


def test_verdicts_and_facts(page):
    show_last_snapshot(page)
    page.locator("[data-example=cat]").click()
    page.wait_for_selector(".verdict .correct:has-text('cat')")
    page.locator("[data-example=cheetah]").click()
    page.wait_for_selector(".verdict :not(.correct, .wrong):has-text('not one of its classes')")
    facts = page.locator(".facts").inner_text()
    for fact in (
        "9 of 45 heads end",
        "84.1%; with all gates pinned",
        "81.3%, to content 15.2%",
        "20 times the learning rate",
        "One run",
    ):
        assert fact in facts
    assert "Layers 6 to 7 have no gates" in page.locator(".heatmap-summary").inner_text()
    page.locator(".layer").select_option(label="6")
    page.wait_for_selector(".heads-hint:has-text('no gate and no position map')")
    assert page_map(page, 0, 20, "mixed").sum() < 1  # the rest goes to the class token


def test_training_curves_share_the_epoch_with_the_heads(page):
    page.get_by_role("tab", name="Training curves").click()
    short = page.evaluate("""async () => `${(await import(new URL("web/charts.js", document.baseURI))).chart(
        { title: "", series: [], high: 1, lastEpoch: 7, cursor: 0 })}`""")
    assert ">7</text>" in short and ">6</text>" not in short  # the last epoch has a tick
    labels = page.locator(".gate-charts svg").first.locator("text").all_text_contents()
    assert "30" in labels and "mean" in labels
    assert page.locator(".gate-charts svg").count() == 5 and page.locator(".distance-charts svg").count() == 7
    metrics = [json.loads(line) for line in (DEMO / "metrics.jsonl").read_text().splitlines()]
    curves = {
        ".gate-charts figure:nth-child(3) [data-curve='4']": [row["heads"]["gate"][2][4] for row in metrics],
        ".distance-charts figure:nth-child(1) [data-curve='4']": [
            row["heads"]["non_locality"][0][4] for row in metrics
        ],
        ".score-charts figure:nth-child(1) polyline": [row["test_accuracy"] for row in metrics],
        ".score-charts figure:nth-child(2) polyline:nth-of-type(2)": [row["train_loss"] for row in metrics[1:]],
    }
    for curve, values in curves.items():
        points = page.locator(curve).get_attribute("points").split()
        heights = [float(point.split(",")[1]) for point in points]
        assert np.corrcoef(heights, values)[0, 1] < -0.999, curve  # the y axis of an SVG points down
    box = page.locator(".gate-charts svg").first.bounding_box()
    last = int(page.locator(".snapshot").get_attribute("max"))
    for epoch, nearest in ((30, last), (18, last), (17, last - 1)):  # the axis is logarithmic: 10 and 30 meet at 17.5
        x = (30 + 188 * math.log1p(epoch) / math.log1p(30)) / 270
        page.mouse.click(box["x"] + x * box["width"], box["y"] + 40)
        assert page.evaluate("convit.state.snapshot") == nearest
    show_last_snapshot(page)
    page.keyboard.press("Tab")
    page.get_by_role("tab", name="Watch heads escape").click()
    assert gates(page) != [0.731] * 9


def test_kernel_tab_filters_like_a_soft_convolution(page):
    page.get_by_role("tab", name="Attention as convolution").click()
    page.get_by_label("tap 0 right, 0 down").click()
    center = canvas_pixels(page, ".filtered")
    page.get_by_label("tap 1 right, 0 down").click()
    assert page.locator("input.right").input_value() == "1"
    shifted = canvas_pixels(page, ".filtered")
    assert np.abs(shifted[:, :-48] - center[:, 48:]).mean() < 8  # moved in from the right
    assert np.abs(shifted[:, :-48] - center[:, :-48]).mean() > 15
    page.locator(".strength").fill("0")
    mean = canvas_pixels(page, ".filtered").reshape(8, 48, 8, 48, 3)
    assert np.ptp(mean, axis=(0, 2)).max() <= 1  # every patch is the mean of all patches
    box = page.locator(".kernel-map .map").bounding_box()
    side = box["width"] / 8
    page.mouse.move(box["x"] + box["width"] - 3.5 * side, box["y"] + box["height"] - 3.5 * side)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 1.5 * side, box["y"] + box["height"] - 2.5 * side)
    page.mouse.up()
    assert float(page.locator(".right-value").inner_text()) == pytest.approx(2, abs=0.1)
    assert float(page.locator(".down-value").inner_text()) == pytest.approx(1, abs=0.1)
    page.locator(".copy-head").click()
    assert page.locator(".v-pos").inner_text().endswith("= (-2.00, -2.00, -1.00)")
    page.get_by_role("tab", name="Watch heads escape").click()
    show_last_snapshot(page)
    page.locator("[data-layer='3'][data-cell='4']").click()
    page.wait_for_function("convit.state.layer === 3")
    page.get_by_role("tab", name="Attention as convolution").click()
    page.locator(".copy-head").click()
    note = page.locator(".copied-head").inner_text()
    assert (
        "Head 5 of layer 4 at epoch 30" in note
        and "Its gate is 0.07, so 93% of its attention comes from content" in note
    )
    page.get_by_role("tab", name="Watch heads escape").click()
    page.locator("[data-layer='1'][data-cell='4']").click()
    page.wait_for_function("convit.state.layer === 1")
    page.get_by_role("tab", name="Attention as convolution").click()
    page.locator(".copy-head").click()
    assert page.locator(".strength-value").inner_text() == "-0.04"  # this head avoids its center


def test_upload_by_button_drop_and_paste(page, tmp_path):
    Image.effect_noise((80, 50), 90).convert("RGB").save(tmp_path / "upload.png")
    transfer = """async ([kind, data]) => {
        const file = new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], "x.png", { type: "image/png" });
        const transfer = new DataTransfer();
        transfer.items.add(file);
        const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true })
            : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true });
        document.querySelector(".image").dispatchEvent(event);
    }"""
    data = base64.b64encode((tmp_path / "upload.png").read_bytes()).decode()
    uploads = {
        "button": lambda: page.locator(".file").set_input_files(tmp_path / "upload.png"),
        "drop": lambda: page.evaluate(transfer, ["drop", data]),
        "paste": lambda: page.evaluate(transfer, ["paste", data]),
    }
    for upload in uploads.values():
        page.locator("[data-example=bus]").click()
        page.wait_for_function("convit.state.example === 'bus'")
        example = maps(page, "content")
        upload()
        page.wait_for_function("convit.state.example === null")
        uploaded = maps(page, "content")
        assert uploaded != example
    page.locator("[data-example=bus]").click()
    page.wait_for_function("convit.state.example === 'bus'")
    page.locator("[data-example='']").click()  # the thumbnail of the upload
    page.wait_for_function("convit.state.example === null")
    assert maps(page, "content") == uploaded


def test_unusable_uploads_show_an_error_and_change_nothing(page, tmp_path):
    before = image(page)
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "large.png").write_bytes(bytes(21 * 2**20))
    for name, message in (("broken", "is not an image"), ("large", "larger than 20 MB")):
        page.locator(".file").set_input_files(tmp_path / f"{name}.png")
        page.wait_for_selector(f"text={message}")
        assert image(page) == before
    page.locator("[data-example=tower]").click()
    page.wait_for_function("convit.state.example === 'tower'")
    assert page.locator(".error").inner_text() == ""
    before, devtools = image(page), page.context.new_cdp_session(page)
    drop = {"x": 300, "y": 300, "data": {"items": [], "files": [str(tmp_path)], "dragOperationsMask": 1}}
    for event in ("dragEnter", "dragOver", "drop"):  # of a folder
        devtools.send("Input.dispatchDragEvent", {"type": event} | drop)
    page.wait_for_selector("text=is not an image")
    assert image(page) == before
    page.locator(".image").click(position=patch(page, 0, 0))
    assert brightest(maps(page, "position")[4]) == 0


def test_downloads(page, tmp_path):
    show_last_snapshot(page)

    def download(button: str) -> Path:
        with page.expect_download() as event:
            page.locator(button).click()
        file = tmp_path / event.value.suggested_filename
        event.value.save_as(file)
        return file

    with Image.open(download(".save-png")) as view:
        assert view.format == "PNG" and min(view.size) > 350 and np.asarray(view.convert("L")).std() > 20
    with Image.open(download(".save-gif")) as animation:
        assert animation.format == "GIF" and animation.n_frames == 1 + int(
            page.locator(".snapshot").get_attribute("max")
        )
    trained = gates(page)
    page.locator("[data-head='4'] input").fill("0.9")
    page.wait_for_selector(".prediction .before-label")
    rows = list(csv.DictReader(download(".save-csv").open()))
    saved = [row for row in rows if row["layer"] == "5" and row["epoch"] == rows[-1]["epoch"]]
    np.testing.assert_allclose([float(row["gate"]) for row in saved], trained, atol=5e-4)
    assert [row["changed_gate"] for row in saved] == ["", "", "", "", "0.9", "", "", "", ""]


def test_keyboard_access_and_accessible_names(page):
    for layer in (5, 6):  # with and without gates
        page.locator(".layer").select_option(index=layer - 1)
        page.wait_for_function(f"convit.state.layer === {layer - 1}")
        unnamed = page.evaluate("""[...document.querySelectorAll(
                ".viewer :is(button, input, select, canvas, img, [role=img])")]
            .filter(node => !node.closest("[hidden], .map") && !(node.labels?.length || node.textContent.trim()
                || node.alt || node.title || node.getAttribute("aria-label") || node.querySelector("img[alt]")))
            .map(node => node.outerHTML.slice(0, 80))""")
        assert not unnamed
    page.locator(".layer").select_option(index=4)
    page.wait_for_function("convit.state.layer === 4")
    expected = {"play", "step", "reset", "snapshot", "layer", "image", "select-head", "save-png", "cell", "train"}
    focused = set()
    page.locator(".open-tour").focus()
    for _ in range(90):
        page.keyboard.press("Tab")
        focused |= set(page.evaluate("document.activeElement.className.split(' ')"))
        if expected <= focused:
            break
    assert expected <= focused
    page.locator("#tab-watch").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tab-curves").get_attribute("aria-selected") == "true"


def test_tour_opens_once_and_by_its_link(browser, server):
    page = browser.new_page()
    page.goto(server)
    page.wait_for_selector(".tour:visible")
    for step in range(4):
        assert page.locator(".tour [data-step]:visible").count() == 1
        assert page.locator(".tour-count").inner_text() == f"{step + 1} of 4"
        page.locator(".tour-next").click()
    page.reload()
    page.wait_for_selector(".viewer:not(.loading)")
    assert page.locator(".tour").is_hidden()
    page.goto("about:blank")
    page.goto(f"{server}/#tab=help")
    page.wait_for_selector(".tour:visible")
    page.locator(".tour-next").focus()
    page.keyboard.press("Escape")
    assert page.locator(".tour").is_hidden()
    page.goto(f"{server}/web/maps.js")  # in a frame as tall as the page, as on Hugging Face
    page.set_content(f"<iframe src='{server}/#tab=help' style='width: 1200px; height: 5000px'></iframe>")
    tour = page.frame_locator("iframe").locator(".tour")
    tour.wait_for()
    assert tour.bounding_box()["y"] < 600
    page.evaluate("document.querySelector('iframe').style.height = '600px'")  # or a small one
    for _ in range(3):
        tour.locator(".tour-next").click()
    assert 0 <= tour.bounding_box()["y"] - page.locator("iframe").bounding_box()["y"] < 400
    page.close()


def test_page_says_why_it_shows_another_model_or_nothing(browser, server):
    with open_page(browser, f"{server}/#model=gone") as page:
        assert page.evaluate("convit.state.key") == "patterns"
        assert "There is no such model" in page.locator(".error").inner_text()
    page = browser.new_page()
    errors = []
    page.on("pageerror", lambda error: errors.append(error))
    page.route("**/web/maps.js", lambda route: route.abort())
    page.goto(server)
    page.wait_for_selector("text=Please reload the page.")
    assert errors
    page.close()


def test_page_works_without_storage(browser, server):
    page = browser.new_page()  # as in some embedded browsers
    page.add_init_script("for (const name of ['localStorage', 'sessionStorage'])"
                         "Object.defineProperty(window, name, { value: null })")  # fmt: skip
    page.goto(server)
    page.wait_for_selector(".viewer:not(.loading)")
    assert page.locator(".tour").is_hidden()  # or it would open at every visit
    page.close()


def test_errors_are_visible_on_a_phone(browser, server):
    with open_page(browser, f"{server}/#model=cifar10", width=390) as page:
        page.evaluate("convit.state.server.recompute = async () => ({ error: 'It failed.' })")
        page.locator("[data-scope=model][data-pin='1']").click()  # scrolls to the button
        page.wait_for_selector("text=It failed.")
        assert 0 <= page.locator(".error").bounding_box()["y"] < 900
        assert page.evaluate("""() => {
            const step = document.querySelector(".step"), { x, y } = step.getBoundingClientRect();
            return step === document.elementFromPoint(x + 4, y + 4);
        }""")  # the error does not cover it
        assert page.evaluate("scrollY") > 300


def test_trained_model_remains_while_the_next_run_waits(browser, server):
    with open_page(browser, server) as page:
        answers = [{"state": "done", "epoch": 7, "epochs": 7}, {"state": "waiting", "position": 2}]
        page.evaluate("answers => { convit.state.server.train = async () => answers.shift(); }", answers)
        for text in ("Done.", "2 are ahead of you"):
            page.locator(".train").click()
            page.wait_for_selector(f"text={text}")
            assert page.locator(".models").get_by_text("Your tiny model").count() == 1


def test_layout_fits_and_does_not_shift(browser, server):
    with open_page(browser, server) as page:
        for width in (1440, 1024, 768, 390):
            page.set_viewport_size({"width": width, "height": 1000})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            clipped = page.evaluate("""[...document.querySelectorAll(".lead, .models button, [role=tab]")]
                .filter(node => !node.checkVisibility() || node.getBoundingClientRect().right > innerWidth
                    || node.parentElement.scrollWidth > node.parentElement.clientWidth)
                .map(node => node.textContent)""")
            assert not clipped
            too_small = page.evaluate("""[...document.querySelectorAll(".viewer *")].filter(node =>
                node.checkVisibility() && [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()))
                .filter(node => parseFloat(getComputedStyle(node).fontSize) < 12)
                .map(node => node.outerHTML.slice(0, 80))""")
            assert not too_small
            box = page.locator(".heads").bounding_box()
            show_last_snapshot(page)
            page.locator(".reset").click()
            assert page.locator(".heads").bounding_box() == box
            assert page.locator("[data-head='0'] canvas").bounding_box()["width"] >= 50
        assert page.locator(".viewer").bounding_box()["width"] > 350  # of a phone's 390 pixels


def test_concurrent_changes_are_merged(page):
    script = """changes => { for (const [selector, value] of changes) {
        const node = document.querySelector(selector);
        if (value === undefined) node.click();
        else { node.value = value; node.dispatchEvent(new Event("change")); } } }"""
    page.evaluate(script, [["[data-example=lion]"], [".layer", 1]])
    page.wait_for_function("convit.state.example === 'lion' && convit.state.layer === 1")
    page.evaluate(script, [[".layer", 2], ["[data-example=bus]"]])
    page.wait_for_function("convit.state.example === 'bus' && convit.state.layer === 2")


def test_training_on_the_page_queues_sessions_and_shows_snapshots(own_page, browser, server):
    page = own_page
    page.locator(".train").click()
    page.wait_for_selector("text=Starting")
    with open_page(browser, server) as other:
        other.locator(".train").click()
        other.wait_for_selector("text=yours is next")
        other.locator(".train-stop").click()
        other.wait_for_selector("text=Train a tiny model on")
    page.wait_for_selector("text=Its gates are shown live", timeout=90_000)
    page.wait_for_function("convit.state.model.name === 'your tiny model' && convit.state.maps")
    assert gates(page) == [0.731] * 9 and page.locator("[data-example=checks]").count() == 1
    assert "epoch 0 of 7 so far" in page.locator(".growing").inner_text()
    page.locator(".train-stop").click()
    page.wait_for_selector("text=Stopped. Play its training under “Your tiny model” above.")
    page.wait_for_function("location.hash.includes('model=trained-here')")
    assert page.locator(".growing").inner_text() == ""
    page.reload()
    page.wait_for_function("window.convit?.state.model.name === 'your tiny model' && convit.state.maps")
    page.locator("[data-model=cifar10]").click()
    page.wait_for_selector("[data-example=lion]")
    assert page.locator(".snapshot").get_attribute("max") == str(len(list((DEMO / "snapshots").iterdir())) - 1)
