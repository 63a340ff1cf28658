"""Loading: hub, directory, single file; what is wrong is one sentence that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file
from torch._dynamo.utils import counters

import ttsnap
from tests.pipelines import tiny, tiny_any, tiny_flow, tiny_sd
from ttsnap.live.session import load_sampler
from ttsnap.pipelines import flops
from ttsnap.pipelines.loading import Loading, compile_denoiser, load_model, place, save_memory, warm_up
from ttsnap.pipelines.running import filled_size
from ttsnap.pipelines.sampler import Sampler
from ttsnap.policies import SuccessiveHalving

SMALL = {"num_inference_steps": 3, "height": 32, "width": 32, "max_sequence_length": 12}
PROMPTS = ["a red circle", "a blue square"]
COMPILER = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def stock():
    return tiny.flux()


@pytest.fixture(scope="module")
def folder(stock, tmp_path_factory):
    """The diffusers directory of `stock`."""
    path = tmp_path_factory.mktemp("flux")
    stock.save_pretrained(path)
    return path


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def fresh(folder):
    return load_model(str(folder), Loading(device="cpu"))


def finished(pipe):
    sampler = Sampler(pipe, **SMALL)
    return sampler.advance(sampler.start(PROMPTS, [1, 2]), 3)


def same(pipe, other, **close):
    torch.testing.assert_close(finished(pipe).latents, finished(other).latents, **close)


def test_a_directory_is_loaded_in_the_dtype_asked_for(folder, stock):
    pipe = load_model(str(folder), Loading(device="cpu", dtype="bfloat16"))
    assert {part.dtype for part in (pipe.transformer, pipe.vae, pipe.text_encoder_2)} == {torch.bfloat16}
    same(fresh(folder), stock)


def _truncate(path):
    file = path / "transformer" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _pickle(path):
    (path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({}, path / "vae" / "diffusion_pytorch_model.bin")


def _index(path, **changes):
    index = path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))


BROKEN = {
    "truncated": (_truncate, "diffusion_pytorch_model.safetensors is truncated: .* bytes are there; download it again"),
    "no weights": (lambda path: (path / "vae" / "diffusion_pytorch_model.safetensors").unlink(), "cannot load model"),
    "pickle": (_pickle, "as a pickle only .* can run code when it is opened; get the model as safetensors"),
    "damaged index": (lambda path: (path / "model_index.json").write_text("{"), "is damaged; download"),
    "own code": (lambda path: _index(path, _class_name=["mine", "MinePipeline"]), "which diffusers .* does not have"),
    "newer": (lambda path: _index(path, _class_name="Flux9Pipeline"), "a Flux9Pipeline, which diffusers"),
    "part missing": (lambda path: shutil.rmtree(path / "vae"), "lacks its folder vae; download"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_directory_is_one_sentence(case, copy):
    change, message = BROKEN[case]
    change(copy)
    with pytest.raises(ValueError, match=message) as caught:
        load_model(str(copy), Loading(device="cpu"))
    assert "\n" not in str(caught.value)


def test_weights_of_a_variant_are_found(tmp_path, folder):
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    for file in half.rglob("*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    theirs, ours = (load_model(str(path), Loading(device="cpu")).transformer.state_dict() for path in (folder, half))
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_offline_a_broken_directory_is_still_told_by_its_file(tmp_path, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "transformer" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=f"cannot load model '{copy}'.*config.json"):
        load_model(str(copy), Loading(device="cpu"))


def test_what_is_no_pipeline_is_told_apart(tmp_path, folder):
    lora = tmp_path / "lora"
    lora.mkdir()
    save_file({"transformer.x.lora_A.weight": torch.ones(2, 2)}, lora / "pytorch_lora_weights.safetensors")
    save_file({"some.weight": torch.ones(2)}, tmp_path / "unknown.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "page.safetensors").write_bytes(b"<!doctype html><html>not found</html>" * 9)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "old.ckpt").write_bytes(b"x")
    for model, message in {
        lora: "it seems to be a LoRA: give its base as --model",
        lora / "pytorch_lora_weights.safetensors": "is a LoRA, not a whole model",
        folder / "transformer": "it holds one part of a pipeline",
        tmp_path: "has no model_index.json",
        tmp_path / "unknown.safetensors": "not a whole model of a known layout",
        tmp_path / "empty.safetensors": "truncated or no safetensors file",
        tmp_path / "page.safetensors": "truncated or no safetensors file",
        tmp_path / "notes.txt": "a model file ends with .safetensors",
        tmp_path / "old.ckpt": "is a pickle, which can run code",
        tmp_path / "absent.ckpt": "is a pickle, which can run code",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_model(str(model), Loading(device="cpu"))


class Hub(BaseHTTPRequestHandler):
    """A hub that refuses: the owner's name says how."""

    ANSWERS: ClassVar = {
        "gated": (403, "GatedRepo"),
        "unknown": (404, "RepoNotFound"),
        "private": (401, "RepoNotFound"),
        "busy": (503, ""),
        "nofile": (404, "EntryNotFound"),
    }

    def do_GET(self):
        status, code = next((answer for name, answer in self.ANSWERS.items() if f"/{name}/" in self.path), (404, ""))
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "no")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


HUB = """
import json, sys, warnings
warnings.simplefilter("ignore")
from ttsnap.pipelines.loading import Loading, load_model
told = {}
for owner in sys.argv[1:]:
    try:
        load_model(owner if "." in owner else owner + "/model", Loading(device="cpu"))
    except ValueError as error:
        told[owner] = str(error)
print(json.dumps(told))
"""


def ask(endpoint, owners, **environment):
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_TELEMETRY": "1"} | environment
    environment |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB, *owners], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_each_refusal_of_the_hub_says_what_to_do(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    told = ask(f"http://127.0.0.1:{server.server_port}", list(Hub.ANSWERS), HF_HOME=str(tmp_path))
    server.shutdown()
    server.server_close()
    assert "is gated: accept its terms" in told["gated"]
    assert "HF_TOKEN" in told["gated"]
    for owner in ("unknown", "private"):
        assert f"there is no model '{owner}/model' on the hub, or it is private" in told[owner]
    assert "the hub answers 503" in told["busy"]
    assert "is no diffusers pipeline" in told["nofile"]
    assert not any("\n" in sentence for sentence in told.values())


@pytest.mark.slow
def test_no_network_and_offline_say_so(tmp_path):
    nobody = "http://127.0.0.1:9"
    assert "the hub cannot be reached" in ask(nobody, ["a"], HF_HOME=str(tmp_path))["a"]
    assert "HF_HUB_OFFLINE is set" in ask(nobody, ["a"], HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1")["a"]


def test_options_are_checked(folder, stock):
    for loading, message in (
        (Loading(device="cpu", offload="disk"), "offload is none, model, sequential, group, got 'disk'"),
        (Loading(device="cpu", offload="model"), "needs an accelerator"),
        (Loading(device="cpu", offload="sequential"), "offload sequential needs an accelerator"),
        (Loading(device="cpu", offload="sequential", compile=True), "does not go with offload sequential"),
        (Loading(device="cpu", config="x"), "config belongs to a single"),
        (Loading(device_map="auto"), "device-map is balanced, got 'auto'"),
        (Loading(device_map="balanced", device="cpu"), "device-map says where a model is, as device does"),
        (Loading(device_map="balanced"), "spreads a model over several GPUs, this machine has 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_model(str(folder), loading)
    with pytest.raises(ValueError, match="offload is for a model that is named"):
        load_sampler(stock, offload="model", **SMALL)


def test_a_device_map_goes_to_diffusers_and_nothing_is_moved_afterwards(folder, monkeypatch):
    from diffusers import DiffusionPipeline

    made, real = [], DiffusionPipeline.from_pretrained

    def here(model, device_map=None, **options):
        made.append(device_map)
        return real(model, **options)

    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", here)
    monkeypatch.setattr(DiffusionPipeline, "to", None)
    load_model(str(folder), Loading(device_map="balanced"))
    assert made == ["balanced"]
    with pytest.raises(ValueError, match="for a diffusers directory or hub id, not for shapes"):
        load_model("shapes", Loading(device_map="balanced"))


def test_a_model_whose_layers_are_in_several_places_is_searched_and_is_not_copied(tmp_path, folder, stock):
    from accelerate import dispatch_model

    expected = finished(stock)
    pipe = fresh(folder)
    places = {name: "disk" if "blocks" in name else "cpu" for name, _ in pipe.transformer.named_children()}
    pipe.transformer = dispatch_model(pipe.transformer, places, main_device="cpu", offload_dir=str(tmp_path))
    assert any(parameter.is_meta for parameter in pipe.transformer.parameters())
    assert torch.equal(finished(pipe).x0, expected.x0)
    with pytest.raises(ValueError, match="for a pipeline that is on one device; leave out --offload or device_map"):
        load_sampler(pipe, devices="cpu,cpu", **SMALL)


def offload(pipe, how):
    """From the CPU to the CPU.

    diffusers makes `cpu:0` of `cpu` for single layers; a parameter that is moved to where it is under this other name
    comes back as a plain tensor, of which accelerate then fails to make a parameter. An accelerator has one name.
    """
    place(pipe, torch.device("cpu"), how)
    for model in pipe.components.values():
        for module in model.modules() if isinstance(model, torch.nn.Module) else ():
            hook = getattr(module, "_hf_hook", None)
            for one in getattr(hook, "hooks", [hook]):
                if getattr(one, "execution_device", None) is not None:
                    one.execution_device = torch.device("cpu")


@pytest.mark.parametrize("how", ["model", "sequential"])
def test_offloaded_models_come_when_they_run_and_give_the_same(how, monkeypatch, tmp_path, folder, stock):
    """The hooks that would move weights to an accelerator fire, and are counted."""
    from accelerate import hooks

    expected = finished(stock)
    images = Sampler(stock, **SMALL).decode(expected.x0)
    pipe = fresh(folder)
    offload(pipe, how)
    came = []
    kind = hooks.CpuOffload if how == "model" else hooks.AlignDevicesHook
    before = kind.pre_forward
    monkeypatch.setattr(
        kind,
        "pre_forward",
        lambda self, module, *a, **k: came.append(type(module).__name__) or before(self, module, *a, **k),
    )
    sampler = Sampler(pipe, **SMALL)
    counted = flops.cost_model(sampler, {"red": tiny.Redness()})
    assert counted.tflops() == flops.cost_model(Sampler(stock, **SMALL), {"red": tiny.Redness()}).tflops()
    state = sampler.advance(sampler.start(PROMPTS, [1, 2]), 1)
    sampler.decode(state.x0)
    state = sampler.advance(state, 3)
    torch.testing.assert_close(state.latents, expected.latents)
    torch.testing.assert_close(sampler.decode(state.x0), images)
    if how == "model":
        assert {"CLIPTextModel", "T5EncoderModel", "FluxTransformer2DModel", "AutoencoderKL"} <= set(came)
    else:
        assert came.count("Linear") > 100
        assert all(parameter.is_meta for parameter in pipe.transformer.parameters())  # they went again
    torch.testing.assert_close(sampler.advance(state_of(sampler), 3).latents, finished_alone(stock))


OFFLOADED = {
    "sd": (tiny_sd.stable_diffusion, {}),
    "sdxl": (tiny_sd.sdxl, {}),
    "sd3": (tiny_sd.sd3, {"max_sequence_length": 12}),
    "FLUX.2": (tiny_flow.flux2, {"max_sequence_length": 64}),
    "FLUX.2 Klein": (tiny_flow.flux2_klein, {"max_sequence_length": 96}),
    "Qwen-Image": (tiny_flow.qwen_image, {"guidance_scale": 3.0}),
    "Z-Image": (tiny_flow.z_image, {"max_sequence_length": 128}),
    "Sana": (tiny_flow.sana, {"max_sequence_length": 48, "use_resolution_binning": False}),
    "PixArt-Sigma": (tiny_flow.pixart, {"max_sequence_length": 12, "use_resolution_binning": False}),
    "video": (tiny_any.ltx, {"num_frames": 9}),
}


QUICK = ("sd", "PixArt-Sigma")


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one not in QUICK)) for one in OFFLOADED]
)
def test_a_search_through_layers_that_come_one_by_one_gives_the_same_bytes(name):
    build, options = OFFLOADED[name]
    pipe = build()
    options = {"num_inference_steps": 3, "height": 32, "width": 32, **options}
    policy = SuccessiveHalving((1, 2), (0.5, 0.5))

    def search():
        return ttsnap.search(pipe, PROMPTS[0], reward=tiny.Redness(), policy=policy, candidates=3, **options)

    before = search()
    offload(pipe, "sequential")
    assert any(parameter.is_meta for parameter in (pipe.components.get("unet") or pipe.transformer).parameters())
    after = search()
    assert after.image.tobytes() == before.image.tobytes()
    assert (after.seed, after.cost.tflop) == (before.seed, before.cost.tflop)
    assert after.reward == pytest.approx(before.reward)


def state_of(sampler):
    return sampler.start(["a green triangle"], [5])


def finished_alone(pipe):
    sampler = Sampler(pipe, **SMALL)
    return sampler.advance(state_of(sampler), 3).latents


def test_slices_and_tiles_change_nothing(folder, stock):
    pipe = load_model(str(folder), Loading(device="cpu", attention_slicing=True, vae_slicing=True))
    assert pipe.vae.use_slicing
    same(pipe, stock)
    save_memory(pipe, Loading(vae_tiling=True))
    assert pipe.vae.use_tiling


def test_the_attention_of_one_model_is_not_that_of_the_others(folder):
    from diffusers.models import attention_dispatch

    before = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0]
    pipe = load_model(str(folder), Loading(device="cpu", attention="_native_math"))
    assert attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] == before
    processors = pipe.transformer.attn_processors.values()
    assert {one._attention_backend.value for one in processors} == {"_native_math"}


def compiled(pipe, **options):
    compile_denoiser(pipe, **options)
    sampler = Sampler(pipe, **SMALL, max_batch=8)
    warm_up(sampler)
    return sampler


def test_a_compiled_batch_is_filled_up_by_less_than_half():
    assert [filled_size(count, 32) for count in (1, 2, 3, 5, 6, 9, 13, 17, 25, 32)] == [
        1,
        2,
        3,
        6,
        6,
        12,
        16,
        24,
        32,
        32,
    ]
    assert filled_size(9, 10) == 10


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "backend"),
    [
        (tiny.flux, "eager"),
        (tiny_sd.sdxl, "eager"),
        (tiny_flow.qwen_image, "eager"),  # keeps texts' lengths
        pytest.param(tiny.flux, "inductor", marks=COMPILER),
    ],
)
def test_after_the_warm_up_nothing_is_compiled_again_and_filling_changes_nobody(build, backend):
    arguments = {name: value for name, value in SMALL.items() if build is tiny.flux or "sequence" not in name}
    pipe = build()
    plain = Sampler(pipe, **arguments, max_batch=8)

    def estimates(sampler, prompt, count):
        return sampler.advance(sampler.start([prompt] * count, list(range(count))), 2).x0

    expected = estimates(plain, "a red circle", 8)
    torch._dynamo.reset()
    counters.clear()
    compile_denoiser(pipe, backend=backend)
    sampler = Sampler(pipe, **arguments, max_batch=8)
    warm_up(sampler)
    before = counters["stats"]["unique_graphs"]
    assert before
    made = {count: estimates(sampler, "a red circle", count) for count in range(8, 0, -1)}
    for prompt in ("a", "a green square left of a blue one", "a hollow blue circle above two red triangles"):
        for count in (5, 3, 1):
            estimates(sampler, prompt, count)
    assert counters["stats"]["unique_graphs"] == before
    assert torch.equal(made[5], made[6][:5])  # five rows and one of nobody, six of six
    assert torch.equal(made[7], made[8][:7])
    for count, x0 in made.items():
        torch.testing.assert_close(x0, expected[:count], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@COMPILER
def test_compiled_to_machine_code_it_gives_the_same(folder, stock):
    torch._dynamo.reset()
    sampler = compiled(fresh(folder))
    state = sampler.advance(sampler.start(PROMPTS, [1, 2]), 3)
    torch.testing.assert_close(state.latents, finished(stock).latents, atol=1e-4, rtol=1e-3)
