"""The nodes in a real ComfyUI, whose checkout COMFYUI_CHECKOUT names (and its Python COMFYUI_PYTHON).

Its server runs headless on the CPU, with a tiny checkpoint; workflows are posted through its API.
"""

import asyncio
import copy
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
from PIL import Image

CHECKOUT = os.environ.get("COMFYUI_CHECKOUT")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHECKOUT, reason="COMFYUI_CHECKOUT names no checkout of ComfyUI"),
]
HERE = Path(__file__).parent
NODES = HERE.parents[1] / "integrations" / "comfyui"
PYTHON = os.environ.get("COMFYUI_PYTHON", sys.executable)
PATIENCE = 300  # seconds; nothing takes that long on a quiet machine
STEPS = 6


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """A server with the nodes and a checkpoint; its folder, its URL, and how to run a workflow."""
    home = tmp_path_factory.mktemp("comfy")
    for name in ("models/checkpoints", "models/loras", "custom_nodes", "input", "output", "temp", "user"):
        (home / name).mkdir(parents=True)
    (home / "custom_nodes" / "ttsnap").symlink_to(NODES)
    launch = [PYTHON, str(HERE / "comfy_launch.py")]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parents[1] / 'src'}{os.pathsep}{HERE}"}
    place = {"cwd": CHECKOUT, "env": environment}
    made = home / "models" / "checkpoints" / "tiny.safetensors"
    subprocess.run([*launch, "checkpoint", str(made)], check=True, **place)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--cpu", "--port", str(port), "--listen", "127.0.0.1", "--disable-auto-launch"]
    options += ["--base-directory", str(home), "--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    with (home / "log").open("w") as log:
        server = subprocess.Popen([*launch, *options], stdout=log, stderr=subprocess.STDOUT, **place)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE
        while not _answers(url):
            assert server.poll() is None, (home / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, "ComfyUI did not start"
            time.sleep(0.5)
        yield SimpleNamespace(home=home, url=url, log=home / "log")
    finally:
        server.terminate()
        server.wait(30)


def _answers(url):
    try:
        return httpx.get(f"{url}/system_stats", timeout=5).is_success
    except httpx.HTTPError:
        return False


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def workflow(**changes):
    """Eight candidates of 64 x 64, halved, judged by brightness; the best is saved, and the board."""
    search = {"candidates": 8, "policy": "halving", "seed": 5, "steps": STEPS, "cfg": 4.0, "sampler_name": "euler"}
    search |= {"scheduler": "normal", "denoise": 1.0, "max_batch": 4, "keep": 1, "prompt": "a lamp"}
    search |= {"rungs": "2,4", "keep_ratios": ".5,.5", "policy_file": ""} | changes
    return {
        "1": node("CheckpointLoaderSimple", ckpt_name="tiny.safetensors"),
        "2": node("CLIPTextEncode", text="a lamp", clip=["1", 1]),
        "3": node("CLIPTextEncode", text="dark", clip=["1", 1]),
        "4": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "5": node("TTSnapReward", name="comfy_reward:brightness", device="cpu"),
        "6": node(
            "TTSnapSearch",
            model=["1", 0],
            reward=["5", 0],
            vae=["1", 2],
            positive=["2", 0],
            negative=["3", 0],
            latent_image=["4", 0],
            **search,
        ),
        "7": node("SaveImage", images=["6", 1], filename_prefix="best"),
        "8": node("PreviewAny", source=["6", 3]),
    }


def stock(graph, seed):
    """The same with ComfyUI's own KSampler."""
    asked = graph["6"]["inputs"]
    kept = ("model", "positive", "negative", "latent_image", "steps", "cfg", "sampler_name", "scheduler", "denoise")
    graph = {key: graph[key] for key in "1234"}
    graph["6"] = node("KSampler", seed=seed, **{name: asked[name] for name in kept})
    graph["6b"] = node("VAEDecode", samples=["6", 0], vae=["1", 2])
    graph["7"] = node("SaveImage", images=["6b", 0], filename_prefix="stock")
    return graph


def post(comfy, graph):
    sent = httpx.post(f"{comfy.url}/prompt", json={"prompt": graph, "client_id": "test"}, timeout=PATIENCE)
    assert sent.is_success, sent.text
    return sent.json()["prompt_id"]


def ended(comfy, prompt):
    """What the history says of a workflow, once it has ended."""
    deadline = time.monotonic() + PATIENCE
    while not (found := httpx.get(f"{comfy.url}/history/{prompt}", timeout=PATIENCE).json()):
        assert time.monotonic() < deadline, comfy.log.read_text()[-2000:]
        time.sleep(0.2)
    return found[prompt]


def run(comfy, graph):
    """Outputs of a workflow that must succeed."""
    found = ended(comfy, post(comfy, graph))
    assert found["status"]["status_str"] == "success", json.dumps(found["status"])[-2000:]
    return found["outputs"]


def picture(comfy, outputs, node="7"):
    file = outputs[node]["images"][0]
    got = httpx.get(f"{comfy.url}/view", params=file, timeout=PATIENCE)
    return np.asarray(Image.open(io.BytesIO(got.content)).convert("RGB"))


def alike(one, other):
    """Whether two pictures are the same but for the last bits, which differ in batches."""
    return np.abs(one.astype(int) - other).max() <= 3


def report(outputs):
    return json.loads(outputs["8"]["text"][0])


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "euler_ancestral", "dpmpp_sde", "uni_pc", "heun"])
def test_one_candidate_is_the_picture_that_the_stock_ksampler_makes(comfy, sampler):
    graph = workflow(candidates=1, policy="best-of-n", rungs="", keep_ratios="", sampler_name=sampler)
    found = run(comfy, graph)
    assert np.array_equal(picture(comfy, found), picture(comfy, run(comfy, stock(graph, 5))))
    assert report(found)["seed"] == 5


def test_a_search_drops_candidates_fills_batches_and_its_winner_is_the_stock_picture_of_its_seed(comfy):
    graph = workflow()
    found = run(comfy, graph)
    told = report(found)
    assert told["candidates"] == {"started": 8, "finished": 2}
    assert told["nfe"] == 8 * 2 + 4 * 2 + 2 * 2
    assert told["nfe_if_all_were_finished"] == 8 * STEPS
    assert told["batches"] == 2 * 2 + 2 + 2  # eight in two batches of four, then four, then two
    looks = told["history"]
    assert sorted(map(int, looks)) == list(range(5, 13))
    first = {seed: seen[0]["reward"] for seed, seen in looks.items()}
    kept = {seed for seed, seen in looks.items() if seen[0]["kept"]}
    assert kept == set(sorted(first, key=first.get)[-4:])
    assert str(told["seed"]) in kept
    assert alike(picture(comfy, found), picture(comfy, run(comfy, stock(graph, told["seed"]))))


@pytest.mark.parametrize(
    "policy", ["branching", "evosearch", "svdd", "smc", "restart", "best-first", "early-selection"]
)
def test_policies_that_fork_or_ask_in_another_order_run(comfy, policy):
    steps = STEPS
    told = report(run(comfy, workflow(policy=policy, rungs="", keep_ratios="", candidates=6, steps=steps)))
    assert 1 <= told["candidates"]["finished"] <= 6
    assert told["reward"] == max(
        looks[-1]["reward"] for looks in told["history"].values() if looks[-1]["step"] == steps
    )


def test_samplers_that_hook_into_the_model_run_each_alone(comfy):
    graph = workflow(sampler_name="euler_cfg_pp", candidates=2, policy="best-of-n", rungs="", keep_ratios="")
    found = run(comfy, graph)
    told = report(found)
    assert told["batches"] == told["nfe"] == 2 * STEPS
    assert alike(picture(comfy, found), picture(comfy, run(comfy, stock(graph, told["seed"]))))


def test_a_part_of_a_picture_is_painted_over_as_the_stock_sampler_does(comfy):
    graph = workflow(candidates=1, policy="best-of-n", rungs="", keep_ratios="", denoise=0.6)
    Image.effect_noise((64, 64), 60).convert("RGB").save(comfy.home / "input" / "noise.png")
    graph["10"] = node("LoadImage", image="noise.png")
    graph["11"] = node("VAEEncode", pixels=["10", 0], vae=["1", 2])
    graph["12"] = node("SolidMask", value=1.0, width=32, height=64)
    graph["4"] = node("SetLatentNoiseMask", samples=["11", 0], mask=["12", 0])
    other = stock(graph, 5)
    other |= {key: graph[key] for key in ("10", "11", "12")}
    assert np.array_equal(picture(comfy, run(comfy, graph)), picture(comfy, run(comfy, other)))


def test_the_board_and_a_picked_picture_come_without_a_second_search(comfy):
    graph = workflow(keep=2)
    graph["9"] = node("TTSnapBoard", search=["6", 2])
    graph["10"] = node("SaveImage", images=["9", 0], filename_prefix="board")
    graph["11"] = node("TTSnapPick", search=["6", 2], ranks="2")
    graph["12"] = node("SaveImage", images=["11", 0], filename_prefix="picked")
    found = run(comfy, graph)
    assert len(found["7"]["images"]) == 2
    board, second = picture(comfy, found, "10"), picture(comfy, found, "12")
    assert board.shape[1] == 1240
    Image.fromarray(board).save(comfy.home / "board.png")
    graph["11"]["inputs"]["ranks"] = "1"
    again = post(comfy, graph)
    done = ended(comfy, again)
    cached = next(rest["nodes"] for kind, rest in done["status"]["messages"] if kind == "execution_cached")
    assert "6" in cached
    first = picture(comfy, done["outputs"], "12")
    assert first.mean() > second.mean()
    assert np.array_equal(first, picture(comfy, found, "7"))


def test_progress_counts_calls_and_shows_the_survivors(comfy):
    aiohttp = pytest.importorskip("aiohttp")

    async def watch():
        steps, pictures = [], []
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{comfy.url}/ws?clientId=test") as socket:
            prompt = post(comfy, workflow(seed=100))
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    pictures.append(Image.open(io.BytesIO(message.data[8:])).size)
                    continue
                told = json.loads(message.data)
                if told["type"] == "progress" and told["data"]["node"] == "6":
                    steps.append((told["data"]["value"], told["data"]["max"]))
                if told["type"] == "executing" and told["data"]["node"] is None and told["data"]["prompt_id"] == prompt:
                    return steps, pictures
        raise AssertionError("the socket closed")

    steps, pictures = asyncio.run(asyncio.wait_for(watch(), PATIENCE))
    assert steps[-1] == (28, 28)
    assert [value for value, _ in steps] == sorted(value for value, _ in steps)
    assert list(dict.fromkeys(pictures)) == [(512, 256), (512, 128), (256, 128)]  # eight, four, two


def test_an_interrupt_ends_the_search_and_the_next_one_works(comfy):
    prompt = post(comfy, workflow(steps=500, seed=7, rungs="100,200"))
    time.sleep(3)
    start = time.monotonic()
    assert httpx.post(f"{comfy.url}/interrupt", timeout=PATIENCE).is_success
    found = ended(comfy, prompt)
    assert time.monotonic() - start < 20
    assert any(kind == "execution_interrupted" for kind, _ in found["status"]["messages"]), found["status"]
    assert report(run(comfy, workflow(seed=11)))["candidates"]["finished"] == 2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt": " "}, "the prompt that the reward judges"),
        ({"rungs": "2,9", "keep_ratios": ".5,.5"}, "rung"),
    ],
)
def test_mistakes_are_told_in_one_sentence(comfy, changes, said):
    found = ended(comfy, post(comfy, workflow(**changes)))
    assert found["status"]["status_str"] == "error"
    errors = [rest["exception_message"] for kind, rest in found["status"]["messages"] if kind == "execution_error"]
    assert said in errors[0]


@pytest.mark.parametrize("file", sorted((NODES / "api_workflows").iterdir()), ids=lambda file: file.stem)
def test_the_example_workflows_run(comfy, file):
    graph = copy.deepcopy(json.loads(file.read_text()))
    for one in graph.values():
        inputs = one["inputs"]
        if one["class_type"] == "CheckpointLoaderSimple":
            inputs["ckpt_name"] = "tiny.safetensors"
        if one["class_type"] == "EmptyLatentImage":
            inputs |= {"width": 64, "height": 64}
        if one["class_type"] == "TTSnapReward":
            inputs |= {"name": "comfy_reward:brightness"}
        if one["class_type"] == "TTSnapSearch":
            inputs |= {"steps": STEPS, "candidates": 4}
        if one["class_type"] == "LoraLoader":
            inputs["lora_name"] = _lora(comfy)
    outputs = run(comfy, graph)
    saved = next(key for key, one in graph.items() if one["class_type"] == "SaveImage")
    assert picture(comfy, outputs, saved).shape == (64, 64, 3)


def _lora(comfy):
    """A LoRA of one layer; the UI sees new files at once."""
    import torch
    from safetensors.torch import save_file

    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    torch.manual_seed(0)
    weights = {f"{name}.lora_down.weight": torch.randn(4, 320), f"{name}.lora_up.weight": torch.randn(320, 4)}
    save_file(weights, comfy.home / "models" / "loras" / "tiny.safetensors")
    return "tiny.safetensors"


@pytest.mark.browser
@pytest.mark.parametrize("name", sorted(file.name for file in (NODES / "example_workflows").iterdir()))
def test_every_template_opens_in_the_editor_and_is_the_workflow_of_the_api(comfy, name):
    playwright = pytest.importorskip("playwright.sync_api")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("the editor needs Chromium: apt-get install chromium")
    drawn, asked = (
        json.loads((NODES / folder / name).read_text()) for folder in ("example_workflows", "api_workflows")
    )
    with playwright.sync_playwright() as driver:
        page = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.goto(comfy.url, wait_until="commit")
        page.wait_for_function("() => window.app?.graph && document.querySelector('canvas')")
        page.wait_for_function("() => 'TTSnapSearch' in LiteGraph.registered_node_types")
        script = "async drawn => { await app.loadGraphData(drawn); return (await app.graphToPrompt()).output }"
        made = page.evaluate(script, drawn)
    assert {key: (one["class_type"], one["inputs"]) for key, one in made.items()} == {
        key: (one["class_type"], one["inputs"]) for key, one in asked.items()
    }
