"""Requests, the queue, picking and stopping, without a browser and with the smallest sampler there can be."""

from __future__ import annotations

import json
import re
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from tests.pipelines.toy import ToyReward, toy_sampler
from ttsnap.app import view
from ttsnap.app.history import Tile
from ttsnap.app.queue import Limits, Request
from ttsnap.app.searches import Searches
from ttsnap.app.service import Models
from ttsnap.core.cost import CostModel
from ttsnap.live.session import Session
from ttsnap.policies import SuccessiveHalving

MODEL = CostModel("toy", 1.0, 0.5, 0.25)
VISITOR = "a" * 22
HALVING = SuccessiveHalving((1, 2), keep=(0.5, 0.5))


class Toys(Models):
    """Sessions of the toy pipeline; each denoiser call waits until the gate is open."""

    def __init__(self):
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.begun, self.hold = [], None

    def searcher(self, request):
        if request.prompt == self.hold:
            self.gate.clear()
        self.begun.append(request.prompt)
        if request.prompt == "broken":
            raise RuntimeError("secret detail")
        sampler = toy_sampler(num_steps=4, max_batch=16)
        forward = sampler.pipe.transformer.forward

        def gated(*arguments):
            assert self.gate.wait(20)
            return forward(*arguments)

        sampler.pipe.transformer.forward = gated
        return Session(sampler, {"bright": ToyReward()}, HALVING, request.candidates, MODEL)


@pytest.fixture
def searches(tmp_path):
    searches = Searches(tmp_path / "out", rewards=["shapes"], limits=Limits(waiting=3))
    searches.GRACE = 0.05
    searches.models = Toys()
    return searches


def request(prompt="a", candidates=8, **options):
    return Request(prompt, "shapes", ("shapes",), candidates=candidates, **options)


def begin(searches, *requests, session="a", tab="search"):
    return searches.begin(session, tab, visitor(session), requests)


def visitor(session):
    return session * 22


def wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


def test_a_search_is_saved_and_told_frame_by_frame(searches):
    (job,) = begin(searches, request(candidates=64))
    wait(lambda: not job.active)
    assert job.trouble is None
    assert job.result.started == 64
    assert json.loads((job.folder / "result.json").read_text())["seed"] == job.result.seed
    assert job.folder.parent == searches.home(VISITOR)
    pictures = [frame.board.count("<img") for frame in job.frames]
    assert pictures == sorted(pictures)
    assert {0, 16, 32, 48, 64} <= set(pictures)  # no batch of 64 candidates is dropped
    last = job.frames[-1].board
    assert last.count("tt-winner") == 1
    assert last.count("tt-cut") == 48
    assert last.count("tt-finished") == 15
    assert [rung.looked_at for rung in job.rungs] == [64, 32, 16]
    assert "Done" in job.frames[-1].status


def test_one_at_a_time_and_the_others_see_their_place(searches):
    searches.models.gate.clear()
    first = begin(searches, request("first"), session="1")[0]
    wait(lambda: searches.models.begun == ["first"])
    second = begin(searches, request("second"), session="2")[0]
    third = begin(searches, request("third"), session="3")[0]
    wait(lambda: len(searches.queue) == 3)
    assert "next" in second.status()
    assert "2 before you" in third.status()
    with pytest.raises(ValueError, match="3 searches wait in the queue"):
        begin(searches, request(), session="4")
    with pytest.raises(ValueError, match="one search at a time"):
        begin(searches, request(), session="1", tab="hand")
    searches.close("2")  # the tab is closed while it waits
    wait(lambda: not second.active)
    assert "next" in third.status()
    searches.models.gate.set()
    wait(lambda: not third.active)
    assert searches.models.begun == ["first", "third"]
    assert first.result.images
    assert second.result is None
    with pytest.raises(ValueError, match="no search yet"):
        searches.job(visitor("2"), "search")


def test_a_closed_tab_stops_its_search_and_the_stopped_search_is_saved(searches):
    searches.models.gate.clear()
    (job,) = begin(searches, request())
    wait(lambda: job.phase == "searching")
    searches.close("a")
    wait(lambda: not searches.jobs(visitor("a"), "search"))
    searches.models.gate.set()
    wait(lambda: not job.active)
    assert job.result.stopped
    assert not job.result.images
    assert json.loads((job.folder / "result.json").read_text())["reward"] is None
    assert "Stopped" in job.status()
    assert "before an image was finished" in view.outcome(job.result)


def test_a_page_that_is_opened_again_finds_its_search_at_work(searches):
    searches.models.gate.clear()
    (job,) = begin(searches, request())
    wait(lambda: job.phase == "searching")
    searches.GRACE = 60
    searches.close("a")
    assert searches.welcome("a again", visitor("a")) == visitor("a")
    searches._forget(visitor("a"))  # as the timer does
    assert searches.jobs(visitor("a"), "search") == [job]
    searches.models.gate.set()
    wait(lambda: not job.active)
    assert not job.result.stopped
    assert searches.jobs("b" * 22, "search") == []


def test_the_best_so_far_is_finished_when_there_is_no_time(searches):
    searches.models.gate.clear()
    (job,) = begin(searches, request(candidates=8))
    wait(lambda: job.phase == "searching")
    job.hurry()
    searches.models.gate.set()
    wait(lambda: not job.active)
    assert job.result.finished == 1
    assert len(job.result.images) == 1
    assert job.result.cost.nfe <= 8 + 3
    assert "Finished early" in job.status()
    assert "Finished early" in view.outcome(job.result, job.said)


def test_prompts_of_a_file_are_searched_for_one_after_the_other_and_others_come_between(searches):
    searches.models.gate.clear()
    jobs = searches.begin_all("a", "many", visitor("a"), [request(name) for name in ("one", "two", "three", "four")])
    wait(lambda: searches.models.begun == ["one"])
    other = begin(searches, request("other"), session="b")[0]
    with pytest.raises(ValueError, match="one search at a time"):
        begin(searches, request(), session="a")
    searches.models.hold = "two"
    searches.models.gate.set()
    wait(lambda: "two" in searches.models.begun)
    searches.stop(visitor("a"))
    searches.models.gate.set()
    wait(lambda: not any(job.active for job in [*jobs, other]))
    assert searches.models.begun == ["one", "other", "two"]
    assert jobs[-1].phase == "never"
    assert jobs[0].result.images
    assert other.result.images


def test_spent_and_calls_agree_at_every_moment(searches):
    (job,) = begin(searches, request(candidates=16))
    wait(lambda: not job.active)
    shown = [re.search(r"spent ([\d.]+) TFLOP of .* (\d+) of \d+ calls", frame.status) for frame in job.frames]
    spent = [(float(found[1]), int(found[2])) for found in shown if found]
    assert len(spent) > 3
    assert all(tflop >= calls * MODEL.call_tflop for tflop, calls in spent)
    assert f"spent {job.result.cost.tflop:.4g} TFLOP, {job.result.cost.nfe} calls" in job.status()
    assert "<progress" not in job.status()


def test_a_picture_that_misses_is_not_framed_as_a_winner(searches):
    from dataclasses import replace

    from ttsnap.live.reporting import HeldOut

    (job,) = begin(searches, request())
    wait(lambda: not job.active)
    held_out = HeldOut("checker", 0.75, 0.5, 3, None, 0.0, perfect=1.0)
    missed = replace(job.result, held_out=[held_out])
    assert view.misses(missed)
    assert "tt-win" not in view.outcome(missed)
    assert "It misses something that was asked for. checker, which steered nothing: 0.750 of 1" in view.outcome(missed)
    shown = replace(job.result, held_out=[replace(held_out, reward=1.0)])
    assert "tt-win" in view.outcome(shown)
    assert "It shows all that was asked for" in view.outcome(shown)
    job.missed = True
    assert "tt-missed" in view.board(job)


def test_past_runs_are_found_by_words_and_shared_by_a_name_that_nobody_guesses(searches):
    from ttsnap.app import runs

    for prompt in ("a red circle", "a blue square"):
        (job,) = begin(searches, request(prompt))
        wait(lambda job=job: not job.active)
    assert len(runs.past(searches, VISITOR)) == 2
    (folder,) = runs.past(searches, VISITOR, "SQUARE blue")
    assert folder == job.folder
    assert runs.past(searches, "b" * 22) == []
    token = runs.share(searches, folder)
    assert runs.share(searches, folder) == token
    assert runs.shared(searches, token) == folder
    for wrong in ("x" * 22, "../" + token, "", token + "/"):
        with pytest.raises(ValueError, match="no run by that link"):
            runs.shared(searches, wrong)


def test_a_prompt_that_the_model_was_not_made_for_is_told_before_anything_runs(searches):
    import gradio as gr

    from ttsnap.app.form import Form, requests

    with gr.Blocks():
        form = Form(searches, "x", ["tuned for the model"])
    values = [
        "a dog",
        "candidates",
        4,
        "shapes",
        ["shapes"],
        0,
        "",
        None,
        None,
        "",
        [],
        None,
        None,
        "",
        None,
        "tuned for the model",
    ]
    assert requests(values)[0].size is None
    assert "is not a prompt of the shapes world" in form.told(*values)
    assert "tt-note" in form.told(*values)
    assert form.told("a red circle", *values[1:]) == ""
    assert "tt-error" in form.told("a red circle", *values[1:6], "3x", *values[7:])
    assert not searches.models.begun


@pytest.mark.parametrize("budget", ["candidates 2", "GFLOP 10"])
@pytest.mark.parametrize("policy", ["tuned for the model", "best-of-N"])
def test_the_empty_field_for_steps_shows_what_is_taken(tmp_path, budget, policy):
    from ttsnap.app.form import own_steps, requests

    searches = Searches(tmp_path / "out")
    unit, amount = budget.split()
    values = ["a red circle", unit, float(amount), "shapes", ["shapes-aware"], 0, *[None] * 9, policy]
    shown = own_steps(searches, "shapes", ["shapes-aware"], unit, float(amount), None, policy)
    assert shown == str(searches.models.searcher(requests(values)[0]).sampler.num_steps)
    assert shown == ("4" if (unit, policy) == ("GFLOP", "tuned for the model") else "20")


def test_picking_lets_others_search_meanwhile(searches):
    (job,) = begin(searches, request(by_hand=True))
    wait(lambda: job.phase == "picking")
    assert job.frames[-1].board.count(" checked") == 4  # what the reward proposes
    assert job.frames[-1].board.count('type="checkbox"') == 2 * 8
    assert job.frames[-1].board.count("more like it") == 8
    other = begin(searches, request("other"), session="2")[0]
    wait(lambda: not other.active)
    assert other.result.images
    for wrong, message in (("", "at least one"), ("99", "of this search"), ("x", "of this search")):
        with pytest.raises(ValueError, match=message):
            job.answer(wrong)
    job.answer("0,5")
    wait(lambda: job.phase == "picking" and len(job.rungs) == 2)
    job.answer("0,5")
    wait(lambda: not job.active)
    assert {image.seed for image in job.result.images} == {0, 5}
    assert job.result.cost.nfe == 8 + 2 * 3
    assert job.result.to_dict()["policy"]["policy"] == "hand-picked"
    job.finish("3")
    wait(lambda: not job.active)
    assert {image.seed for image in job.result.images} == {0, 5, 3}
    assert job.result.seed == 3  # what is picked is what comes out, whatever the reward says
    worst = min(job.result.images, key=lambda image: image.reward).seed
    job.finish(str(worst))
    wait(lambda: not job.active)
    assert job.result.seed == worst
    assert f"manual_seed({worst})" in job.result.reproduce
    assert [tile.seed for tile in job.tiles if tile.state == "winner"] == [worst]
    assert json.loads((job.folder / "result.json").read_text())["seed"] == worst
    assert job.result.cost.nfe == 8 + 2 * 3 + 3
    job.compare()
    wait(lambda: not job.active)
    assert job.result.best_of_n.best
    with pytest.raises(ValueError, match="nothing to pick"):
        job.answer("0")


def test_more_like_a_candidate_are_forks_of_it(searches):
    (job,) = begin(searches, request(by_hand=True))
    wait(lambda: job.phase == "picking")
    job.answer("0,5,5+")
    wait(lambda: job.phase == "picking" and len(job.rungs) == 2)
    children = {tile.seed: tile.parent for tile in job.tiles if tile.parent is not None}
    assert children == {1: 5, 2: 5}
    assert job.rungs[-1].looked_at == 4
    job.answer("2")
    wait(lambda: not job.active)
    assert job.result.images[0].seed == 2
    assert job.result.lineage[2].seed == 5
    assert job.result.cost.nfe == 8 + 4 + 2  # children pay for their own calls


def test_what_goes_wrong_is_one_sentence_without_inner_details(searches, caplog):
    (job,) = begin(searches, request("broken"))
    wait(lambda: not job.active)
    assert "RuntimeError" in job.trouble
    assert "secret" not in job.status()
    assert "secret detail" in caplog.text
    assert begin(searches, request("again"))[0] is not job


BAD = {
    "empty": ({"prompt": " \n "}, "prompt is empty"),
    "long": ({"prompt": "x" * 601}, "has 601 characters; at most 600"),
    "many": ({"candidates": 129}, "1 to 128 candidates"),
    "none": ({"candidates": 0}, "1 to 128 candidates"),
    "large": ({"size": "64x4096"}, "size must be 1 to 2048"),
    "no size": ({"size": "wide"}, "--size takes pixels"),
    "guidance": ({"guidance": -1.0}, "guidance must be 0 to 100"),
    "lora": ({"loras": ("/etc/passwd",)}, "there is no LoRA '/etc/passwd' here"),
    "steps": ({"steps": 101}, "steps must be 1 to 100"),
    "seed": ({"seed": -1}, "the seed must be"),
    "model": ({"model": "/etc"}, "there is no model '/etc' here"),
    "reward": ({"rewards": ("os:system",)}, "choose one reward or more of shapes"),
    "policy": ({"policy": "/etc/passwd.json"}, "there is no policy"),
}


@pytest.mark.parametrize("case", BAD)
def test_requests_are_bounded_and_only_what_is_offered_is_loaded(case, searches):
    options, message = BAD[case]
    values = {"prompt": "a", "model": "shapes", "rewards": ("shapes",), "candidates": 4} | options
    with pytest.raises(ValueError, match=message):
        begin(searches, Request(**values))
    assert not searches.models.begun


@pytest.mark.parametrize("name", ["", "..", "../../etc", "a/b", "a" * 21 + "/", "a" * 21 + "\n", None, "a" * 40])
def test_a_visitor_cannot_name_another_folder(name, searches):
    with pytest.raises(ValueError, match="does not know you"):
        searches.home(name)
    made = searches.welcome("page", name)
    assert searches.home(made).parent == searches.out / "visitors"
    assert searches.welcome("page", None) == made  # clicked before it had loaded: the same visitor
    assert searches.welcome("other page", None) != made


def test_what_a_visitor_may_open_is_his_own(searches):
    from ttsnap.app.explore import found, show_run

    (job,) = begin(searches, request())
    wait(lambda: not job.active)
    assert list(found(searches, VISITOR).values()) == [job.folder]
    assert not found(searches, "b" * 22)
    assert not found(searches, "../" + VISITOR)
    html = show_run(job.folder)
    assert "<svg" in html
    assert "data:image/png" in html


def test_prompts_and_notes_are_text_not_html(searches):
    (job,) = begin(searches, request("<script>alert(1)</script> \"&'"))
    wait(lambda: not job.active)
    from ttsnap.app.explore import show_run

    for html in (job.frames[-1].board, job.status(), view.outcome(job.result), show_run(job.folder)):
        assert "<script" not in html


def test_a_look_without_a_picture_has_a_plain_tile_or_the_last_known_picture():
    from ttsnap.app.history import History

    history = History(
        tiles=[Tile(3, "alive", 2, 0.5), Tile(4, "alive", 2, 0.25, np.zeros((4, 4, 3), np.uint8))], num_steps=4
    )
    html = view.board(history)
    assert 'aria-label="seed 3, alive after 2 of 4 calls, reward 0.50"' in html
    assert 'alt="seed 4, alive after 2 of 4 calls, reward 0.25"' in html


def test_a_child_looks_like_its_parent_and_is_named_after_it():
    from ttsnap.app.history import History
    from ttsnap.core.grid import Fork, Query

    history = History(tiles=[Tile(3, "alive", 2, 0.5), Tile(4, "cut", 2, 0.25), Tile(5, "alive", 2, 0.75)], num_steps=4)
    history.forked(
        Fork(np.array([[2, 0, -1]]), 2, np.zeros((1, 3)))
    )  # the first child takes its sibling's parent's place
    assert [(tile.seed, tile.parent, tile.reward) for tile in history.tiles] == [
        (3, 5, 0.75),
        (4, 3, 0.5),
        (5, None, 0.75),
    ]
    assert {tile.state for tile in history.tiles} == {"alive"}
    html = view.board(history)
    assert 'aria-label="seed 4, child of 3, alive after 2 of 4 calls, reward 0.50"' in html
    assert "#4&lt;3</span>" in html
    history.asked(Query(np.array([[True, False, False]]), 3))
    assert [tile.state for tile in history.tiles] == ["running", "cut", "cut"]


def test_a_picture_sets_the_form(searches, tmp_path):
    from ttsnap.app.form import restored
    from ttsnap.policies import to_dict, tuned_policy

    policy = to_dict(tuned_policy("shapes", ["shapes-aware"], 20)[0])
    settings = {"model": "shapes", "reward": "shapes-aware", "steps": 20, "size": "64x64", "candidates": 9, "seed": 4}
    own = {"prompt": "a red circle", "settings": settings | {"policy": policy}}
    values, said = restored(own, searches)
    assert values == [
        *("a red circle", "candidates", 9, "shapes", ["shapes-aware"], 4, "64x64", 20, None, None, [], None, None),
        *("", [], "tuned for the model"),
    ]
    assert said == "These are the settings of the picture"
    other = {"model": "flux", "reward": "hpsv2", "size": "64x32", "guidance": 3.0, "policy": {"policy": "steering"}}
    other |= {"lora": ["style.safetensors"], "negative_prompt": "grey", "scheduler": "ddim"}
    values, said = restored({"prompt": "x", "settings": settings | other}, searches)
    assert values[3:5] == ["shapes", searches.rewards[:1]]
    assert values[6:11] == ["64x32", 20, 3.0, "grey", []]
    assert said.endswith(
        "but for the model flux, the reward hpsv2, the LoRAs, the schedule, which this page cannot set"
    )
    assert values[13] == "--scheduler ddim"


def test_the_page_answers_to_its_own_name_and_pages_alone(searches):
    """A page of another site that has its name point here gets nothing (DNS rebinding)."""
    import http.client
    from urllib.parse import urlsplit

    from ttsnap.app.server import serve

    page, url = serve(searches, port=None, allow_host=["pictures.example"], block=False)
    try:
        where = urlsplit(url)

        def status(**headers):
            connection = http.client.HTTPConnection(where.hostname, where.port, timeout=20)
            connection.putrequest("GET", "/config", skip_host=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

        assert status(Host=where.netloc)[0] == 200
        assert status(Host=f"localhost:{where.port}")[0] == 200
        assert status(Host="pictures.example")[0] == 200
        assert status(Host="evil.example") == (403, "this page is not called 'evil.example'; --allow-host lets it be")
        code, text = status(Host=where.netloc, Origin="http://evil.example")
        assert code == 403
        assert "'http://evil.example' may not ask" in text
        assert status(Host=where.netloc, Origin=f"http://{where.netloc}")[0] == 200
        connection = http.client.HTTPConnection(where.hostname, where.port, timeout=20)
        asked = '{"fn_index": 99999, "data": []}'
        connection.request("POST", "/gradio_api/run/predict", asked, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (404, b"the page has no function 99999")
    finally:
        page.close()


def test_a_search_starts_from_a_visitors_picture_and_does_not_tell_where_the_server_keeps_it(tmp_path):
    from PIL import Image

    from ttsnap.app.service import Models

    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    asked = request("a red circle", 2, image=str(tmp_path / "photo.png"), strength=0.5)
    asked = replace(asked, rewards=("shapes-aware",), steps=4)
    result = Models().searcher(asked).search("a red circle")
    assert "FluxImg2ImgPipeline.from_pipe(" in result.reproduce
    assert "PIL.Image.open('photo.png')" in result.reproduce
    assert str(tmp_path) not in json.dumps(result.to_dict())


def test_a_picture_that_cannot_be_started_from_is_one_sentence(searches, tmp_path):
    from PIL import Image

    (tmp_path / "text.png").write_text("no picture")
    Image.new("RGB", (4000, 200)).save(tmp_path / "long.png")
    for given, message in (
        ({"image": str(tmp_path / "text.png")}, "the picture is not a picture"),
        ({"image": str(tmp_path / "long.png")}, "give a size of at most 2048"),
        ({"strength": 0.5}, "strength needs a picture to start from"),
    ):
        with pytest.raises(ValueError, match=message):
            begin(searches, request(**given))
