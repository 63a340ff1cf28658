"""`ttsnap app`: the search in the browser, live, and picking by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from ttsnap.cli.options import OFFER, OUTPUT, SERVER, AsJson, DryRun

Offer, Server = Parameter(group=OFFER), Parameter(group=SERVER)


def open_page(
    *,
    model: Annotated[tuple[str, ...], Offer] = (),
    reward: Annotated[tuple[str, ...], Offer] = (),
    lora: Annotated[tuple[str, ...], Offer] = (),
    vae: Annotated[tuple[str, ...], Offer] = (),
    text_encoder: Annotated[tuple[str, ...], Offer] = (),
    embedding: Annotated[tuple[str, ...], Offer] = (),
    config: Annotated[tuple[str, ...], Offer] = (),
    control: Annotated[tuple[str, ...], Offer] = (),
    ip_adapter_weights: Annotated[tuple[str, ...], Offer] = (),
    out: Annotated[Path, Parameter(group=OUTPUT)] = Path("app"),
    host: Annotated[str, Server] = "127.0.0.1",
    port: Annotated[int, Server] = 7860,
    auth: Annotated[tuple[str, ...], Server] = (),
    insecure: Annotated[bool, Server] = False,
    allow_host: Annotated[tuple[str, ...], Server] = (),
    max_candidates: Annotated[int, Offer] = 128,
    max_size: Annotated[int, Offer] = 2048,
    device: Annotated[str | None, Offer] = None,
    dtype: Annotated[str | None, Offer] = None,
    dry_run: DryRun = False,
    json: AsJson = False,
) -> None:
    """Open a page on this machine: watch the search, pick by hand, compare policies, explore recordings.

    Try: ttsnap app

    Args:
        model: `shapes`, a hub id, or a diffusers directory; may be repeated.
        reward: Reward on offer; may be repeated.
        lora: LoRA on offer: FILE, directory or hub id, with :WEIGHT at its end or not; may be repeated.
        vae: VAE on offer, which visitors may name in their model options; may be repeated, and so may the next five.
        text_encoder: Text encoder on offer: DIR, or such as text_encoder_2=DIR.
        embedding: Textual inversion on offer: FILE or FILE:TOKEN.
        config: Directory or hub id on offer, that a single file as --model belongs to.
        control: ControlNet or T2I adapter on offer.
        ip_adapter_weights: Weights of an IP-Adapter on offer.
        out: Results are written here, and recordings and runs are opened from here.
        host: Address to listen on; 127.0.0.1: only this machine.
        port: Port.
        auth: user:password; may be repeated.
        insecure: Let other machines in without a password.
        allow_host: Another name by which the page is reached, such as that of a proxy; may be repeated.
        max_candidates: Most candidates of a search.
        max_size: Largest image side in pixels.
        device: cpu, cuda, cuda:1, mps.
        dtype: float32, bfloat16, float16.
    """
    import sys

    import gradio  # noqa: F401  # missing, it is named with its install command

    from ttsnap.app.options import Offered
    from ttsnap.app.queue import Limits
    from ttsnap.app.searches import Searches
    from ttsnap.app.server import serve
    from ttsnap.core.hosts import is_loopback

    users = []
    for pair in auth:
        user, colon, password = pair.partition(":")
        if not (user and colon and password):
            raise ValueError(f"--auth takes user:password, got {pair!r}")
        users.append((user, password))
    if not (is_loopback(host) or users or insecure):
        raise ValueError(f"--host {host} lets other machines in: give --auth user:password, or --insecure")
    if not 1 <= port <= 65535:
        raise ValueError(f"--port must be 1 to 65535, got {port}")
    for name, value in (("--max-candidates", max_candidates), ("--max-size", max_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dry_run:
        from ttsnap.app.queue import USUAL
        from ttsnap.cli.options import tell
        from ttsnap.cli.serve import of_each
        from ttsnap.live.settings import ModelSettings, SearchSettings

        first = ModelSettings(model=(*model, "shapes")[0], lora=lora, device=device, dtype=dtype)
        search = SearchSettings(reward=reward[0] if reward else None, candidates=USUAL)
        tell(of_each("a page; of a search as its form begins", search, first), json)
        return
    try:
        searches = Searches(
            out,
            list(model) or ["shapes"],
            list(reward),
            device,
            dtype,
            Limits(candidates=max_candidates, side=max_size),
            lora,
            Offered(vae, text_encoder, embedding, config, control, ip_adapter_weights),
        )
    except OSError as error:
        raise ValueError(f"cannot write to {out}: {error.strerror}; give another --out") from error
    page, url = serve(searches, host=host, port=port, auth=users or None, allow_host=allow_host, block=False)
    print(f"ttsnap is at {url} (Ctrl-C ends it); results are in {searches.out}", file=sys.stderr)
    searches.warm()
    page.block_thread()
