"""One server and one browser for all tests of the page."""

from __future__ import annotations

import shutil
from contextlib import contextmanager

import numpy as np
import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 180_000  # milliseconds until a test gives up; nothing waits that long on a quiet machine


@pytest.fixture(scope="session")
def searches(tmp_path_factory):
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'ttsnap[app]'")
    from ttsnap.app.searches import Searches
    from ttsnap.recordings import Recording

    out = tmp_path_factory.mktemp("page") / "out"
    searches = Searches(out)
    rng = np.random.default_rng(0)
    final = rng.normal(size=(6, 40, 1, 1))
    noise = np.linspace(2, 0, 8)[:, None] * rng.normal(size=(6, 40, 8, 1))
    recording = Recording.create(
        out / "toy.zarr",
        prompts=[f"prompt {number}" for number in range(6)],
        num_candidates=40,
        num_steps=8,
        rewards=["toy"],
        provenance={"cost_model": {"name": "toy", "call_tflop": 1.0, "decode_tflop": 0.1, "look_tflop": 0.1}},
    )
    for number in range(6):
        recording.write_prompt(number, clean=final[number] + noise[number], seeds=np.arange(40))
    return searches


@pytest.fixture(scope="session")
def url(searches):
    from ttsnap.app.server import serve

    page, url = serve(searches, port=None, block=False)
    searches.warm().join()
    yield url.rstrip("/")
    page.close()


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="browser tests need: pip install playwright")
    if not CHROMIUM:
        pytest.skip("browser tests need Chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def visits(browser, url):
    """What opens the page as somebody new; nothing may be asked of another host, and no script may fail."""
    contexts, outside, broken = [], [], []

    def visit(**options):
        context = browser.new_context(**({"viewport": {"width": 1100, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else outside.append(r.url))
        page.on("pageerror", lambda error: broken.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#tt-search-go")
        page.wait_for_function("() => localStorage.getItem('ttsnap-visitor')")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not outside
    assert not broken


@pytest.fixture
def visit(browser, url):
    """Opens the page as somebody new."""
    with visits(browser, url) as visit:
        yield visit


@pytest.fixture(scope="module")
def page(browser, url):
    """One page for all fast tests: opening it takes longer than what they do on it."""
    with visits(browser, url) as visit:
        yield visit()
