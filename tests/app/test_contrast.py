"""Text on the page can be read: at least 4.5:1 against what is behind it, in both colour schemes and on every tab.

Also while and after something runs: boards, the winner, its code, a past run, curves and tables.
"""

import json

import pytest

from tests.app.test_page import ended, search

pytestmark = pytest.mark.browser

MEASURE = """() => {
  const parse = text => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1] }
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1)
  const light = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255
    return v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 }); return .2126 * r + .7152 * g + .0722 * b }
  const behind = element => { const layers = []
    for (let e = element; e; e = e.parentElement) layers.push(parse(getComputedStyle(e).backgroundColor))
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]) }
  const poor = {}
  const fading = element => { let left = 1
    for (let e = element; e; e = e.parentElement) left *= Number(getComputedStyle(e).opacity)
    return left }
  const look = (element, colour, text) => {
    const ground = behind(element), top = parse(colour)
    top[3] *= fading(element)
    const ink = over(top, ground)
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x)
    const ratio = (a + .05) / (b + .05)
    if (ratio < 4.5) poor[text.trim().slice(0, 40)] = [ratio.toFixed(2), colour, ground.join(' '), element.className]
  }
  for (const element of document.querySelectorAll('body *')) {
    if (element.closest('[disabled], [aria-hidden=true], svg') || !element.checkVisibility()) continue
    const own = [...element.childNodes].filter(n => n.nodeType === 3 && n.textContent.trim()).map(n => n.textContent)
    if (own.length) look(element, getComputedStyle(element).color, own.join(' '))
    if (element.placeholder) look(element, getComputedStyle(element, '::placeholder').color, element.placeholder)
    else if (element.value && element.matches('textarea, input:not([type=range], [type=checkbox])'))
      look(element, getComputedStyle(element).color, element.value)
  }
  return poor
}"""


FOLDS = ("Model, reward, seed, size", "More model options")
TABS = ("Search", "Hand-picked", "Many prompts", "Compare", "Runs", "Explore")


def one_of_each_kind(page):
    """A button of each class, among those that can be pressed."""
    seen = [one for one in page.locator("button:enabled").all() if one.is_visible() and one.inner_text().strip()]
    return {one.get_attribute("class"): one for one in seen}.values()


@pytest.fixture
def measure():
    """Measures a page as it is now; in the end nothing may have been hard to read."""
    poor = {}

    def look(page, where):
        for dark in (False, True):
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
            page.wait_for_timeout(400)  # colours fade over
            scheme = "dark" if dark else "light"
            poor[f"{where}, {scheme}"] = page.evaluate(MEASURE)
            for button in one_of_each_kind(page):
                button.hover()
                page.wait_for_timeout(300)
                poor[f"{where}, {scheme}, at {button.inner_text()}"] = page.evaluate(MEASURE)
            page.mouse.move(0, 0)

    yield look
    hard = {where: found for where, found in poor.items() if found}
    assert not hard, json.dumps(hard, indent=1)


@pytest.mark.slow
def test_all_text_stands_out_in_both_colour_schemes(visit, measure):
    page = visit()
    page.fill("#tt-search-amount input", "0")
    page.wait_for_selector("#tt-search-hint .tt-error")  # an error has colours of its own
    for name in TABS:
        page.get_by_role("tab", name=name).click()
        for label in FOLDS:
            for fold in page.get_by_role("tabpanel").get_by_role("button", name=label).all():
                if fold.is_visible() and "open" not in (fold.get_attribute("class") or ""):
                    fold.click()
        measure(page, name)


@pytest.mark.slow
def test_all_text_of_results_stands_out_in_both_colour_schemes(visit, measure):
    page = visit()
    search(page, amount=8)
    ended(page)
    page.click("#tt-search-compare")
    page.wait_for_selector("#tt-search-outcome figure:nth-child(2) img")
    ended(page)
    measure(page, "a search that is over")
    page.get_by_role("tab", name="Hand-picked").click()
    search(page, "hand", amount=4)
    page.locator("#tt-hand-board .tt-more").first.wait_for()
    measure(page, "a look of picking by hand")
    page.click("#tt-hand-stop")
    page.wait_for_selector("#tt-hand-go:not([disabled])")
    page.get_by_role("tab", name="Runs").click()
    page.locator("#tt-runs-gallery .thumbnail-item").first.click()
    page.wait_for_selector("#tt-runs-run svg")
    page.click("#tt-runs-share")
    page.wait_for_selector("#tt-runs-link textarea, #tt-runs-link input")
    measure(page, "a past run")
    page.get_by_role("tab", name="Explore").click()
    page.get_by_label("A recording or a past run").click()
    page.get_by_role("option", name="recording toy").click()
    page.wait_for_selector("#tt-explore-prompt svg")
    measure(page, "a recording")
