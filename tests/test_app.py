"""The page in a real browser, as a visitor uses it."""

import base64
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DEMO, assert_maps, serving, visiting
from PIL import Image

from convit_min import ConViT, ConViTConfig, load_weights, normalise


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("elsewhere")) as address:
        yield address


@pytest.fixture
def page(browser, server):
    with visiting(browser, server) as page:
        yield page


def maps(page, kind="mixed") -> list[str]:
    """The pixels of one kind of map of every head, in the order of the heads."""
    script = """kind => [...document.querySelectorAll("[data-head]")].sort((a, b) => a.dataset.head - b.dataset.head)
        .map(card => { const canvas = card.querySelector(`.${kind} canvas`);
            return canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.join(); })"""
    return page.evaluate(script, kind)


def gates(page) -> list[float]:
    return page.evaluate("""[...document.querySelectorAll("[data-head]")]
        .sort((a, b) => a.dataset.head - b.dataset.head).map(card => Number(card.dataset.gate))""")


def brightest(pixels: str) -> int:
    rgba = np.array(pixels.split(","), dtype=int).reshape(-1, 4)
    return int(rgba[:, :3].sum(1).argmax())


def picture(page) -> str:
    return page.evaluate("document.querySelector('.picture').toDataURL()")


def pixels_of(page, canvas: str) -> np.ndarray:
    """What a canvas shows: H W 3."""
    address = page.evaluate("selector => document.querySelector(selector).toDataURL()", canvas)
    return np.array(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))).convert("RGB")).astype(int)


def patch(page, row: int, column: int) -> dict:
    """Where a patch of an 8 x 8 grid lies on the picture."""
    box = page.locator(".picture").bounding_box()
    return {"x": (column + 0.5) * box["width"] / 8, "y": (row + 0.5) * box["height"] / 8}


def query(page) -> int:
    return page.evaluate("convit.state.query")


def to_end(page):
    page.locator(".checkpoint").fill(page.locator(".checkpoint").get_attribute("max"))


def test_the_page_opens_on_nine_taps_around_the_query(page):
    assert gates(page) == [0.731] * 9
    assert page.locator(".epoch").inner_text() == "0"
    assert "has a place of its own around the patch" in page.locator(".caption").inner_text()
    places = [brightest(pixels) for pixels in maps(page, "position")]
    assert places == [(4 + head % 3 - 1) * 8 + 4 + head // 3 - 1 for head in range(9)]
    cards = page.eval_on_selector_all("[data-head]", "cards => cards.map(card => Number(card.dataset.head))")
    assert cards == [0, 3, 6, 1, 4, 7, 2, 5, 8]  # laid out as the kernel: rows look up, here and down
    pixels = pixels_of(page, ".picture")
    assert pixels.shape == (384, 384, 3) and pixels.std() > 20  # a real picture, at once


def test_hover_moves_the_query_a_click_holds_it_and_keys_move_it(page):
    before = maps(page)
    page.locator(".picture").hover(position=patch(page, 2, 6))
    assert query(page) == 22 and brightest(maps(page, "position")[4]) == 22
    assert all(one != other for one, other in zip(before, maps(page), strict=True))
    page.locator(".picture").click(position=patch(page, 2, 5))
    page.locator(".picture").hover(position=patch(page, 7, 7))
    assert query(page) == 21  # held
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    assert query(page) == 28 and brightest(maps(page, "position")[4]) == 28
    page.locator(".picture").click(position=patch(page, 3, 4))  # the same again lets go
    page.locator(".picture").hover(position=patch(page, 0, 0))
    assert query(page) == 0


def test_time_goes_by_play_step_and_reset_and_changes_gates_and_maps(page):
    start, before = gates(page), maps(page)
    last = int(page.locator(".checkpoint").get_attribute("max"))
    page.locator(".step").click()
    assert gates(page) != start and page.locator(".epoch").inner_text() == "1"
    page.locator(".checkpoint").fill(str(last - 1))
    page.locator(".play").click()
    page.wait_for_function("last => convit.state.checkpoint === last", arg=last)
    page.wait_for_timeout(1100)
    assert page.evaluate("convit.state.checkpoint") == last  # it stops there
    assert "Play" in page.locator(".play").inner_text()
    assert max(gates(page)) - min(gates(page)) > 0.1 and maps(page) != before  # training has told the heads apart
    assert "by content than by position" in page.locator(".caption").inner_text()
    assert "test accuracy" in page.locator(".accuracy").inner_text()
    for row in page.locator(".guess > div").all():
        share = row.locator(".fill").bounding_box()["width"] / row.locator(".track").bounding_box()["width"]
        assert share == pytest.approx(float(row.locator("span").last.inner_text().rstrip("%")) / 100, abs=0.02)
    page.locator(".reset").click()
    assert gates(page) == start and maps(page) == before


def test_one_head_stands_out_in_cards_curves_wall_and_picture(page):
    to_end(page)
    before, first = picture(page), maps(page, "content")
    page.locator("[data-layer='1'][data-cell='4']").click()
    page.wait_for_function("before => document.querySelector('.layer').value === '1'", arg=None)
    page.wait_for_function("convit.state.head === 4")
    assert maps(page, "content") != first  # another layer
    assert page.locator(".head.chosen").get_attribute("data-head") == "4"
    assert page.locator(".layer-chart polyline.chosen").get_attribute("data-curve") == "4"
    assert page.locator(".wall .chosen").get_attribute("data-cell") == "4"
    assert picture(page) != before  # its map lies over the picture
    page.locator("[data-head='2']").hover()
    assert page.locator(".layer-chart polyline.chosen").get_attribute("data-curve") == "2"
    page.locator("[data-head='4'] .choose").click()
    assert page.locator(".head.chosen").count() == 0


def test_scale_overlay_and_mass_do_what_they_say(page):
    to_end(page)
    before, plain = maps(page), picture(page)
    page.locator(".same-scale").check()
    assert maps(page) != before
    assert float(page.locator(".ramp-end").inner_text()) > 0.1
    page.locator(".same-scale").uncheck()
    page.locator(".options summary").click()
    page.locator(".opacity").fill("0")
    bare = picture(page)
    assert bare != plain
    page.locator(".as-seen").check()
    assert picture(page) != bare
    page.locator(".mass").fill("0.5")
    shown = page.evaluate("convit.mapsOf(3, convit.state.query).mixed")
    values = np.array(list(shown.values()) if isinstance(shown, dict) else shown)
    alpha = np.array(maps(page)[3].split(","), dtype=int).reshape(-1, 4)[:, 3]
    kept = values[alpha == 255]
    assert kept.sum() >= 0.5 > kept.sum() - kept.min()  # the fewest patches that hold half
    assert kept.min() > values[alpha < 255].max()


def test_other_gates_remix_at_once_and_the_model_answers(page):
    to_end(page)
    trained, before = gates(page), maps(page)
    page.locator("[data-head='4'] input").fill("1")
    assert gates(page)[4] == 1 and maps(page)[4] != before[4] and maps(page)[3] == before[3]
    assert maps(page)[4] == maps(page, "position")[4]
    page.locator(".scope").select_option("model")
    page.locator(".all-gates").fill("0")
    assert gates(page) == [0] * 9 and "9 heads of layer 5" in page.locator(".caption").inner_text()
    assert page.locator(".stale").is_visible()
    page.locator(".recompute").click()
    page.wait_for_selector(".guess .was")
    assert page.locator(".stale").is_hidden()
    name, after, _, earlier = page.locator(".guess > div").first.inner_text().split("\n")
    model, image = last_model(), seen(page)
    with torch.no_grad():
        first = model(image).softmax(1)[0]
        for block in model.blocks[:5]:
            block.attn.gating_param.fill_(-14)
        logits, attention = model(image, return_attention=True)
    classes = torch.load(last_file(), weights_only=True)["classes"]
    index = classes.index(name)
    assert float(earlier.rstrip("%")) == pytest.approx(100 * first[index].item(), abs=0.6)
    assert float(after.rstrip("%")) == pytest.approx(100 * logits.softmax(1)[0, index].item(), abs=0.6)
    shown = page.evaluate("convit.mapsOf(7, 20).content")
    expected = attention[4].content[0, 7, 20]  # the later layer's maps, as the other gates make them
    step = attention[4].content[0, 7].max().item() / 255
    np.testing.assert_allclose(list(shown.values()) if isinstance(shown, dict) else shown, expected, atol=step)
    page.locator("[data-head='1'] input").fill("0.4")
    assert page.locator(".guess .was").count() == 0 and page.locator(".stale").is_visible()  # an answer to other gates
    page.locator(".recompute").click()
    page.locator(".undo").click()  # before the answer has come
    page.wait_for_timeout(500)
    assert gates(page) == trained and maps(page) == before and page.locator(".guess .was").count() == 0
    assert page.locator(".all-gates").input_value() == "0.73"


def last_file() -> Path:
    return sorted((DEMO / "snapshots").glob("*.pt"))[-1]


def last_model() -> ConViT:
    record = torch.load(last_file(), weights_only=True)
    model = ConViT(ConViTConfig(**record["model_config"])).eval()
    load_weights(model, last_file())
    return model


def seen(page) -> torch.Tensor:
    """The picture on show, as the model gets it."""
    raw = np.frombuffer(base64.b64decode(page.evaluate("convit.pixels()")), dtype=np.uint8).reshape(32, 32, 3)
    return normalise(torch.tensor(raw).permute(2, 0, 1)[None])


def test_the_maps_of_the_browser_are_the_models(page):
    """The page's own JavaScript against HeadAttention, at the last checkpoint, in the last GPSA layer."""
    to_end(page)
    model = last_model()
    with torch.no_grad():
        heads = model(seen(page), return_attention=True)[1][model.config.gpsa_layers - 1]
    assert_maps(page, heads, [(0, 0), (4, 27), (8, 63)])


def test_the_address_brings_a_view_back(page, browser, server):
    page.locator("[data-example=lion]").click()
    page.wait_for_function("convit.state.example === 'lion'")
    to_end(page)
    page.locator("[data-layer='2'][data-cell='6']").click()
    page.wait_for_function("convit.state.head === 6 && convit.state.layer === 2")
    page.locator(".picture").click(position=patch(page, 1, 3))
    page.wait_for_function("location.hash.includes('patch=2,4') && location.hash.includes('head=7')")
    with visiting(browser, page.url) as other:
        assert gates(other) == gates(page) and maps(other) == maps(page) and query(other) == 11
        assert other.locator(".head.chosen").get_attribute("data-head") == "6"
        assert other.evaluate("convit.state.example") == "lion"
    nonsense = server + "/#layer=99&epoch=-3&head=x&patch=9,9&picture=<img src=x>&tab=none"
    with visiting(browser, nonsense) as other:
        assert gates(other) == [0.731] * 9


def test_the_story_shares_its_cursor_with_the_heads(page):
    page.get_by_role("tab", name="Training story").click()
    assert page.locator(".gate-charts svg").count() == 5 and page.locator(".distance-charts svg").count() == 7
    metrics = [json.loads(line) for line in (DEMO / "metrics.jsonl").read_text().splitlines()]
    points = page.locator(".gate-charts figure").nth(2).locator("[data-curve='4']").get_attribute("points").split()
    assert len(points) == len(metrics)
    heights = np.array([float(point.split(",")[1]) for point in points])
    wanted = np.array([line["heads"]["gate"][2][4] for line in metrics])
    assert np.corrcoef(heights, wanted)[0, 1] < -0.999  # upwards is less
    box = page.locator(".gate-charts svg").first.bounding_box()
    page.mouse.click(box["x"] + 0.965 * box["width"], box["y"] + 40)
    assert page.evaluate("convit.state.checkpoint") == int(page.locator(".checkpoint").get_attribute("max"))
    page.keyboard.press("Tab")
    page.get_by_role("tab", name="Watch heads escape").click()
    assert gates(page) != [0.731] * 9


def test_a_head_by_hand_is_a_soft_convolution(page):
    page.get_by_role("tab", name="Attention as convolution").click()
    page.get_by_label("tap 0 right, 0 down").click()
    centre = pixels_of(page, ".filtered")
    page.get_by_label("tap 1 right, 0 down").click()
    shifted = pixels_of(page, ".filtered")
    assert np.abs(shifted[:, :-48] - centre[:, 48:]).mean() < 8  # what stood to the right
    assert np.abs(shifted[:, :-48] - centre[:, :-48]).mean() > 15
    page.locator(".strength").fill("0")
    mean = pixels_of(page, ".filtered").reshape(8, 48, 8, 48, 3)
    assert np.ptp(mean, axis=(0, 2)).max() <= 1  # every patch is the mean of all
    box = page.locator(".kernel-map").bounding_box()
    side = (box["width"] - 60 * box["width"] / 400) / 8
    page.mouse.move(box["x"] + box["width"] - 3.5 * side, box["y"] + box["height"] - 3.5 * side)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] - 1.5 * side, box["y"] + box["height"] - 2.5 * side)
    page.mouse.up()
    assert float(page.locator(".right-of").inner_text()) == pytest.approx(2, abs=0.1)
    assert float(page.locator(".down-of").inner_text()) == pytest.approx(1, abs=0.1)
    page.locator(".take").click()
    assert "click a head" in page.locator(".taken").inner_text()
    page.get_by_role("tab", name="Watch heads escape").click()
    page.locator("[data-head='0'] .choose").click()
    page.get_by_role("tab", name="Attention as convolution").click()
    page.locator(".take").click()
    assert "Head 1 of layer 5 at epoch 0" in page.locator(".taken").inner_text()
    assert page.locator(".v-pos").inner_text().endswith("= (-2.00, -2.00, -1.00)")


def test_the_page_takes_pictures_by_button_drop_and_paste(page, tmp_path):
    Image.effect_noise((80, 50), 90).convert("RGB").save(tmp_path / "mine.png")
    transfer = """async ([kind, data]) => {
        const file = new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], "x.png", { type: "image/png" });
        const transfer = new DataTransfer();
        transfer.items.add(file);
        const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true })
            : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true });
        document.querySelector(".picture").dispatchEvent(event);
    }"""
    data = base64.b64encode((tmp_path / "mine.png").read_bytes()).decode()
    ways = {
        "button": lambda: page.locator(".file").set_input_files(tmp_path / "mine.png"),
        "drop": lambda: page.evaluate(transfer, ["drop", data]),
        "paste": lambda: page.evaluate(transfer, ["paste", data]),
    }
    for way in ways.values():
        page.locator("[data-example=bus]").click()
        page.wait_for_function("convit.state.example === 'bus'")
        example = maps(page, "content")
        way()
        page.wait_for_function("convit.state.example === null")
        assert maps(page, "content") != example


def test_what_is_no_picture_is_refused_in_a_sentence_and_the_page_lives_on(page, tmp_path):
    before = picture(page)
    (tmp_path / "broken.png").write_bytes(b"this is no picture")
    (tmp_path / "large.png").write_bytes(bytes(11 * 2**20))
    for name, words in (("broken", "cannot be read as a picture"), ("large", "larger than 10 MB")):
        page.locator(".file").set_input_files(tmp_path / f"{name}.png")
        page.wait_for_selector(f"text={words}")
        assert picture(page) == before
    page.locator(".picture").click(position=patch(page, 0, 0))
    assert brightest(maps(page, "position")[4]) == 0
    page.locator("[data-example=tower]").click()
    page.wait_for_function("convit.state.example === 'tower'")
    assert page.locator(".trouble").inner_text() == ""


def test_files_to_keep(page, tmp_path):
    to_end(page)

    def download(button: str) -> Path:
        with page.expect_download() as waiting:
            page.locator(button).click()
        waiting.value.save_as(tmp_path / waiting.value.suggested_filename)
        return tmp_path / waiting.value.suggested_filename

    with Image.open(download(".save-view")) as view:
        assert view.format == "PNG" and min(view.size) > 400 and np.asarray(view.convert("L")).std() > 20
    with Image.open(download(".save-moving")) as moving:
        assert moving.format == "GIF" and moving.n_frames == 1 + int(page.locator(".checkpoint").get_attribute("max"))
    lines = list(csv.DictReader(download(".save-gates").open()))
    shown = [float(line["gate"]) for line in lines if line["layer"] == "5" and line["epoch"] == lines[-1]["epoch"]]
    np.testing.assert_allclose(shown, gates(page), atol=5e-4)


def test_all_can_be_done_by_keyboard_and_everything_has_a_name(page):
    unnamed = page.evaluate("""[...document.querySelectorAll(
            ".panel :is(button, input, select, canvas, img, svg[role])")]
        .filter(one => !one.closest("[hidden], .map, .legend") && !(one.labels?.length || one.textContent.trim()
            || one.alt || one.title || one.getAttribute("aria-label") || one.querySelector("img[alt]")))
        .map(one => one.outerHTML.slice(0, 80))""")
    assert not unnamed
    reached = set()
    for _ in range(90):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.className.split(' ')[0] || document.activeElement.id"))
    wanted = {
        "play",
        "step",
        "reset",
        "checkpoint",
        "layer",
        "picture",
        "choose",
        "recompute",
        "save-view",
        "cell",
        "train",
    }
    assert wanted - {"recompute"} <= reached  # not while there is nothing to recompute
    page.locator("#tab-watch").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#tab-story").get_attribute("aria-selected") == "true"


@pytest.mark.parametrize("width", [1440, 1024, 390])
def test_it_fits_and_nothing_jumps(browser, server, width):
    with visiting(browser, server, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        place = page.locator(".heads").bounding_box()
        to_end(page)
        page.locator(".reset").click()
        assert page.locator(".heads").bounding_box() == place
        assert page.locator("[data-head='0'] .mixed canvas").bounding_box()["width"] >= 50


def test_wishes_on_their_way_do_not_push_each_other_out(page):
    script = """wishes => { for (const [selector, value] of wishes) {
        const part = document.querySelector(selector);
        if (value === undefined) part.click();
        else { part.value = value; part.dispatchEvent(new Event("change")); } } }"""
    page.evaluate(script, [["[data-example=lion]"], [".layer", 1]])
    page.wait_for_function("convit.state.example === 'lion' && convit.state.layer === 1")
    page.evaluate(script, [[".layer", 2], ["[data-example=bus]"]])
    page.wait_for_function("convit.state.example === 'bus' && convit.state.layer === 2")


def test_a_visitor_trains_a_model_others_wait_and_its_checkpoints_appear(page, browser, server):
    page.locator(".train").click()
    page.wait_for_selector("text=Starting")
    with visiting(browser, server) as other:
        other.locator(".train").click()
        other.wait_for_selector("text=yours is next")
        other.locator(".train-stop").click()
        other.wait_for_selector("text=A nano model, from nothing")
    page.wait_for_selector("text=Its gates are on show", timeout=90_000)
    page.wait_for_function("document.querySelector('[data-example]').dataset.example === 'pattern 1'")
    assert gates(page) == [0.731] * 9
    page.locator(".train-stop").click()
    page.wait_for_selector("text=Stopped. The slider above goes through its training.")
    page.locator(".runs").select_option("")
    page.wait_for_selector("[data-example=lion]")
    assert page.locator(".checkpoint").get_attribute("max") == str(len(list((DEMO / "snapshots").iterdir())) - 1)
