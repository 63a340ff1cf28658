"""The vision-language judge against a real small HTTP server that answers, fails, delays and garbles."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from PIL import Image

from ttsnap import rewards
from ttsnap.rewards.vlm import VlmJudge

IMAGES = torch.stack([torch.full((3, 8, 8), value / 10) for value in range(6)])
PROMPTS = [f"prompt {n}" for n in range(6)]
EXPECTED = torch.tensor([round(value / 10 * 255) / 255 * 10 for value in range(6)])


class Server:
    """Rates an image by its brightness, after whatever the script says for each request."""

    def __init__(self):
        self.requests, self.script, self.delay = [], [], lambda number: 0.0
        self.active = self.most = 0
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.requests.append((self.path, dict(self.headers), body))
                    number = len(outer.requests) - 1
                    step = outer.script.pop(0) if outer.script else None
                    outer.active += 1
                    outer.most = max(outer.most, outer.active)
                time.sleep(outer.delay(number))
                with lock:
                    outer.active -= 1
                status, headers, text = step or (200, {}, answer(rate(body)))
                if status is None:  # hang up without a word
                    self.close_connection = True
                    return
                data = text.encode()
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


def picture(body):
    url = body["messages"][1]["content"][1]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def rate(body):
    return float(picture(body).mean() / 255 * 10)


def answer(rating):
    return json.dumps({"choices": [{"message": {"content": json.dumps({"rating": rating})}}]})


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def naps():
    return []


@pytest.fixture
def judge(server, naps):
    return VlmJudge(server.url, "model-x", "secret", sleep=naps.append, timeout=5)


def test_ratings_come_in_order_whatever_order_answers_come_in(server, judge):
    server.delay = lambda number: 0.1 * (6 - number)
    torch.testing.assert_close(judge(IMAGES, PROMPTS, sigma=0.5), EXPECTED)
    assert server.most > 1
    path, headers, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "model-x"
    assert body["response_format"]["json_schema"]["strict"] is True
    assert picture(body).shape == (8, 8, 3)
    texts = {json.loads(b["messages"][1]["content"][0]["text"].removeprefix("Prompt: ")) for _, _, b in server.requests}
    assert texts == set(PROMPTS)


def test_no_more_requests_at_a_time_than_allowed(server):
    server.delay = lambda number: 0.03
    VlmJudge(server.url + "/chat/completions", "m", concurrency=2)(IMAGES, PROMPTS)
    assert server.most <= 2
    assert "Authorization" not in server.requests[0][1]


@pytest.mark.parametrize(
    "failure",
    [
        (429, {}, "slow down"),
        (500, {}, "oops"),
        (503, {}, ""),
        (None, {}, ""),
        (200, {}, "garbage"),
        (200, {}, answer(11)),
        (200, {}, answer("7")),
        (200, {}, answer(True)),
        (200, {}, "[]"),
        (200, {}, json.dumps({"choices": []})),
    ],
)
def test_what_may_pass_is_tried_again(server, judge, naps, failure):
    server.script = [failure, failure]
    torch.testing.assert_close(judge(IMAGES[3:4], PROMPTS[3:4]), EXPECTED[3:4])
    assert len(server.requests) == 3
    assert len(naps) == 2
    assert 1 <= naps[0] <= 1.25
    assert 2 <= naps[1] <= 2.5


def test_the_server_says_how_long_to_wait(server, judge, naps):
    server.script = [
        (429, {"Retry-After": "7"}, ""),
        (429, {"Retry-After": "9999"}, ""),
        (503, {"Retry-After": "Tue"}, ""),
    ]
    judge(IMAGES[:1], PROMPTS[:1])
    assert naps[:2] == [7, 60]
    assert 4 <= naps[2] <= 5


def test_a_late_answer_counts_as_none(server, naps):
    server.delay = lambda number: 0.6 if number == 0 else 0.0
    judge = VlmJudge(server.url, "m", sleep=naps.append, timeout=0.3)
    torch.testing.assert_close(judge(IMAGES[5:], PROMPTS[5:]), EXPECTED[5:])
    assert len(naps) == 1


def test_what_will_not_pass_is_one_sentence(server, judge, naps):
    def refused(message, script, times):
        server.script, before = list(script), len(server.requests)
        with pytest.raises(ValueError, match=message) as caught:
            judge(IMAGES[:1], PROMPTS[:1])
        assert "\n" not in str(caught.value)
        assert len(server.requests) - before == times

    refused(r"refused: HTTP 401 bad key; set TTSNAP_VLM_KEY", [(401, {}, "bad\nkey")], 1)
    refused(r"refused: HTTP 400 no images", [(400, {}, "no images")], 1)
    refused(r"gave no rating in 5 attempts: HTTP 503 busy", [(503, {}, "busy")] * 5, 5)
    refused(r"gave no rating in 5 attempts: an answer without a rating: hm", [(200, {}, "hm")] * 5, 5)
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(ValueError, match=r"gave no rating in 5 attempts: ConnectError"):
        judge(IMAGES[:1], PROMPTS[:1])
    with pytest.raises(ValueError, match="6 images need as many prompts, got 1"):
        judge(IMAGES, PROMPTS[:1])


def test_named_by_the_environment(server, monkeypatch):
    for name in ("URL", "MODEL", "KEY"):
        monkeypatch.delenv(f"TTSNAP_VLM_{name}", raising=False)
    with pytest.raises(ValueError, match="reward vlm needs TTSNAP_VLM_URL"):
        rewards.load("vlm")
    monkeypatch.setenv("TTSNAP_VLM_URL", server.url)
    with pytest.raises(ValueError, match="reward vlm needs TTSNAP_VLM_MODEL"):
        rewards.load("vlm")
    monkeypatch.setenv("TTSNAP_VLM_MODEL", "m")
    torch.testing.assert_close(rewards.load("vlm")["vlm"](IMAGES, PROMPTS, sigma=0.0), EXPECTED)
    monkeypatch.setenv("TTSNAP_VLM_URL", "localhost:8000")
    with pytest.raises(ValueError, match="must be an address such as"):
        rewards.load("vlm")


def test_its_seconds_are_in_the_cost_and_in_budgets(server):
    from ttsnap.core.driver import run
    from ttsnap.live.calibration import calibrate
    from ttsnap.live.engine import Clock, Engine
    from ttsnap.live.session import load_sampler
    from ttsnap.pipelines.flops import cost_model
    from ttsnap.policies import BestOfN

    server.delay = lambda number: 0.1
    judges = {"vlm": VlmJudge(server.url, "m", concurrency=4)}
    sampler = load_sampler("shapes", num_inference_steps=2)
    model = cost_model(sampler, judges)
    assert (model.look_tflop, len(server.requests)) == (0, 0)
    measured = calibrate(sampler, judges, model, "a red circle", patience=1.5)
    assert measured.look_seconds(1, 8) >= 0.1
    assert measured.of_plan(BestOfN().plan(8, 2)).seconds >= 0.15  # more than one round of four requests
    engine = Engine(sampler, judges, Clock())
    run(BestOfN(), engine.grid(["a red circle"], np.arange(8)[None]))
    assert engine.clock.looks >= 0.2  # two rounds


def test_a_search_with_it_counts_no_tflop_for_it(server, monkeypatch):
    import ttsnap
    from ttsnap.policies import SuccessiveHalving

    monkeypatch.setenv("TTSNAP_VLM_URL", server.url)
    monkeypatch.setenv("TTSNAP_VLM_MODEL", "m")
    policy = SuccessiveHalving((2,), (0.5,))
    result = ttsnap.search("shapes", "a red circle", reward="vlm", candidates=4, num_inference_steps=3, policy=policy)
    assert len(server.requests) == result.cost.looks == 6  # nothing was asked to count what it costs
    assert 0 <= result.reward <= 10
    assert any("vlm" in note and "seconds" in note for note in result.notes)
