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
from ttsnap.app.options import EXAMPLE, as_text
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
            with gr.Row():
                self.size = gr.Textbox(
                    label="Size (width x height, or 3:2)",
                    placeholder=own_size(searches, first),
                    min_width=150,
                    max_length=20,
                )
                self.steps = gr.Textbox(
                    label="Steps",
                    min_width=100,
                    placeholder=own_steps(searches, first, searches.rewards[:1], unit, amount, None, *policies),
                    max_length=6,
                    elem_id=f"tt-{name}-steps",
                )
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
        with gr.Accordion("More model options", open=False):
            self.options = gr.Textbox(
                label="As on the command line",
                placeholder=EXAMPLE,
                info=offer(searches),
                max_length=searches.limits.prompt,
                elem_id=f"tt-{name}-options",
            )
            self.pictures = gr.File(
                label="Pictures that they name: --image (references), --mask, --control, --ip-adapter",
                file_count="multiple",
                file_types=["image"],
                height=140,
                elem_id=f"tt-{name}-pictures",
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
            self.options,
            self.pictures,
            *self.policies,
        ]

    def wire(self) -> None:
        """Tell mistakes as soon as a field is left, and what size and steps are where none are given."""
        self.dice.click(lambda: random.randrange(2**31), None, self.seed, **QUIET)
        choice = self.of_choice()
        gr.on([field.change for field in choice[1]], *choice, trigger_mode="always_last", **QUIET)
        if isinstance(self.prompt, gr.Textbox):
            typed = (self.prompt, self.size, self.steps, self.guidance, self.negative, self.strength, self.options)
            left = [field.blur for field in typed]
            changed = [field.change for field in (self.amount, self.model, self.rewards, self.pictures)]
            gr.on([*left, *changed], self.told, self.fields, self.hint, trigger_mode="always_last", **QUIET)

    def of_choice(self) -> tuple[Callable[..., Update], list[Any], list[Any]]:
        """What shows a model's whole name, and size and steps that it takes by itself; of which fields and in which."""

        def tell(model: str, *others: Any) -> Update:
            return {
                self.model: gr.update(info=_whole(model)),
                self.size: gr.update(placeholder=own_size(self.searches, model)),
                self.steps: gr.update(placeholder=own_steps(self.searches, model, *others)),
            }

        asked = [self.model, self.rewards, self.unit, self.amount, self.image, *self.policies]
        return tell, asked, [self.model, self.size, self.steps]

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
            request.options,
            list(request.pictures),
            request.policy,
        ]


def own_size(searches: Searches, model: str) -> str:
    """What stands in the empty field for the size."""
    return str(searches.models.defaults(model).get("size", OWN))


def own_steps(
    searches: Searches, model: str, rewards: Sequence[str], unit: str, amount: float, image: str | None, *policies: str
) -> str:
    """What stands in the empty field for the steps: as many as each policy will take."""
    try:
        budget = budget_of(unit, amount)
    except ValueError:
        budget = None  # another line says what is wrong with it
    asked = [Request("", model, tuple(rewards or ()), policy, budget, image=image) for policy in policies]
    found = [searches.models.steps(request) for request in asked]
    return " and ".join(dict.fromkeys(OWN if steps is None else str(steps) for steps in found))


def offer(searches: Searches) -> str | None:
    """What files the options may name; None where none are offered."""
    names = searches.models.offered.names()
    said = "; ".join(f"{option} {' or '.join(given)}" for option, given in names.items())
    return f"Offered here: {said}" if said else None


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
    text, unset = as_text(settings, model, searches.models.offered)
    missing += unset + (["weights"] if "weights" in settings else [])
    pictures = {"image": "the picture that it started from", "mask": "the mask", "mask_image": "the mask"}
    pictures |= {"control": "the control picture", "control_image": "the control picture"}
    pictures |= {"ip_adapter": "the picture of the IP-Adapter"}
    missing += list(dict.fromkeys(said for name, said in pictures.items() if name in own.get("local", ())))
    values = [own["prompt"], "candidates", settings["candidates"], model, rewards or searches.rewards[:1]]
    values += [settings["seed"], settings.get("size"), steps, settings.get("guidance")]
    values += [settings.get("negative_prompt"), loras, None, settings.get("strength"), text, []]
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


def budget_of(unit: str, amount: float | None) -> str | None:
    """The budget that two fields say; None where they say a number of candidates.

    Raises:
        ValueError: no such unit, or no number above 0.
    """
    if unit not in UNITS:
        raise ValueError(f"there is no budget in {unit!r}; there is {', '.join(UNITS)}")
    if amount is None or not 0 < float(amount) < 1e12:
        raise ValueError("the budget must be a number above 0")
    kind = UNITS[unit]
    return None if kind is None else f"{float(amount):.12g}{kind}"


def requests(values: Sequence[Any], *, by_hand: bool = False) -> list[Request]:
    """What the fields of a form say, one request per policy."""
    prompt, unit, amount, model, rewards, seed, size, steps, guidance, negative, *rest = values
    loras, image, strength, options, pictures, *policies = rest
    budget = budget_of(unit, amount)
    return [
        Request(
            prompt=str(prompt or ""),
            model=str(model),
            rewards=tuple(rewards or ()),
            policy=str(policy),
            budget=budget,
            candidates=int(amount) if budget is None else None,
            seed=int(seed or 0),
            size=str(size).strip() or None if size else None,
            steps=_number(steps, int, "steps", "20"),
            guidance=_number(guidance, float, "guidance", "3.5"),
            negative_prompt=str(negative).strip() or None if negative else None,
            loras=tuple(loras or ()),
            image=str(image) if image else None,
            strength=_number(strength, float, "strength", ".6"),
            options=str(options or "").strip(),
            pictures=tuple(map(str, pictures or ())),
            by_hand=by_hand,
        )
        for policy in policies
    ]
