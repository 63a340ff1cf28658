"""Text on the page can be read: at least 4.5:1 against what is behind it, in both colour schemes and on every tab."""

import pytest

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
  const look = (element, colour, text) => {
    const ground = behind(element), ink = over(parse(colour), ground)
    const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x)
    const ratio = (a + .05) / (b + .05)
    if (ratio < 4.5) poor[text.trim().slice(0, 40)] = [ratio.toFixed(2), colour, ground.join(' '), element.className]
  }
  for (const element of document.querySelectorAll('body *')) {
    if (element.closest('[disabled], [aria-hidden=true], svg, .tt-cut') || !element.checkVisibility()) continue
    const own = [...element.childNodes].filter(n => n.nodeType === 3 && n.textContent.trim()).map(n => n.textContent)
    if (own.length) look(element, getComputedStyle(element).color, own.join(' '))
    if (element.placeholder) look(element, getComputedStyle(element, '::placeholder').color, element.placeholder)
    else if (element.value && ['INPUT', 'TEXTAREA'].includes(element.tagName) && element.type !== 'range')
      look(element, getComputedStyle(element).color, element.value)
  }
  return poor
}"""


@pytest.mark.slow
def test_all_text_stands_out_in_both_colour_schemes(visit, searches):
    page = visit()
    page.fill("#tt-search-amount input", "0")
    page.wait_for_selector("#tt-search-hint .tt-error")  # an error has colours of its own
    for name in ("Search", "Hand-picked", "Many prompts", "Compare", "Runs", "Explore"):
        page.get_by_role("tab", name=name).click()
        for fold in page.get_by_role("tabpanel").get_by_text("Model, reward, seed, size").all():
            if fold.is_visible() and not page.get_by_label("First seed").first.is_visible():
                fold.click()
        for dark in (False, True):
            page.evaluate("dark => document.body.classList.toggle('dark', dark)", dark)
            page.wait_for_timeout(400)  # colours fade over
            assert page.evaluate(MEASURE) == {}, (name, "dark" if dark else "light")
