"""The page's first paint, and its screenshots for the documentation, in Debian's Chromium.

    python benchmarks/app.py                  # first paint of a fresh browser, five times
    python benchmarks/app.py --screenshots --recording FILE.zarr    # docs/app-search.png, -more.png and -explore.png
    python benchmarks/app.py --walk FOLDER --recording FILE.zarr    # all tabs, three widths, light and dark

The server runs in this process on the embedded model; nothing but it is asked for anything.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import statistics
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from ttsnap.app.searches import Searches
from ttsnap.app.server import serve

FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
PATIENCE = 300_000  # milliseconds


def opened(browser, url: str) -> tuple[float, float]:
    """Seconds from opening to the first contentful paint, and until the search button is there; cold cache."""
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.wait_for_selector("#tt-search-go")
    usable = page.evaluate("() => performance.now()")
    paint = page.evaluate("() => performance.getEntriesByName('first-contentful-paint')[0].startTime")
    context.close()
    return paint / 1000, usable / 1000


def searched(page: Page) -> None:
    """One search by the page's defaults, with its comparison, seen whole."""
    page.click("#tt-search-go")
    page.wait_for_selector("#tt-search-outcome img")
    page.wait_for_selector("#tt-search-compare")
    page.click("#tt-search-compare")
    page.wait_for_selector("#tt-search-outcome figure:nth-child(2) img")
    page.wait_for_timeout(1500)


def picked(page: Page) -> None:
    """A search by hand at its second look, with two more like one of the candidates."""
    page.get_by_role("tab", name="Hand-picked").click()
    page.fill("#tt-hand-amount input", "8")
    page.click("#tt-hand-go")
    page.locator("#tt-hand-board input[value$='+']").nth(2).check()
    page.click("#tt-hand-continue")
    page.wait_for_function("() => document.querySelectorAll('#tt-hand-board .tt-rungs tbody tr').length == 2")
    page.wait_for_selector("#tt-hand-continue:not([disabled])")
    page.wait_for_timeout(1500)


def walked(page: Page, folder: Path) -> None:
    """Every tab as it is now, at three widths and in both colour schemes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("Search", "Hand-picked", "Many prompts", "Compare", "Runs", "Explore"):
        page.set_viewport_size({"width": 1600, "height": 900})
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(1500)
        if name == "Runs":
            page.locator("#tt-runs-gallery .thumbnail-item").first.click()
            page.wait_for_selector("#tt-runs-run svg")
        for dark in (False, True):
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
            for width in (360, 1024, 1600):
                page.set_viewport_size({"width": width, "height": 900})
                page.wait_for_timeout(700)
                scheme = "dark" if dark else "light"
                page.screenshot(path=folder / f"{name.split()[0].lower()}-{scheme}-{width}.png", full_page=True)


def explored(page: Page) -> None:
    """The recording, its curves and a prompt."""
    page.get_by_role("tab", name="Explore").click()
    page.get_by_label("A recording or a past run").click()
    page.get_by_role("option", name="recording").first.click()
    page.wait_for_selector("#tt-explore-chart svg")
    page.wait_for_selector("#tt-explore-prompt svg")
    page.wait_for_timeout(1500)


def write(page: Page, path: Path, height: int) -> None:
    """A screenshot of the page's top, in few colours, so that it stays below 300 kB."""
    page.set_viewport_size({"width": 1120, "height": height})
    page.evaluate("() => { document.activeElement.blur(); window.scrollTo(0, 0) }")
    page.wait_for_timeout(500)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size // 1000} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--screenshots", action="store_true", help="write the pictures of the documentation instead")
    parser.add_argument("--walk", type=Path, metavar="FOLDER", help="write screens of all tabs instead")
    parser.add_argument("--recording", type=Path, help="a recording for the picture of Explore")
    parser.add_argument("--out", type=Path, default=Path("docs"))
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        searches = Searches(folder / "page")
        if options.recording:
            shutil.copytree(options.recording, searches.out / options.recording.name)
        server, url = serve(searches, port=None, block=False)
        stack.callback(server.close)
        searches.warm()
        driver = stack.enter_context(sync_playwright())
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        if not (options.screenshots or options.walk):
            paints, usables = zip(*(opened(browser, url) for _ in range(5)), strict=True)
            for name, times in (("first paint", paints), ("usable", usables)):
                print(f"{name} after {statistics.median(times):.2f} s ({', '.join(f'{t:.2f}' for t in times)})")
            return
        page = browser.new_page(viewport={"width": 1120, "height": 900})
        page.set_default_timeout(PATIENCE)
        page.goto(url)
        page.wait_for_selector("#tt-search-go")
        page.wait_for_function("() => localStorage.getItem('ttsnap-visitor')")
        shots = [("search", searched, 1500), ("more", picked, 1200)]
        for name, make, height in [*shots, ("explore", explored, 1500)] if options.recording else shots:
            make(page)
            if options.screenshots:
                write(page, options.out / f"app-{name}.png", height)
        if options.walk:
            walked(page, options.walk)


if __name__ == "__main__":
    main()
