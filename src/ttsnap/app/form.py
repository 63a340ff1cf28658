"""The form of a search: its fields, what they say, and what they are to say for a picture's settings."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ttsnap import policies
from ttsnap.app import view
from ttsnap.app.job import sentence
from ttsnap.app.queue import POLICIES, USUAL, Request
from ttsnap.app.searches import Searches
from ttsnap.files.metadata import FORMATS
from ttsnap.live.rerun import options
from ttsnap.pipelines.models import MODELS

UNITS = {"candidates": None, "denoiser calls": "NFE", "GFLOP": "GFLOP", "TFLOP": "TFLOP", "seconds": "s"}
OWN = "the model's own"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
Update = dict[Any, Any]


def short(name: str) -> str:
    """A model or LoRA as a list shows it: of a path its end; the whole path stands below."""
    return name if name in MODELS or name.count("/") < 2 else f"…/{'/'.join(Path(name).parts[-2:])}"


class Form:
    """The fields of a request, with these policies and this budget to begin with."""

    def __init__(
        self,
        searches: Searches,
        name: str,
        policies: Sequence[str],
        unit: str = "candidates",
        amount: float = USUAL,
        prompts: bool = False,
    ) -> None:
        self.searches, first = searches, searches.offered[0]
        if prompts:
            self.prompt: Any = gr.File(
                label="Prompts: a .txt with one a line, or a table, JSON or JSON lines",
                file_types=[".txt", ".csv", ".tsv", ".json", ".jsonl"],
                height=190,
                elem_id=f"tt-{name}-file",
            )
        else:
            self.prompt = gr.Textbox(
                MODELS[first].example if first in MODELS else "",
                label="Prompt",
                lines=1,
                max_length=searches.limits.prompt,
                elem_id=f"tt-{name}-prompt",
                placeholder="what to paint",
            )
        with gr.Row():
            self.unit = gr.Dropdown(list(UNITS), value=unit, label="Budget in", min_width=130, scale=3)
            self.amount = gr.Number(
                amount, label="Budget", minimum=0, min_width=100, scale=2, elem_id=f"tt-{name}-amount"
            )
            self.policies = [
                gr.Dropdown(list(POLICIES), value=value, label=label, min_width=180, scale=3)
                for label, value in zip(
                    ["Policy"] if len(policies) == 1 else ["One policy", "The other"], policies, strict=True
                )
            ]
        with gr.Accordion("Model, reward, seed, size, guidance", open=False):
            with gr.Row():
                models = [(short(offer), offer) for offer in searches.offered]
                self.model = gr.Dropdown(models, value=first, label="Model", min_width=160, info=_whole(first))
                self.rewards = gr.Dropdown(
                    searches.rewards, value=searches.rewards[:1], multiselect=True, label="Rewards", min_width=160
                )
                self.loras = gr.Dropdown(
                    [(short(lora), lora) for lora in searches.loras],
                    multiselect=True,
                    label="LoRAs",
                    min_width=160,
                    visible=bool(searches.loras),
                )
            own = placeholders(searches, first)
            with gr.Row():
                self.size = gr.Textbox(
                    label="Size (width x height, or 3:2)", placeholder=own["size"], min_width=150, max_length=20
                )
                self.steps = gr.Textbox(label="Steps", min_width=100, placeholder=own["steps"], max_length=6)
                self.guidance = gr.Textbox(label="Guidance", min_width=100, placeholder=OWN, max_length=12)
            self.negative = gr.Textbox(
                label="Negative prompt", placeholder="what to stay away from", max_length=searches.limits.prompt
            )
            with gr.Row():
                self.image = gr.Image(
                    type="filepath",
                    format="png",
                    sources=["upload", "clipboard"],
                    label="Start from a picture, or show it to an editing model",
                    height=180,
                    elem_id=f"tt-{name}-image",
                )
                self.strength = gr.Textbox(
                    label="Strength: how far from it, 0 to 1", min_width=160, placeholder=OWN, max_length=6
                )
            with gr.Row():
                self.seed = gr.Number(0, label="First seed", precision=0, minimum=0, min_width=100)
                self.dice = gr.Button("Random seed", min_width=120, elem_id=f"tt-{name}-dice")
            if not prompts and len(policies) == 1:
                self.picture = gr.File(
                    label="Or a picture that ttsnap made: its settings",
                    file_types=list(FORMATS),
                    height=140,
                    elem_id=f"tt-{name}-picture",
                )
        self.hint = gr.HTML(elem_id=f"tt-{name}-hint")
        self.fields = [
            self.prompt,
            self.unit,
            self.amount,
            self.model,
            self.rewards,
            self.seed,
            self.size,
            self.steps,
            self.guidance,
            self.negative,
            self.loras,
            self.image,
            self.strength,
            *self.policies,
        ]

    def wire(self) -> None:
        """Tell mistakes as soon as a field is left, and what the model's own size and steps are."""
        self.dice.click(lambda: random.randrange(2**31), None, self.seed, **QUIET)
        self.model.change(self.of_model, self.model, [self.model, self.size, self.steps], **QUIET)
        if isinstance(self.prompt, gr.Textbox):
            typed = (self.prompt, self.size, self.steps, self.guidance, self.negative, self.strength)
            left = [field.blur for field in typed]
            changed = [field.change for field in (self.amount, self.model, self.rewards)]
            gr.on([*left, *changed], self.told, self.fields, self.hint, **QUIET)

    def of_model(self, model: str) -> Update:
        """Its whole name, and its own size and steps."""
        own = placeholders(self.searches, model)
        return {
            self.model: gr.update(info=_whole(model)),
            self.size: gr.update(placeholder=own["size"]),
            self.steps: gr.update(placeholder=own["steps"]),
        }

    def told(self, *values: Any) -> str:
        """What is wrong with the fields, or to be said of the prompt, before anything runs."""
        try:
            asked = [self.searches.check(request) for request in requests(values)]
        except Exception as error:
            return view.hint(sentence(error), wrong=True)
        said = self.searches.models.unread(asked[0].model, asked[0].prompt)
        return view.hint(said) if said else ""

    def values(self, request: Request) -> list[Any]:
        """What the fields say of a request."""
        unit, amount = "candidates", float(request.candidates or 0)
        if request.budget is not None:
            kind = next(kind for kind in UNITS.values() if kind and request.budget.endswith(kind))
            unit, amount = next(u for u, k in UNITS.items() if k == kind), float(request.budget.removesuffix(kind))
        return [
            request.prompt,
            unit,
            amount,
            request.model,
            list(request.rewards),
            request.seed,
            request.size,
            request.steps,
            request.guidance,
            request.negative_prompt,
            list(request.loras),
            request.image,
            request.strength,
            request.policy,
        ]


def placeholders(searches: Searches, model: str) -> dict[str, str]:
    """What stands in the empty fields for size and steps."""
    own = searches.models.defaults(model)
    return {name: str(own[name]) if name in own else OWN for name in ("size", "steps")}


def _whole(model: str) -> str | None:
    return None if short(model) == model else model


def restored(own: Mapping[str, Any], searches: Searches) -> tuple[list[Any], str]:
    """What the fields of a form with one policy are to say for a picture's settings, and what they cannot.

    Args:
        own: what the picture says of itself.
        searches: what is offered.
    """
    settings, missing = options(own), []
    model = settings.get("model")
    if model not in searches.offered:
        model = next((offer for offer in searches.offered if Path(offer).name == model), None)
    if model is None:
        model = searches.offered[0]
        missing.append(f"the model {settings.get('model')}")
    rewards = [name for name in str(settings.get("reward", "")).split(",") if name in searches.rewards]
    if ",".join(rewards) != settings.get("reward"):
        missing.append(f"the reward {settings.get('reward')}")
    loras = [offer for lora in settings.get("lora", ()) for offer in searches.loras if Path(offer).name == lora]
    if len(loras) != len(settings.get("lora", ())):
        missing.append("the LoRAs")
    steps = settings.get("steps")
    policy = policies.parse(settings["policy"])
    kind = policies.to_dict(policy)["policy"]
    found = policies.tuned_policy(model, rewards, steps)
    tuned = found is not None and found[0] == policy
    label = next((label for label, name in POLICIES.items() if name == (None if tuned else kind)), None)
    if label is None or (kind == "halving" and not tuned and policy != policies.default_policy(steps or 0)):
        missing.append("the schedule")
    also = ("scheduler", "diversity", "weights", "look_frames")
    missing += [name.replace("_", " ") for name in also if name in settings]
    missing += ["the picture that it started from"] if "image" in own.get("local", ()) else []
    values = [own["prompt"], "candidates", settings["candidates"], model, rewards or searches.rewards[:1]]
    values += [settings["seed"], settings.get("size"), steps, settings.get("guidance")]
    values += [settings.get("negative_prompt"), loras, None, settings.get("strength")]
    values.append(label or next(iter(POLICIES)))
    said = "These are the settings of the picture"
    return values, f"{said}, but for {', '.join(missing)}, which this page cannot set" if missing else said


def _number(text: Any, kind: Callable[[str], Any], name: str, example: str) -> Any:
    """The number in a field; None where it is empty."""
    if text is None or not str(text).strip():
        return None
    try:
        return kind(str(text).strip())
    except ValueError:
        raise ValueError(f"{name} takes a number such as {example}, got {text!r}") from None


def requests(values: Sequence[Any], *, by_hand: bool = False) -> list[Request]:
    """What the fields of a form say, one request per policy."""
    prompt, unit, amount, model, rewards, seed, size, steps, guidance, negative, loras, image, strength, *policies = (
        values
    )
    if unit not in UNITS:
        raise ValueError(f"there is no budget in {unit!r}; there is {', '.join(UNITS)}")
    if amount is None or not 0 < float(amount) < 1e12:
        raise ValueError("the budget must be a number above 0")
    kind = UNITS[unit]
    return [
        Request(
            prompt=str(prompt or ""),
            model=str(model),
            rewards=tuple(rewards or ()),
            policy=str(policy),
            budget=None if kind is None else f"{float(amount):.12g}{kind}",
            candidates=int(amount) if kind is None else None,
            seed=int(seed or 0),
            size=str(size).strip() or None if size else None,
            steps=_number(steps, int, "steps", "20"),
            guidance=_number(guidance, float, "guidance", "3.5"),
            negative_prompt=str(negative).strip() or None if negative else None,
            loras=tuple(loras or ()),
            image=str(image) if image else None,
            strength=_number(strength, float, "strength", ".6"),
            by_hand=by_hand,
        )
        for policy in policies
    ]
