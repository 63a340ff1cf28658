"""What a reward must be to be trained, and which of its parameters are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from ttsnap.rewards.registry import load_plain

if TYPE_CHECKING:
    from torch import Tensor, nn

LARGE = 50_000_000  # parameters from which LoRA is the default


@runtime_checkable
class TrainableReward(Protocol):
    """A reward (see `ttsnap.core.grid.Reward`) that is an `nn.Module` too, differentiable in its parameters.

    What it keeps for later (encoded prompts) must not depend on trained parameters, for these change under it. It may
    have `gradient_checkpointing_enable()`.

    Attributes:
        trained: regular expression of the parameters that full finetuning trains; all of them take part in each look.
        lora_targets: regular expression of the modules that get LoRA adapters.
    """

    trained: str
    lora_targets: str

    def __call__(self, images: Tensor, prompts: Sequence[str], *, sigma: float) -> Tensor:
        """Rewards [n] with gradient, of images [n, 3, h, w] in 0..1."""
        ...


def load_trainable(name: str, device: Any) -> nn.Module:
    """The clean reward of that name.

    Raises:
        ValueError: unknown, or not one that can be trained.
    """
    from torch import nn

    reward = load_plain(name, device)
    if not isinstance(reward, nn.Module) or not isinstance(reward, TrainableReward):
        raise ValueError(f"reward {name} cannot be trained: it must be an nn.Module with `trained` and `lora_targets`")
    reward.to(device)
    return reward


def adapt(reward: nn.Module, method: str, rank: int, alpha: float) -> dict[str, nn.Parameter]:
    """Put LoRA adapters on a reward, or none; returns the parameters that are then trained, by name.

    New adapters change nothing: their second factor is 0.

    Args:
        reward: a trainable reward; changed in place.
        method: `lora` or `full`.
        rank: of the adapters.
        alpha: the product of an adapter is scaled by alpha / rank.

    Raises:
        ValueError: nothing is left to train.
    """
    pattern = re.compile(str(reward.trained))
    if method == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        targets = str(reward.lora_targets)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), reward)
        pattern = re.compile(r".*\.lora_[AB]\..*")
    else:
        reward.float()
    trained = {}
    for name, parameter in reward.named_parameters():
        parameter.requires_grad_(bool(pattern.fullmatch(name)))
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # updates are lost in half precision
            trained[name] = parameter
    if not trained:
        raise ValueError(f"no parameter of the reward matches {pattern.pattern!r}")
    return trained


def choose_method(reward: nn.Module, method: str) -> str:
    """`lora` or `full`; `auto` takes LoRA for large rewards."""
    if method != "auto":
        return method
    return "lora" if sum(p.numel() for p in reward.parameters()) > LARGE else "full"


def save_memory(reward: nn.Module) -> None:
    """Let a reward compute activations again in the backward pass.

    Raises:
        ValueError: it cannot.
    """
    enable: Any = getattr(reward, "gradient_checkpointing_enable", None)
    if enable is None:
        raise ValueError(f"{type(reward).__name__} has no gradient checkpointing; leave checkpointing false")
    enable()
