"""Pictures of the page for the README: python -m results.screenshots FOLDER (needs playwright and Chromium).

Writes page-start.png and page-end.png: the last GPSA layer before and after training, on the picture it opens with.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from app import HERE, build

PORT = 7869


def main(folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    page_app = build(HERE / "demo")
    page_app.launch(server_port=PORT, prevent_thread_lock=True, quiet=True, footer_links=[])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1440, "height": 700})
        page.goto(f"http://127.0.0.1:{PORT}")
        page.wait_for_selector("[data-head][data-gate]")
        page.screenshot(path=folder / "page-start.png")
        page.locator(".checkpoint").fill(page.locator(".checkpoint").get_attribute("max"))
        page.locator(".checkpoint").blur()
        page.screenshot(path=folder / "page-end.png")
        browser.close()
    page_app.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
