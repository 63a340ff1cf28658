"""The server as OpenAI's own client sees it, on the embedded model."""

from __future__ import annotations

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.server.conftest import KEYS, PATIENCE, until
from ttsnap.files import metadata
from ttsnap.server.settings import ServerSettings

openai = pytest.importorskip("openai", reason="the server is tested with its client: pip install openai")
PROMPT = "a red circle left of a blue square"
SLOW = "a green circle above a yellow square"


def picture(text):
    return Image.open(io.BytesIO(base64.b64decode(text)))


def assert_alike(one, other):
    """The same picture, but for what the company in a batch does to the last digits."""
    assert one.size == other.size
    assert abs(np.asarray(one.convert("RGB"), int) - np.asarray(other.convert("RGB"), int)).max() <= 2


def count(client, name, **labels):
    """A number that Prometheus would read."""
    from prometheus_client.parser import text_string_to_metric_families

    text = httpx.get(f"{client.base_url}../metrics", headers={"Authorization": f"Bearer {KEYS[0]}"}).text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


def test_n_pictures_are_n_searches_each_as_the_library_makes_it(client, served):
    answer = client.images.generate(prompt=f"  {PROMPT} ", model="shapes", n=2, extra_body={"seed": 5})
    session = served[1].session()
    for place, item in enumerate(answer.data):
        (alone,) = session.block([PROMPT], seed=5 + 4 * place, previews=False)
        assert_alike(picture(item.b64_json), alone.image)
        own = metadata.read(io.BytesIO(base64.b64decode(item.b64_json))).own
        assert own | {"reward": 0, "rewards": 0} == dict(alone.metadata().own) | {"reward": 0, "rewards": 0}
        assert own["reward"] == pytest.approx(alone.reward, abs=1e-3)
        assert item.ttsnap["seed"] == alone.seed
        assert item.ttsnap["cost"]["nfe"] == alone.cost.nfe
    assert (answer.size, answer.output_format, answer.quality) == ("64x64", "png", "auto")
    assert answer.usage.total_tokens == 0


def test_other_devices_are_one_set_of_replicas_for_all_lanes_which_end_with_the_server(monkeypatch):
    from ttsnap.live.settings import ModelSettings, SearchSettings
    from ttsnap.pipelines import replicas
    from ttsnap.server.lanes import CallOptions, Search
    from ttsnap.server.metrics import Metrics
    from ttsnap.server.worker import Worker

    made = []

    class Counted:
        count = 2

        def __init__(self, sampler, devices):
            self.devices, self.dealt, self.closed = devices, 0, False
            made.append(self)

        def deal(self, runner, group):
            self.dealt += 1
            return []

        def close(self):
            self.closed = True

    monkeypatch.setattr(replicas, "Replicas", Counted)
    settings = ModelSettings(steps=4, devices="cpu,cpu")
    worker = Worker(settings, SearchSettings(candidates=2), ServerSettings(port=0), Metrics())
    worker.start()
    ended = threading.Semaphore(0)
    for options in (CallOptions(), CallOptions(steps=3)):
        before = made[0].dealt
        worker.submit([Search(PROMPT, 0, options=options, done=lambda outcome: ended.release())])
        assert ended.acquire(timeout=PATIENCE)
        assert made[0].dealt > before
    assert worker.lanes == 2
    worker.close(PATIENCE)
    assert [(one.devices, one.closed) for one in made] == [(["cpu", "cpu"], True)]


def test_a_stream_shows_what_becomes_of_the_picture(client):
    options = {"prompt": PROMPT, "extra_body": {"seed": 1}}
    whole = client.images.generate(**options)
    events = list(client.images.generate(**options, stream=True, partial_images=2))
    assert [event.type for event in events] == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert [picture(event.b64_json).size for event in events] == [(64, 64)] * 3
    first, second, last = (np.asarray(picture(event.b64_json).convert("RGB"), float) for event in events)
    assert abs(second - last).mean() < abs(first - last).mean()
    assert events[-1].b64_json == whole.data[0].b64_json


def test_clients_at_the_same_time_share_batches_and_get_what_each_gets_alone(client):
    asked = [(f"a {colour} circle", steps) for steps in (8, 6) for colour in ("red", "blue", "green", "cyan")]

    def ask(one):
        prompt, steps = one
        options = {"seed": 3, "num_inference_steps": steps}
        return picture(client.images.generate(prompt=prompt, extra_body=options).data[0].b64_json)

    before = count(client, "ttsnap_batch_candidates_total"), count(client, "ttsnap_batch_places_total")
    alone = [ask(one) for one in asked]
    between = count(client, "ttsnap_batch_candidates_total"), count(client, "ttsnap_batch_places_total")
    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(ask, asked))
    after = count(client, "ttsnap_batch_candidates_total"), count(client, "ttsnap_batch_places_total")
    for one, other in zip(together, alone, strict=True):
        assert_alike(one, other)
    assert len({one.tobytes() for one in alone}) == len(asked)
    taken, taken_together = between[0] - before[0], after[0] - between[0]
    assert taken_together == taken  # as many denoiser calls, in
    assert after[1] - between[1] < 0.7 * (between[1] - before[1])  # fewer batches


def test_what_nobody_waits_for_any_more_is_stopped(client, served):
    url, worker = served
    before = count(client, "ttsnap_searches_total", outcome="cancelled")
    body = {"prompt": SLOW, "n": 3, "quality": "max"}
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    for stream in (False, True):
        with httpx.Client(timeout=None) as other:

            def ask(other=other, stream=stream):
                try:
                    with other.stream(
                        "POST", f"{url}/v1/images/generations", json=body | {"stream": stream}, headers=headers
                    ) as r:
                        r.read()
                except (httpx.HTTPError, RuntimeError, OSError):
                    pass

            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            until(lambda: worker.running == 3 and worker.open_calls > 0, "the searches began")
            import socket

            for connection in other._transport._pool.connections:
                connection._connection._network_stream._sock.shutdown(socket.SHUT_RDWR)
            thread.join(30)
        until(lambda: not worker._open, "the searches ended")
        assert worker.open_calls == worker.waiting == 0
    assert count(client, "ttsnap_searches_total", outcome="cancelled") == before + 6


def test_too_much_is_refused_with_a_time_to_come_back(client, served):
    url, worker = served
    other = openai.OpenAI(base_url=f"{url}/v1", api_key=KEYS[1], max_retries=0)
    stream = client.images.generate(prompt=SLOW, n=10, quality="max", stream=True)
    with stream, other:
        until(lambda: len(worker._open) == 10, "they were taken")
        with pytest.raises(openai.RateLimitError, match="you wait for 10 pictures already; at most 10") as mine:
            client.images.generate(prompt=PROMPT)
        with pytest.raises(openai.InternalServerError, match="the queue is full: 10 pictures of 12") as all_of_us:
            other.images.generate(prompt=PROMPT, n=3)
        assert all_of_us.value.status_code == 503
        for refused in (mine, all_of_us):
            assert 1 <= int(refused.value.response.headers["retry-after"]) <= 600
    until(lambda: not worker._open, "the stream's searches ended")
    assert client.images.generate(prompt=PROMPT).data


WRONG = {
    "control": ({"prompt": "a\x00b"}, "prompt has a control character"),
    "away": ({"extra_body": {"negative_prompt": "b\x00"}}, "the negative prompt has a control character"),
    "empty": ({"prompt": "  "}, "prompt is empty"),
    "model": ({"model": "dall-e-9"}, "there is no model 'dall-e-9' here; there is shapes, gpt-image-1"),
    "n": ({"n": 11}, "n: Input should be less than or equal to 10"),
    "size": ({"size": "512"}, "size: it is auto or such as 512x512, at most 96 pixels a side, got '512'"),
    "large": ({"size": "128x64"}, "at most 96 pixels"),
    "quality": ({"quality": "superb"}, "quality: it is low, .*or a budget such as 200NFE"),
    "budget": ({"quality": "2NFE"}, "budget 2 NFE is too small for one image"),
    "many": ({"quality": "999999NFE"}, "a search here starts at most 256 candidates"),
    "steps": ({"extra_body": {"steps": 201}}, "steps: at most 200"),
    "unknown": ({"extra_body": {"cfg": 3}}, "there is no parameter 'cfg'; there are prompt"),
    "transparent": ({"background": "transparent"}, "background"),
    "strength": ({"extra_body": {"strength": 0.5}}, "strength: it belongs to /v1/images/edits"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_is_one_sentence(case, client, served):
    given, message = WRONG[case]
    with pytest.raises(openai.APIStatusError, match=message) as refused:
        client.images.generate(**{"prompt": PROMPT, "model": "gpt-image-1"} | given)
    assert refused.value.status_code == (404 if case == "model" else 400)
    assert refused.value.type == "invalid_request_error"
    assert not served[1]._open


def test_formats_urls_and_metadata(client):
    options = {"prompt": PROMPT, "extra_body": {"seed": 1, "guidance": 4.0}}
    answer = client.images.generate(**options, output_format="webp", output_compression=80, response_format="url")
    got = httpx.get(answer.data[0].url)
    assert got.headers["content-type"] == "image/webp"
    says = metadata.read(io.BytesIO(got.content))
    assert (says.parameters.prompt, says.own["settings"]["guidance"]) == (PROMPT, 4.0)
    assert httpx.get(answer.data[0].url[:-8] + "xxx.webp").status_code == 404
    jpeg = client.images.generate(**options, output_format="jpeg", quality="40NFE").data[0]
    assert picture(jpeg.b64_json).format == "JPEG"
    assert 20 < jpeg.ttsnap["cost"]["nfe"] <= 40


def test_edits_start_from_the_picture(client):
    made = client.images.generate(prompt=PROMPT, extra_body={"seed": 1}).data[0].b64_json
    before = np.asarray(picture(made).convert("RGB"), float)
    file = ("picture.png", base64.b64decode(made), "image/png")
    other = {"prompt": "a green circle", "extra_body": {"seed": 0}}
    plain = client.images.generate(**other).data[0].b64_json
    edited = client.images.edit(image=file, prompt="a green circle", extra_body={"strength": 0.3, "seed": 0}).data[0]
    own = metadata.read(io.BytesIO(base64.b64decode(edited.b64_json))).own
    assert own["settings"]["strength"] == 0.3
    assert own["local"] == ["image"]
    near, far = (
        abs(np.asarray(picture(one).convert("RGB"), float) - before).mean() for one in (edited.b64_json, plain)
    )
    assert near < 0.5 * far
    plain = io.BytesIO()
    Image.new("RGB", (64, 64)).save(plain, "PNG")
    with pytest.raises(openai.BadRequestError, match="mask: it has no transparent pixels"):
        client.images.edit(image=file, mask=("mask.png", plain.getvalue()), prompt="x")
    with pytest.raises(openai.BadRequestError, match="image: give one picture as a file, got 2"):
        client.images.edit(image=[file, file], prompt="x")
    with pytest.raises(openai.BadRequestError, match="image: it is not a picture"):
        client.images.edit(image=("a.png", b"nothing"), prompt="x")


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == ["shapes", "gpt-image-1"]
    assert client.models.retrieve("shapes").owned_by == "ttsnap"
    with pytest.raises(openai.NotFoundError, match="there is no model 'x'"):
        client.models.retrieve("x")


def test_only_who_should_gets_in(served):
    url = served[0]
    key = {"Authorization": f"Bearer {KEYS[1]}"}
    port = url.rpartition(":")[2]

    def status(path="/v1/models", **headers):
        return httpx.get(f"{url}{path}", headers=headers).status_code

    assert status(**key) == 200
    assert status("/healthz") == 200
    assert status("/metrics") == status() == status(Authorization="Bearer key-number-on") == 401
    assert status(**key, Host=f"localhost:{port}") == 200
    assert status(**key, Host="evil.example") == status("/healthz", Host="evil.example") == 403
    assert status(**key, Origin="https://evil.example") == status(**key, Origin="null") == 403
    assert status(**key, Origin=url) == 200
    large = httpx.post(f"{url}/v1/images/generations", headers=key, json={"prompt": "x" * (2 << 20)})
    assert large.status_code == 413
    assert "larger than 1 MiB" in large.json()["error"]["message"]
    broken = httpx.post(f"{url}/v1/images/generations", headers=key | {"Content-Type": "application/json"}, content="{")
    assert broken.status_code == 400
    assert httpx.get(f"{url}/nowhere", headers=key).json()["error"]["message"] == "there is no GET /nowhere here"


def test_other_machines_need_a_key_or_a_word(monkeypatch):
    monkeypatch.delenv("TTSNAP_API_KEY", raising=False)
    for host in ("0.0.0.0", "192.168.1.5", "::", "my-machine"):
        with pytest.raises(ValueError, match="lets other machines in"):
            ServerSettings(host=host)
        assert ServerSettings(host=host, insecure=True).keys == ()
    assert ServerSettings(host="localhost").keys == ServerSettings(host="::1").keys == ()
    monkeypatch.setenv("TTSNAP_API_KEY", "one-of-them, another-one")
    assert ServerSettings(host="0.0.0.0").keys == ("one-of-them", "another-one")
    for wrong in ("short", "with space in it"):
        with pytest.raises(ValueError, match="an API key has at least 8"):
            ServerSettings(api_key=(wrong,))


def test_pictures_are_handed_out_for_an_hour():
    from ttsnap.server.files import Files

    files = Files(most=10)
    first, second = files.add(b"x" * 6, "png"), files.add(b"y" * 6, "png")
    assert files.get(first) is None  # the second did not fit beside it
    assert files.get(second).data == b"y" * 6
    late = Files(seconds=-1)
    assert late.get(late.add(b"x", "png")) is None


def test_what_the_server_is_told_of_the_search_is_what_it_searches_with(tmp_path):
    """Also the rule for several rewards, and the steps that a policy file was tuned with."""
    from ttsnap import policies
    from ttsnap.core.ranking import Minimum
    from ttsnap.live.settings import ModelSettings, SearchSettings
    from ttsnap.policies import SuccessiveHalving, UntilGood
    from ttsnap.server.metrics import Metrics
    from ttsnap.server.settings import ServerSettings
    from ttsnap.server.worker import Worker

    made = SuccessiveHalving((0.5,), (0.5,))
    policies.save(made, tmp_path / "tuned.json", provenance={"num_steps": 4, "steps": [4, 20]})
    search = SearchSettings(
        reward="shapes,shapes-checker", combine="minimum", weights="1,.5", stop_at=2.0, candidates=6,
        policy=str(tmp_path / "tuned.json"),
    )  # fmt: skip
    worker = Worker(ModelSettings(), search, ServerSettings(), Metrics())
    worker.start()
    try:
        session = worker.session()
        assert session.combine == Minimum((1.0, 0.5))
        assert session.policy == UntilGood(2.0, inner=made)
        assert session.sampler.num_steps == 4
        assert session.candidates == 6
    finally:
        worker.close()
