"""Nodes that search: many candidates, early looks, the poor dropped, the best finished."""

from __future__ import annotations

import json
from typing import Any

import comfy.model_management as management
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import ComfyExtension, io
from PIL import Image
from torch import Tensor

from ttsnap import policies, rewards
from ttsnap.core.ranking import read_rule
from ttsnap.live.board import Finish, Row, Tile, draw, fit
from ttsnap.live.settings import read_policy, read_weights

from .search import Found, SearchSampler

CATEGORY = "ttsnap"
NEEDS_MORE = ("hand-picked", "until-good")  # than a name: a person, a reward to stop at
TILES = 16  # pictures of survivors in a preview
SIDE = 128

Reward = io.Custom("TTSNAP_REWARD")
Searched = io.Custom("TTSNAP_SEARCH")


class LoadReward(io.ComfyNode):
    """Loads what judges pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TTSnapReward",
            display_name="Reward (ttsnap)",
            category=CATEGORY,
            description="Loads a reward: a network that judges how good a picture is for a prompt.",
            inputs=[
                io.String.Input(
                    "name",
                    default="imagereward",
                    tooltip=f"{', '.join(rewards.REWARDS)}; several by commas; or module:function of your own.",
                ),
                io.Combo.Input("device", options=["auto", "cpu"], tooltip="auto: where ComfyUI's models run."),
                io.String.Input(
                    "combine",
                    default="",
                    optional=True,
                    tooltip="How several become one: rank-sum (default), weighted-sum, minimum, or 'A where B>=.8'.",
                ),
                io.String.Input("weights", default="", optional=True, tooltip="Of several rewards, such as 1,.5."),
            ],
            outputs=[Reward.Output(display_name="reward")],
        )

    @classmethod
    def execute(cls, name: str, device: str, combine: str = "", weights: str = "") -> io.NodeOutput:
        """Load it."""
        numbers = read_weights(weights.strip() or None)
        rule = read_rule(combine.strip() or None, rewards.names_of(name), numbers)  # complains before anything loads
        loaded = rewards.load(name, management.get_torch_device() if device == "auto" else torch.device("cpu"))
        return io.NodeOutput((loaded, rule))


class Search(io.ComfyNode):
    """The KSampler, of many seeds, of which the poor are dropped early."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        names = [name for name in (*policies.POLICIES, *policies.PRESETS) if name not in NEEDS_MORE]
        return io.Schema(
            node_id="TTSnapSearch",
            display_name="KSampler that searches (ttsnap)",
            category=CATEGORY,
            description="Begins many seeds, looks at them early with a reward, drops the poor and finishes the best. "
            "Each candidate is the picture that KSampler makes of its seed.",
            inputs=[
                io.Model.Input("model"),
                Reward.Input("reward"),
                io.Vae.Input("vae", tooltip="Makes the pictures that the reward judges."),
                io.Conditioning.Input("positive"),
                io.Conditioning.Input("negative"),
                io.Latent.Input("latent_image", tooltip="One latent; its size is that of the pictures."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What the reward asks the pictures for: as a rule the positive prompt.",
                ),
                io.Int.Input("candidates", default=16, min=1, max=1024, tooltip="Seeds: seed, seed + 1, ..."),
                io.Combo.Input("policy", options=names, default="halving", tooltip="Who goes on after a look."),
                io.Int.Input("seed", default=0, min=0, max=2**53 - 1, control_after_generate=True),
                io.Int.Input("steps", default=20, min=1, max=1000),
                io.Float.Input("cfg", default=7.0, min=0.0, max=100.0, step=0.1, round=0.01),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS),
                io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01),
                io.Int.Input("max_batch", default=8, min=1, max=1024, tooltip="Halved when memory runs out."),
                io.Int.Input("keep", default=1, min=1, max=1024, tooltip="Pictures that come out, the best first."),
                io.String.Input("rungs", default="", optional=True, tooltip="Steps at which to look, such as 3,7,12."),
                io.String.Input("keep_ratios", default="", optional=True, tooltip="Share that survives each look."),
                io.String.Input(
                    "policy_file",
                    default="",
                    optional=True,
                    tooltip="FILE.json of ttsnap tune, or the JSON itself, in place of policy.",
                ),
                io.Vae.Input(
                    "preview_vae", optional=True, tooltip="A cheaper VAE for early looks, such as taesd of Load VAE."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent"),
                io.Image.Output(display_name="images"),
                Searched.Output(display_name="search"),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        reward: Any,
        vae: Any,
        positive: Any,
        negative: Any,
        latent_image: dict[str, Any],
        prompt: str,
        candidates: int,
        policy: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        denoise: float,
        max_batch: int,
        keep: int,
        rungs: str = "",
        keep_ratios: str = "",
        policy_file: str = "",
        preview_vae: Any = None,
    ) -> io.NodeOutput:
        """Search."""
        judges, combine = reward
        if not prompt.strip():
            raise ValueError("the search needs the prompt that the reward judges pictures by; it is empty")
        start = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"])
        if len(start) != 1:
            raise ValueError(f"a search begins from one latent, whose seeds are its candidates; got {len(start)}")
        device, batch = model.load_device, min(candidates, max_batch)
        stock = comfy.samplers.KSampler(model, steps, device, sampler_name, scheduler, denoise, model.model_options)
        num_steps = len(stock.sigmas) - 1
        named = read_policy(policy_file.strip() or policy, rungs.strip() or None, keep_ratios.strip() or None)
        chosen = policies.named(named) if isinstance(named, str) else named
        chosen = chosen or policies.default_policy(num_steps)
        plan = chosen.plan(candidates, num_steps)
        calls, before = 0, 0
        for rung in plan:
            calls, before = calls + (rung.step - before) * rung.size, rung.step
        bar = comfy.utils.ProgressBar(calls)

        def progress(made: int, alive: Any) -> None:
            shown = None
            if alive is not None:
                sheet = _sheet(alive)
                shown = ("JPEG", sheet, max(sheet.size))
            bar.update_absolute(made, max(calls, made), shown)

        sampler = SearchSampler(
            comfy.samplers.sampler_object(sampler_name),
            chosen,
            candidates,
            seed,
            prompt,
            judges,
            combine,
            vae.decode,
            (preview_vae or vae).decode,
            batch,
            progress,
        )
        copies = torch.cat([start] * batch)  # so that memory is kept free for a batch
        comfy.samplers.sample(
            model,
            torch.zeros_like(copies),
            positive,
            negative,
            cfg,
            device,
            sampler,
            stock.sigmas,
            model.model_options,
            latent_image=copies,
            denoise_mask=latent_image.get("noise_mask"),
            disable_pbar=True,
            seed=seed,
        )
        found = sampler.found
        assert found is not None
        best = slice(0, min(keep, len(found.ranks)))
        latent = {**latent_image, "samples": found.latents[best].to(management.intermediate_device())}
        return io.NodeOutput(latent, found.images[best], found, _report(found))


class Pick(io.ComfyNode):
    """Takes finished pictures out of a search; the search is not run again for it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TTSnapPick",
            display_name="Pick from search (ttsnap)",
            category=CATEGORY,
            description="Takes finished pictures out of a search by rank, whatever the reward says; look at the board.",
            inputs=[
                Searched.Input("search"),
                io.String.Input("ranks", default="1", tooltip="1 is the best; several by commas, such as 1,3."),
            ],
            outputs=[
                io.Image.Output(display_name="images"),
                io.Latent.Output(display_name="latent"),
                io.Int.Output(display_name="seed", tooltip="Of the first that is picked."),
                io.Float.Output(display_name="reward"),
            ],
        )

    @classmethod
    def execute(cls, search: Found, ranks: str) -> io.NodeOutput:
        """Pick."""
        try:
            places = [int(part) - 1 for part in ranks.split(",")]
        except ValueError:
            raise ValueError(f"ranks are whole numbers by commas, such as 1,3, got {ranks!r}") from None
        if wrong := [place + 1 for place in places if not 0 <= place < len(search.ranks)]:
            raise ValueError(f"the search finished {len(search.ranks)} pictures; there is no rank {wrong[0]}")
        first = places[0]
        seed = search.seeds[search.ranks[first]]
        return io.NodeOutput(search.images[places], {"samples": search.latents[places]}, seed, search.values[first])


class Board(io.ComfyNode):
    """Draws the pruning board."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="TTSnapBoard",
            display_name="Pruning board (ttsnap)",
            category=CATEGORY,
            description="The whole search in one picture: every candidate at every look, its reward, and who was kept.",
            inputs=[Searched.Input("search")],
            outputs=[io.Image.Output(display_name="board")],
        )

    @classmethod
    def execute(cls, search: Found) -> io.NodeOutput:
        """Draw it."""
        rows = [
            Row(
                step,
                [
                    Tile(seed, Image.fromarray(seen.picture), seen.reward, seen.kept, seen.wins)
                    for seed, looks in search.history.items()
                    for seen in looks
                    if seen.step == step
                ],
            )
            for step in sorted({seen.step for looks in search.history.values() for seen in looks})
        ]
        best, seed = _pil(search.images[0]), search.seeds[search.ranks[0]]
        finish = Finish("The winner", best, [f"reward {search.values[0]:.3f} (seed {seed})"])
        board = draw(search.prompt, search.num_steps, rows, [finish], [search.facts])
        pixels = torch.frombuffer(bytearray(board.tobytes()), dtype=torch.uint8)
        return io.NodeOutput(pixels.reshape(1, board.height, board.width, 3).float() / 255)


def _report(found: Found) -> str:
    """A search as a JSON object: who was looked at, and what came of it."""
    return json.dumps(
        {
            "prompt": found.prompt,
            "policy": found.policy,
            "rewards": found.rewards,
            "seed": found.seeds[found.ranks[0]],
            "reward": found.values[0],
            "candidates": {"started": len(found.seeds), "finished": len(found.ranks)},
            "nfe": found.calls,
            "nfe_if_all_were_finished": found.full,
            "seconds": round(found.seconds, 3),
            "batches": found.batches,
            "history": {
                seed: [{"step": seen.step, "reward": seen.reward, "kept": seen.kept} for seen in looks]
                for seed, looks in found.history.items()
            },
        },
        indent=1,
    )


def _pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.clamp(0, 1) * 255).round().to(torch.uint8).numpy())


def _sheet(pictures: Any) -> Image.Image:
    """Small pictures side by side: who is alive."""
    shown = pictures[:TILES]
    columns = min(4, len(shown))
    sheet = Image.new("RGB", (columns * SIDE, -(-len(shown) // columns) * SIDE))
    for number, picture in enumerate(shown):
        tile = fit(Image.fromarray(picture), SIDE)
        sheet.paste(tile, (number % columns * SIDE, number // columns * SIDE))
    return sheet


class TTSnap(ComfyExtension):
    """The nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """All of them."""
        return [LoadReward, Search, Pick, Board]


async def comfy_entrypoint() -> TTSnap:
    """Called by ComfyUI."""
    return TTSnap()
