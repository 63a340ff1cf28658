"""The page in a real browser, on the embedded model. No other host is ever asked (see `visit`)."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request

import pytest
from PIL import Image

pytestmark = pytest.mark.browser

LONG = {"amount": 128, "policy": "best-of-N"}  # some seconds of work


def search(page, name="search", prompt=None, amount=None, policy=None, press=True):
    if prompt is not None:
        page.fill(f"#tt-{name}-prompt textarea", prompt)
    if amount is not None:
        page.fill(f"#tt-{name}-amount input", str(amount))
    if policy is not None:
        page.get_by_role("tabpanel").filter(has=page.locator(f"#tt-{name}-go")).get_by_label("Policy").click()
        page.get_by_role("option", name=policy).click()
    if press:
        page.click(f"#tt-{name}-go")


def ended(page, name="search"):
    page.wait_for_selector(f"#tt-{name}-go:not([disabled])")
    page.wait_for_selector(f"#tt-{name}-outcome :is(img, p)")


def test_a_whole_search_and_its_comparison(page):
    search(page, amount=6)
    page.wait_for_selector("#tt-search-stop:not([disabled])")
    ended(page)
    assert page.locator("#tt-search-board .tt-tile img").count() == 6
    assert page.locator("#tt-search-board .tt-winner").count() == 1
    assert "Done" in page.inner_text("#tt-search-status")
    winner = page.locator("#tt-search-board .tt-winner .tt-seed").inner_text().removeprefix("#")
    assert f"manual_seed({winner})" in page.locator(".cm-content").first.inner_text()
    assert page.locator(".tt-figure svg").first.is_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="result.json").or_(page.get_by_role("button", name="result.json")).first.click()
    record = json.loads(download.value.path().read_text())
    assert str(record["seed"]) == winner
    page.click("#tt-search-compare")
    page.wait_for_selector("#tt-search-outcome figure:nth-child(2) img")
    assert "Best of" in page.inner_text("#tt-search-outcome")


def test_a_bad_prompt_then_a_good_one_by_keyboard_on_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 720})
    page.get_by_role("tab", name="Search").click()
    search(page, prompt="   ", amount=2)
    page.get_by_role("alert").wait_for()
    assert "prompt is empty" in page.get_by_role("alert").inner_text()
    page.keyboard.press("Home")
    for _ in range(40):
        if page.evaluate("() => document.activeElement.closest('#tt-search-prompt') !== null"):
            break
        page.keyboard.press("Shift+Tab")
    else:
        pytest.fail("the prompt cannot be reached with the keyboard")
    page.keyboard.press("Control+A")
    page.keyboard.type("a blue circle")
    page.keyboard.press("Enter")
    page.locator("#tt-search-outcome img[alt*='a blue circle']").wait_for()
    ended(page)
    assert page.get_by_role("alert").count() == 0
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    page.set_viewport_size({"width": 1100, "height": 900})


def test_a_dropped_picture_restores_its_settings(page, tmp_path):
    from ttsnap.files.metadata import Metadata, Parameters, encode

    policy = {"policy": "halving", "rungs": [3], "keep": [0.5]}
    settings = {
        "model": "shapes",
        "reward": "shapes-aware",
        "policy": policy,
        "candidates": 5,
        "seed": 11,
        "size": "64x64",
    }
    own = {"prompt": "a cyan circle", "settings": settings}
    picture = Image.new("RGB", (8, 8))
    (tmp_path / "made.webp").write_bytes(encode(picture, Metadata(Parameters("a cyan circle"), own), kind="WEBP"))
    (tmp_path / "plain.png").write_bytes(encode(picture))
    page.get_by_role("tabpanel").first.get_by_text("Model, reward, seed, size").click()
    page.set_input_files("#tt-search-picture input[type=file]", tmp_path / "made.webp")
    page.wait_for_function("() => document.querySelector('#tt-search-amount input').value == '5'")
    assert page.input_value("#tt-search-prompt textarea") == "a cyan circle"
    assert page.get_by_label("First seed").first.input_value() == "11"
    assert "but for the schedule" in page.inner_text("#tt-search-status")
    page.get_by_label("Clear").first.click()
    page.set_input_files("#tt-search-picture input[type=file]", tmp_path / "plain.png")
    page.wait_for_selector("#tt-search-status .tt-error")
    assert "the picture does not say how it was made" in page.inner_text("#tt-search-status")


def test_the_steps_that_budget_and_policy_choose_stand_in_their_empty_field(page):
    page.get_by_role("tab", name="Search").click()
    if not page.get_by_label("Steps").first.is_visible():
        page.get_by_role("tabpanel").first.get_by_text("Model, reward, seed, size").click()
    steps = "document.querySelector('#tt-search-steps :is(input, textarea)').placeholder"
    for label, choice, shown in (
        ("Policy", "best-of-N", "20"),
        ("Budget in", "GFLOP", "20"),
        ("Policy", "tuned for the model", "4"),
        ("Budget in", "candidates", "20"),
    ):
        page.get_by_label(label, exact=True).first.click()
        page.get_by_role("option", name=choice, exact=True).click()
        page.wait_for_function(f"shown => {steps} == shown", arg=shown)


def test_more_model_options_are_told_when_they_are_wrong_and_used_when_they_are_right(page, tmp_path):
    page.get_by_role("tab", name="Search").click()
    page.get_by_role("tabpanel").first.get_by_role("button", name="More model options").click()
    box = "#tt-search-options :is(input, textarea)"
    page.fill(box, "--vae /etc/passwd")
    page.locator(box).blur()
    page.wait_for_selector("#tt-search-hint .tt-error")
    assert "there is no --vae '/etc/passwd' here" in page.inner_text("#tt-search-hint")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    page.set_input_files("#tt-search-pictures input[type=file]", tmp_path / "photo.png")
    page.get_by_text("photo").first.wait_for()
    page.fill(box, "--image photo.png --preview linear")
    page.locator(box).blur()
    page.wait_for_function("() => !document.querySelector('#tt-search-hint .tt-error')")
    search(page, prompt="a red circle", amount=2)
    page.locator(".cm-content").filter(has_text="FluxImg2ImgPipeline.from_pipe(").first.wait_for()  # not the last one's
    ended(page)
    code = page.locator(".cm-content").first.inner_text()
    assert "PIL.Image.open('photo.png')" in code
    page.fill(box, "")


@pytest.mark.slow
def test_64_candidates_and_nothing_dropped(visit, searches):
    page = visit()
    page.evaluate(
        """() => { window.seen = new Set(); new MutationObserver(() =>
        window.seen.add(document.querySelectorAll('#tt-search-board img').length)).observe(
        document.querySelector('#tt-search-board'), {childList: true, subtree: true}) }"""
    )
    search(page, amount=64)
    ended(page)
    assert page.locator("#tt-search-board .tt-tile").count() == 64
    assert page.locator("#tt-search-board .tt-tile img").count() == 64
    rewards = page.locator("#tt-search-board .tt-reward").all_inner_texts()
    assert len([text for text in rewards if text]) == 64
    assert {32, 64} <= set(page.evaluate("() => [...window.seen]"))  # both batches of the first look were shown


@pytest.mark.slow  # where the search is over before the click there is nothing to stop
def test_stop_keeps_what_is_finished(visit):
    page = visit()
    search(page, **LONG)
    page.wait_for_function("() => document.querySelectorAll('#tt-search-board img').length >= 32")  # one batch is done
    page.click("#tt-search-stop")
    ended(page)
    assert "Stopped" in page.inner_text("#tt-search-status")
    assert page.locator("#tt-search-board .tt-winner").count() == 1
    assert "the best of what was finished" in page.inner_text("#tt-search-outcome")


def test_hand_picked_by_keyboard_and_finished_after_all(page):
    page.get_by_role("tab", name="Hand-picked").click()
    search(page, "hand", amount=8)
    boxes = page.locator("#tt-hand-board input[aria-label^='keep']")
    boxes.first.wait_for()
    assert boxes.count() == 8
    proposed = page.locator("#tt-hand-board input:checked").count()
    assert 0 < proposed < 8
    for number in range(8):
        box = boxes.nth(number)
        if box.is_checked() != (number in (1, 3)):
            box.focus()
            page.keyboard.press("Space")
    page.locator("#tt-hand-continue").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("() => document.querySelectorAll('#tt-hand-board .tt-rungs tbody tr').length == 2")
    page.wait_for_selector("#tt-hand-continue:not([disabled])")
    assert page.locator("#tt-hand-board input:checked").count() == 1
    page.click("#tt-hand-continue")
    ended(page, "hand")
    assert page.locator("#tt-hand-board .tt-winner .tt-seed").inner_text() in ("#1", "#3")
    page.locator("#tt-hand-board input[value='0']").check()
    page.click("#tt-hand-finish")
    page.locator("#tt-hand-board .tt-winner .tt-seed", has_text="#0").wait_for()
    ended(page, "hand")
    assert "seed 0" in page.inner_text("#tt-hand-outcome")  # what is picked is what comes out


@pytest.mark.slow
def test_two_people_at_once(visit, searches):
    one, other = visit(), visit()
    search(one, **LONG)
    one.wait_for_selector("#tt-search-board .tt-tile img")
    search(other, prompt="a green square", amount=4)
    other.wait_for_function("() => document.querySelector('#tt-search-status').innerText.includes('in the queue')")
    assert other.locator("#tt-search-board img").count() == 0
    one.context.close()  # the closed tab's search stops, and the other's begins
    ended(other)
    assert other.locator("#tt-search-board .tt-tile").count() == 4
    other.get_by_role("tab", name="Explore").click()
    other.get_by_label("A recording or a past run").click()
    names = other.get_by_role("option").all_inner_texts()
    assert [name for name in names if "my run" in name and "green" not in name] == []
    assert len([name for name in names if "my run" in name]) == 1


@pytest.mark.slow
def test_a_reload_shows_the_search_that_is_on_and_then_its_end(visit, searches):
    page = visit()
    search(page, prompt="a green circle", amount=64)
    page.wait_for_selector("#tt-search-board .tt-tile img")
    page.reload()
    page.wait_for_selector("#tt-search-board .tt-tile img")
    assert page.locator("#tt-search-board .tt-tile").count() == 64
    assert page.input_value("#tt-search-prompt textarea") == "a green circle"
    page.evaluate("() => document.querySelector('#tt-search-now').click()")  # does nothing where it is over
    ended(page)
    assert page.locator("#tt-search-board .tt-winner").count() == 1
    page.reload()
    ended(page)  # one that is over is shown again, too
    assert "a green circle" in page.locator("#tt-search-outcome img").get_attribute("alt")
    assert len(searches.queue) == 0


@pytest.mark.slow
def test_many_prompts_of_a_file_and_the_runs_they_leave(visit, searches, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\nan elephant\n")
    page = visit()
    page.get_by_role("tab", name="Many prompts").click()
    page.fill("#tt-many-amount input", "2")
    page.set_input_files("#tt-many-file input[type=file]", tmp_path / "prompts.txt")
    page.wait_for_function("() => document.querySelector('#tt-many-hint').innerText.includes('3 prompts')")
    assert "'an elephant' is not a prompt of the shapes world" in page.inner_text("#tt-many-hint")
    page.click("#tt-many-go")
    page.wait_for_function("() => document.querySelectorAll('#tt-many-board img').length == 3")
    page.wait_for_selector("#tt-many-go:not([disabled])")
    page.get_by_role("tab", name="Runs").click()
    page.wait_for_function("() => document.querySelectorAll('#tt-runs-gallery .thumbnail-item').length == 3")
    page.fill("#tt-runs-wanted textarea, #tt-runs-wanted input", "square")
    page.wait_for_function("() => document.querySelectorAll('#tt-runs-gallery .thumbnail-item').length == 1")
    page.locator("#tt-runs-gallery .thumbnail-item").click()
    page.wait_for_selector("#tt-runs-run svg")
    assert "a blue square" in page.inner_text("#tt-runs-run h3")
    page.click("#tt-runs-share")
    page.wait_for_selector("#tt-runs-link textarea, #tt-runs-link input")
    link = page.input_value("#tt-runs-link textarea, #tt-runs-link input")
    other = visit()
    other.goto(link)
    other.wait_for_selector("#tt-runs-run svg")
    assert "a blue square" in other.inner_text("#tt-runs-run h3")
    names = [folder.name for folder in (searches.out / "visitors").iterdir()]
    assert names
    assert not any(name in other.content() for name in names)  # whoever knows it could open all runs
    page.click("#tt-runs-use")
    page.wait_for_function("() => document.querySelector('#tt-search-prompt textarea').value == 'a blue square'")
    page.wait_for_function("() => document.querySelector('#tt-search-amount input').value == '2'")


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1024, 1600])
def test_no_tab_is_wider_than_the_window(visit, width):
    page = visit(viewport={"width": width, "height": 800})
    search(page, amount=4)
    ended(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_compare_two_policies(visit):
    page = visit()
    page.get_by_role("tab", name="Compare").click()
    page.click("#tt-compare-go")
    for side in range(2):
        page.wait_for_selector(f"#tt-compare-outcome-{side} img")
        page.wait_for_selector(f"#tt-compare-board-{side} .tt-winner")  # a part of the page of its own
        assert page.locator(f"#tt-compare-board-{side} .tt-winner").count() == 1
    page.wait_for_selector("#tt-compare-go:not([disabled])")


@pytest.mark.slow
def test_the_best_is_finished_at_once_when_asked(visit):
    page = visit()
    search(page, **LONG)
    page.wait_for_function("() => document.querySelectorAll('#tt-search-board img').length >= 32")
    page.click("#tt-search-now")
    ended(page)
    assert "Finished early, as you asked" in page.inner_text("#tt-search-outcome")
    assert page.locator("#tt-search-board .tt-winner").count() == 1


@pytest.mark.slow
def test_a_tuning_that_is_stopped_takes_the_best_so_far(visit, monkeypatch):
    from ttsnap.app import explore

    monkeypatch.setattr(explore, "TUNE_TRIALS", 100_000)
    monkeypatch.setattr(explore, "TRIALS", 2)
    page = visit()
    page.get_by_role("tab", name="Explore").click()
    page.get_by_label("A recording or a past run").click()
    page.get_by_role("option", name="recording toy").click()
    page.wait_for_selector("#tt-explore-prompt svg")
    page.click("#tt-explore-tune")
    page.wait_for_selector("#tt-explore-stop:not([disabled])")
    page.click("#tt-explore-stop")
    page.wait_for_selector("#tt-explore-schedule p")
    assert "Stopped early; the best so far" in page.inner_text("#tt-explore-schedule")
    assert page.locator("#tt-explore-stop").is_disabled()


def test_explore_a_recording(page, monkeypatch):
    from ttsnap.app import explore

    monkeypatch.setattr(explore, "TUNE_TRIALS", 4)
    monkeypatch.setattr(explore, "TRIALS", 2)
    page.get_by_role("tab", name="Explore").click()
    page.get_by_label("A recording or a past run").click()
    page.get_by_role("option", name="recording toy").click()
    page.wait_for_selector("#tt-explore-chart svg")
    before = page.inner_text("#tt-explore-chart h4")
    slider = page.locator("#tt-explore-budget input[type=range]")
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("before => document.querySelector('#tt-explore-chart h4').innerText != before", arg=before)
    assert page.locator("#tt-explore-prompt svg").is_visible()
    page.click("#tt-explore-tune")
    page.wait_for_selector("#tt-explore-schedule p")
    assert "Tuned for" in page.inner_text("#tt-explore-schedule")
    assert "tuned at" in page.inner_text("#tt-explore-chart table")


def fetch(address):
    try:
        with urllib.request.urlopen(address) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_nothing_outside_the_output_folder_can_be_read(url, searches, tmp_path):
    secret = searches.out.parent / "secret.txt"
    secret.write_text("secret")
    inside = searches.out / "inside.txt"
    inside.write_text("inside")
    (searches.out / "link.txt").unlink(missing_ok=True)
    for path in (
        "/etc/passwd",
        secret,
        f"{searches.out}/../secret.txt",
        f"{searches.out}/%2e%2e/secret.txt",
        f"{searches.out}//..//secret.txt",
        "../secret.txt",
        "pyproject.toml",
        __file__,
    ):
        for route in ("gradio_api/file=", "file=", "gradio_api/file/"):
            status, body = fetch(f"{url}/{route}{urllib.parse.quote(str(path), safe='/%')}")
            assert b"secret" not in body
            assert status >= 400 or b"<html" in body.lower(), path
    assert fetch(f"{url}/gradio_api/file={inside}")[1] == b"inside"
