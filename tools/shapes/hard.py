"""Train the hard level of the embedded world: on two CPU cores, or in minutes on a GPU.

    python -m tools.shapes.hard text vae transformer reward foresight gates early export --out runs/hard
    python -m tools.shapes.hard ... --minutes .1 --count .02        # the same lines, in miniature
    python -m tools.shapes.hard ... --device cuda --minutes .1 --workers 15

Each stage leaves its weights in the folder and its figures in `log.jsonl`; named again, it trains anew, and the
transformer goes on from its checkpoint. Text encoders, VAE and transformer begin with the weights of the first level,
whose words, colours and shapes are the same. In the last part captions are loose, as for the first level.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from tools.shapes import common, preview, text, transformer, vae
from tools.shapes.foresight import set_rate
from tools.shapes.foresight import train as train_foresight
from tools.shapes.reward import _malform, auc, cell_labels, export, loss_of
from ttsnap.shapes import foresight, hard
from ttsnap.shapes.checker import Found, fidelity, judge
from ttsnap.shapes.reward import KINDS, RewardNetwork, ShapesReward, soft_minimum, word_ids
from ttsnap.shapes.reward import WORDS as reward_words
from ttsnap.shapes.scenes import (
    COLOURS,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    Noun,
    Scene,
    Spec,
    Thing,
    is_held_out,
    render_batch,
)
from ttsnap.training.heads import Trails

WORDS = (*text.WORDS, "hollow")  # of the text encoders
KNOWN = (*reward_words, "hollow")  # of the reward, in its own order
CLIP_LENGTH, T5_LENGTH = 18, 17
ALL_KINDS = (*KINDS, "hollow")
SIDE, GRID, CHANNELS = 6, 12, 32  # tokens a side, latents a side, channels of a token
LOOSE = (0.0, 0.05, 0.1, 0.15, 0.2)  # chance of each word of a loose caption to say what is not so
GAIN = 2  # what the falling learning rate does to the share of right samples
WANTED = 0.13  # share of single samples that meet everything
PAIRS = 6  # captions that the reward reads for each image
_COLOURS = tuple(COLOURS)


# ---- worker processes: scenes, captions, labels


def loosened(spec: Spec, rng: np.random.Generator, chance: float) -> Spec:
    """A caption in which each colour, shape, hollow and relation is another with that chance."""

    def other(value: Any, among: tuple[Any, ...]) -> Any:
        rest = [x for x in among if x != value]
        return rest[rng.integers(len(rest))] if rng.random() < chance else value

    while True:
        nouns = tuple(Noun(other(n[0], _COLOURS), other(n[1], SHAPES), other(n[2], (False, True))) for n in spec.things)
        made = Spec(nouns, tuple(other(r, RELATIONS) for r in spec.relations))
        if hard.allowed(made) and not is_held_out(made):
            return made


def any_scene(rng: np.random.Generator) -> Scene:
    """Mostly scenes that prompts describe; some with 0 to 5 things anywhere, so that failures can be shown too."""
    if rng.random() < 0.8:
        return hard.sample_scene(hard.sample_spec(rng), rng)
    things = [
        Thing(
            _COLOURS[rng.integers(6)], SHAPES[rng.integers(3)], rng.uniform(11, 85), rng.uniform(11, 85),
            rng.uniform(6, 12), bool(rng.integers(2)),
        )
        for _ in range(rng.integers(0, 6))
    ]  # fmt: skip
    return Scene(tuple(things), hard.SIZE)


def draw(job: tuple[int, int]) -> tuple[NDArray[np.uint8], list[list[str]]]:
    """Images, and their captions: the true one, then one per chance of LOOSE."""
    seed, count = job
    rng = np.random.default_rng([11, seed])
    specs = [hard.sample_spec(rng) for _ in range(count)]
    images = render_batch([hard.sample_scene(spec, rng) for spec in specs])
    captions = [[spec.prompt for spec in specs]]
    captions += [[loosened(spec, rng, chance).prompt for spec in specs] for chance in LOOSE]
    return images, captions


def draw_any(job: tuple[int, int]) -> tuple[NDArray[np.uint8], list[str]]:
    """Images of any scenes, and the prompts that most of them show."""
    seed, count = job
    rng = np.random.default_rng([12, seed])
    specs = [hard.sample_spec(rng) for _ in range(count)]
    scenes = [hard.sample_scene(spec, rng) if rng.random() < 0.75 else any_scene(rng) for spec in specs]
    return render_batch(scenes), [spec.prompt for spec in specs]


def varied(spec: Spec, rng: np.random.Generator) -> Spec:
    """The Spec itself, or one that differs in one respect; never a held-out one."""
    while True:
        made = _vary(spec, rng)
        if hard.allowed(made) and not is_held_out(made):
            return made


def _vary(spec: Spec, rng: np.random.Generator) -> Spec:
    things, relations = list(spec.things), list(spec.relations)
    which, choice = int(rng.integers(len(things))), rng.random()
    if choice < 0.33:
        return spec
    if choice < 0.45:
        things[which] = things[which]._replace(colour=_COLOURS[rng.integers(6)])
    elif choice < 0.57:
        things[which] = things[which]._replace(shape=SHAPES[rng.integers(3)])
    elif choice < 0.69:
        things[which] = things[which]._replace(hollow=not things[which].hollow)
    elif choice < 0.77 and len(things) > 1:  # two change places
        a, b = rng.permutation(len(things))[:2]
        things[a], things[b] = things[b], things[a]
    elif choice < 0.89 and relations:
        relations[rng.integers(len(relations))] = RELATIONS[rng.integers(4)]
    elif choice < 0.95:
        if len(things) > 1:
            things, relations = things[:-1], relations[:-1]
        else:
            things, relations = [*things, *hard.sample_spec(rng, fewer=1).things[:1]], [RELATIONS[rng.integers(4)]]
    else:
        return hard.sample_spec(rng)
    return Spec(tuple(things), tuple(relations))


def targets(found: list[Found], spec: Spec) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Labels of a pair: kinds [5], words met [17] (NaN: not asked), cell of each noun's thing [17]."""
    verdict = judge(found, spec)
    kinds = np.asarray([getattr(verdict, kind) for kind in ALL_KINDS], dtype=np.float32)
    met, cell = np.full(T5_LENGTH, np.nan, dtype=np.float32), np.full(T5_LENGTH, -100, dtype=np.int64)
    start, chosen = 0, []
    for number, noun in enumerate(spec.things):
        named = [f for f in found if (f.colour, f.shape) == noun[:2]]
        exact = [f for f in named if f.hollow == noun.hollow]
        near = exact or named or [f for f in found if f.colour == noun.colour]
        near = near or [f for f in found if f.shape == noun.shape]
        chosen.append(next(iter(exact), None))
        length = 3 + noun.hollow
        if noun.hollow:
            met[start + 1] = any(f.hollow for f in found)
        met[start + length - 2] = any(f.colour == noun.colour for f in found)
        met[start + length - 1] = bool(exact)
        if near:
            size = hard.SIZE // GRID
            row, column = (int(np.clip(c // size, 0, GRID - 1)) for c in (near[0].y, near[0].x))
            cell[start + 1 : start + length] = row * GRID + column
        start += length
        if number < len(spec.relations):
            # told by the second of its words, known once both things are
            met[start] = np.nan
            start += len(spec.relations[number].split())
    start = 0
    for number, relation in enumerate(spec.relations):
        start += 3 + spec.things[number].hollow
        pair = chosen[number : number + 2]
        if all(pair):
            met[start] = judge(pair, Spec(spec.things[number : number + 2], (relation,))).relation  # type: ignore[arg-type]
        else:
            met[start] = False
        start += len(relation.split())
    return kinds, met, cell


def label(job: tuple[int, NDArray[np.uint8], list[str]]) -> tuple[NDArray[Any], ...]:
    """What the reward learns from images: cells [n, 144, 2], and per image and caption kinds, met, cell, word ids."""
    seed, images, prompts = job
    rng = np.random.default_rng([13, seed])
    cells, rows = [], []
    for image, prompt in zip(images, prompts, strict=True):
        found, spec = hard.detect(image), hard.parse(prompt)
        cells.append(cell_labels(found, GRID))
        asked = [varied(spec, rng) for _ in range(PAIRS)]
        rows += [(*targets(found, s), word_ids([s.prompt], KNOWN, T5_LENGTH)[0].numpy()) for s in asked]
    kinds, met, cell, ids = (np.stack(x).reshape(len(images), PAIRS, -1) for x in zip(*rows, strict=True))
    return np.stack(cells), kinds, met, cell, ids


def verdicts(job: tuple[NDArray[np.uint8], list[str]]) -> NDArray[np.float32]:
    """Kinds met [n, 5] and fidelity, one column more, of images of prompts."""
    rows = []
    for image, prompt in zip(*job, strict=True):
        found = hard.detect(image)
        verdict = judge(found, hard.parse(prompt))
        rows.append([*(getattr(verdict, kind) for kind in ALL_KINDS), fidelity(found)])
    return np.asarray(rows, dtype=np.float32)


# ---- stages


class Place:
    """Where networks run."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.gpu = self.device.type == "cuda"


class Run(Place):
    """Device, folder, clock, workers."""

    def __init__(self, a: argparse.Namespace) -> None:
        super().__init__(a.device)
        self.out, self.minutes, self.share = a.out, a.minutes, a.count
        self.log = common.Log(a.out)
        self.workers = multiprocessing.get_context("spawn").Pool(a.workers, initializer=_one_thread)

    def updates(self, minutes: float, done: float = 0.0) -> Iterator[tuple[int, float]]:
        """Number and progress 0..1 of each update for so many minutes, less if scaled; `done`: progress made before."""
        limit = minutes * 60 * self.minutes
        start, step = clock() - done * limit, 0
        while (progress := (clock() - start) / limit) < 1 or step < 3:
            yield step, min(progress, 1.0)
            step += 1

    def count(self, full: int, least: int) -> int:
        """So many, less if scaled."""
        return max(least, int(full * self.share))

    def split(self, images: NDArray[np.uint8], prompts: list[str], size: int = 256) -> list[Any]:
        """Images and prompts in parts for the workers."""
        return [(images[i : i + size], prompts[i : i + size]) for i in range(0, len(prompts), size)]

    def verdicts(self, images: NDArray[np.uint8], prompts: list[str]) -> NDArray[np.float32]:
        """Kinds met [n, 5] and fidelity."""
        return np.concatenate(self.workers.map(verdicts, self.split(images, prompts, 64), chunksize=1))


def clock() -> float:
    """Seconds: on a CPU processor time of each thread, so that what others do on the machine does not count."""
    if torch.cuda.is_available():
        return time.monotonic()
    return time.process_time() / torch.get_num_threads()


def _one_thread() -> None:
    torch.set_num_threads(1)


class Texts:
    """Frozen text encoders; prompts of this world become token ids by table."""

    def __init__(self, device: torch.device, clip: Any, t5: Any, clip_model: nn.Module, t5_model: nn.Module) -> None:
        self.clip_model, self.t5_model, self.device = clip_model.eval(), t5_model.eval(), device
        self.tokenizers = (clip, t5)
        ids = [tokenizer(["", " ".join(WORDS[:8]), " ".join(WORDS[8:])]).input_ids for tokenizer in (clip, t5)]
        self.tables = []
        for (empty, first, second), skip in zip(ids, (1, 0), strict=True):
            words = dict(zip(WORDS, [*first[skip:-1], *second[skip:-1]], strict=True))
            self.tables.append((empty, words, skip))
        self.pads = (clip.pad_token_id, t5.pad_token_id)
        self.lengths = (CLIP_LENGTH, T5_LENGTH)
        image = transformer.image_ids(SIDE).to(device)
        self.ids = {"txt_ids": torch.zeros(T5_LENGTH, 3, device=device), "img_ids": image}

    def tokens(self, prompts: list[str]) -> Tensor:
        """Ids of CLIP and T5 side by side [n, 35] (int16)."""
        made = np.empty((len(prompts), sum(self.lengths)), dtype=np.int16)
        offset = 0
        for (empty, words, skip), pad, length in zip(self.tables, self.pads, self.lengths, strict=True):
            part = made[:, offset : offset + length]
            part[:] = pad
            for row, prompt in enumerate(prompts):
                ids = [*empty[:skip], *(words[word] for word in prompt.split()), *empty[skip:]]
                part[row, : len(ids)] = ids
            offset += length
        return torch.from_numpy(made)

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> dict[str, Tensor]:
        """Keyword arguments of the transformer."""
        ids = ids.to(self.device).long()
        return {
            "encoder_hidden_states": self.t5_model(ids[:, CLIP_LENGTH:]).last_hidden_state,
            "pooled_projections": self.clip_model(ids[:, :CLIP_LENGTH]).pooler_output,
        } | self.ids


def places(spec: Spec) -> tuple[int, ...]:
    """Index in `text.PLACES` of each thing: the second is the middle."""
    side = {"left of": 0, "right of": 1, "above": 2, "below": 3}
    if not spec.relations:
        return (4,)
    return (side[spec.relations[0]], 4, *(side[OPPOSITE[r]] for r in spec.relations[1:]))


def text_labels(specs: list[Spec]) -> tuple[Tensor, Tensor]:
    """Colour, shape, place, hollow per T5 token [n, 17, 4], -100 outside nouns; and per place [n, 5, 3]."""
    tokens = torch.full((len(specs), T5_LENGTH, 4), -100)
    whole = torch.zeros(len(specs), 5, 3, dtype=torch.long)
    for row, spec in enumerate(specs):
        start = 0
        for number, (noun, place) in enumerate(zip(spec.things, places(spec), strict=True)):
            length = 3 + noun.hollow
            known = [_COLOURS.index(noun.colour), SHAPES.index(noun.shape), place, int(noun.hollow)]
            tokens[row, start + 1 : start + length] = torch.tensor(known)
            whole[row, place] = torch.tensor([known[0] + 1, known[1] + 1, known[3] + 1])
            start += length + (len(spec.relations[number].split()) if number < len(spec.relations) else 0)
    return tokens, whole


def begin_from(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Take over what another module learnt, row by row where there are more rows now."""
    mine = module.state_dict()
    for name, old in state.items():
        new = mine.get(name)
        if new is not None and new.is_floating_point() and new.shape[1:] == old.shape[1:]:
            rows = min(len(new), len(old)) if new.ndim else 0
            new[:rows] = old[:rows].to(new) if new.ndim else old
    module.load_state_dict(mine)


def renumbered(state: dict[str, Tensor], table: str, old: dict[str, int], new: dict[str, int]) -> dict[str, Tensor]:
    """An encoder's weights for another numbering of tokens."""
    weights = state[table].new_zeros(len(new), state[table].shape[1]).normal_(0, float(state[table].std()))
    for token, index in new.items():
        if token in old:
            weights[index] = state[table][old[token]]
    return state | {table: weights}


def train_text(run: Run, minutes: float) -> None:
    """Text encoders that know what each word's thing is and where it lies."""
    from ttsnap.shapes.pipeline import load_pipeline

    first = load_pipeline()
    clip, t5 = text.tokenizers(WORDS, CLIP_LENGTH, T5_LENGTH)
    clip_model, t5_model = (m.to(run.device) for m in text.encoders(clip, t5))
    for model, known, table, tokenizers in (
        (clip_model, first.text_encoder, "text_model.embeddings.token_embedding.weight", (first.tokenizer, clip)),
        (t5_model, first.text_encoder_2, "shared.weight", (first.tokenizer_2, t5)),
    ):
        state = known.state_dict()
        table = next(name for name in state if name.endswith(table.removeprefix("text_model.")))
        state = renumbered(state, table, *(tokenizer.get_vocab() for tokenizer in tokenizers))
        state.pop("encoder.embed_tokens.weight", None)
        begin_from(model, state)
    width = text.WIDTH
    heads = nn.ModuleList([nn.Linear(width, n) for n in (6, 3, 5, 2)] + [nn.Linear(width, 5 * n) for n in (7, 4, 3)])
    heads.to(run.device)
    texts = Texts(run.device, clip, t5, clip_model, t5_model)
    rng = np.random.default_rng(0)
    probe = [hard.sample_spec(rng).prompt for _ in range(64)]
    both = torch.cat(text.token_ids(clip, t5, probe), 1)
    assert torch.equal(both, texts.tokens(probe).long()), "the table of tokens differs from the tokenizers"
    optimiser = torch.optim.AdamW([p for m in (clip_model, t5_model, heads) for p in m.parameters()], 2e-3)

    def forward(specs: list[Spec]) -> tuple[Tensor, float]:
        ids = texts.tokens([spec.prompt for spec in specs]).long().to(run.device)
        hidden = t5_model(ids[:, CLIP_LENGTH:]).last_hidden_state
        pooled = clip_model(ids[:, :CLIP_LENGTH]).pooler_output
        tokens, whole = (x.to(run.device) for x in text_labels(specs))
        loss, right = hidden.new_zeros(()), torch.ones(len(specs), dtype=torch.bool, device=run.device)
        for i in range(4):
            logits = heads[i](hidden)
            loss = loss + F.cross_entropy(logits.flatten(0, 1), tokens[..., i].flatten())
            right &= ((logits.argmax(-1) == tokens[..., i]) | (tokens[..., i] == -100)).all(1)
        for i in range(3):
            logits = heads[4 + i](pooled).unflatten(1, (5, -1))
            loss = loss + F.cross_entropy(logits.flatten(0, 1), whole[..., i].flatten())
            right &= (logits.argmax(-1) == whole[..., i]).all(1)
        return loss, right.float().mean().item() if len(specs) == 512 else 0.0

    for step, progress in run.updates(minutes):  # noqa: B007 - the last is logged
        optimiser.param_groups[0]["lr"] = 1.5e-3 * common.schedule(progress)
        loss, _ = forward([hard.sample_spec(rng) for _ in range(192)])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        run.log(stage="text", step=step, right=forward([hard.sample_spec(rng, held_out=True) for _ in range(512)])[1])
    for model, name in (
        (clip, "tokenizer"),
        (t5, "tokenizer_2"),
        (clip_model, "text_encoder"),
        (t5_model, "text_encoder_2"),
    ):
        model.save_pretrained(run.out / "text" / name)


def load_texts(device: torch.device, out: Path) -> Texts:
    """The trained text encoders, frozen."""
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

    kinds = {"tokenizer": CLIPTokenizer, "tokenizer_2": T5TokenizerFast}
    clip, t5 = (kind.from_pretrained(out / "text" / name) for name, kind in kinds.items())
    models = {"text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel}
    loaded = [k.from_pretrained(out / "text" / n).to(device).requires_grad_(False) for n, k in models.items()]
    return Texts(device, clip, t5, *loaded)


def to_float(images: Tensor) -> Tensor:
    """Bytes [n, h, w, 3] as floats [n, 3, h, w] in -1..1."""
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_bytes(images: Tensor) -> NDArray[np.uint8]:
    """Floats [n, 3, h, w] in -1..1 as bytes [n, h, w, 3]."""
    made: NDArray[np.uint8] = images.clamp(-1, 1).add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return made


@torch.no_grad()
def in_parts(work: Callable[[Tensor], Tensor], rows: Tensor, size: int = 1024) -> Tensor:
    """`work` on parts of rows."""
    return torch.cat([work(part) for part in rows.split(size)])


def train_vae(run: Run, minutes: float, decoder_minutes: float) -> None:
    """First everything, then the decoder alone."""
    from ttsnap.shapes.pipeline import load_pipeline

    drawn = run.workers.map(draw_any, [(10_000 + i, 512) for i in range(run.count(24, 1))], chunksize=1)
    pool = torch.cat([torch.from_numpy(images) for images, _ in drawn]).to(run.device)
    known = run.out / "vae"  # gone on with, if it is there
    model = AutoencoderKL.from_pretrained(known) if known.exists() else load_pipeline().vae
    model = model.to(run.device, memory_format=torch.channels_last)
    model.register_to_config(sample_size=hard.SIZE)
    average = common.Ema({"vae": model}, 0.998)
    optimiser = torch.optim.AdamW(model.parameters(), 2e-3, betas=(0.9, 0.97), weight_decay=1e-3)
    step = 0
    for stage, limit in enumerate((minutes, decoder_minutes)):
        for _, progress in run.updates(limit):
            for group in optimiser.param_groups:
                group["lr"] = 2e-3 * common.schedule(progress, decay=0.5) * (1.0 if stage == 0 else 0.7)
            rows = torch.randint(len(pool), (128 if run.gpu else 16,), device=pool.device)
            images = to_float(pool[rows]).contiguous(memory_format=torch.channels_last)
            with torch.set_grad_enabled(stage == 0):
                posterior = model.encode(images).latent_dist
            if stage == 0:
                latents = posterior.sample()
            else:
                noise = 0.03 * torch.rand(len(images), 1, 1, 1, device=run.device) * posterior.mean.std()
                latents = posterior.mean + noise * torch.randn_like(posterior.mean)
            loss = vae.reconstruction_loss(model.decode(latents).sample, images, reach=9)
            if stage == 0:
                loss = loss + vae.KL * posterior.kl().mean() / 1152
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
            average.update(step)
            if step % (500 if run.gpu else 100) == 0:
                run.log(stage=f"vae {stage}", step=step, loss=loss.item())
        model.load_state_dict(average.state["vae"])
        for p in model.encoder.parameters():
            p.requires_grad_(False)
            p.grad = None
    model.eval().requires_grad_(False)
    with torch.no_grad():
        latents = in_parts(lambda x: model.encode(to_float(x)).latent_dist.mean, pool[:2048], 64)
        model.register_to_config(
            shift_factor=round(float(latents.mean()), 5), scaling_factor=round(float(1 / latents.std()), 5)
        )
    model.save_pretrained(run.out / "vae")
    prompts = hard.held_out_prompts()[: run.count(200, 4)]
    rng = np.random.default_rng(3)
    clean = torch.from_numpy(render_batch([hard.sample_scene(hard.parse(p), rng) for p in prompts])).to(run.device)
    rebuilt = in_parts(lambda x: model.decode(model.encode(to_float(x)).latent_dist.mean).sample, clean, 64)
    run.log(stage="vae", **figures(run.verdicts(to_bytes(rebuilt), prompts)))
    sheet(np.concatenate([clean[:12].cpu().numpy(), to_bytes(rebuilt[:12])]), 12, run.out / "vae.png")


def load_vae(device: torch.device, out: Path) -> AutoencoderKL:
    """The trained VAE, frozen."""
    return AutoencoderKL.from_pretrained(out / "vae").to(device).eval().requires_grad_(False)


@torch.no_grad()
def scenes(run: Run, count: int) -> None:
    """Packed latents of random scenes, with the tokens of true and of loose captions, kept for the transformer."""
    decoder, texts = load_vae(run.device, run.out), load_texts(run.device, run.out)
    latents: list[Tensor] = []
    ids: list[list[Tensor]] = [[] for _ in range(1 + len(LOOSE))]
    for images, captions in run.workers.imap(draw, [(i, 512) for i in range(run.count(count // 512, 1))]):
        pictures = torch.from_numpy(images).to(run.device)
        made = in_parts(lambda x: transformer.encode(decoder, to_float(x)), pictures, 128)
        latents.append(transformer.pack(made).half().cpu())
        for kept, said in zip(ids, captions, strict=True):
            kept.append(texts.tokens(said))
    common.save({"latents": torch.cat(latents), "ids": torch.stack([torch.cat(x) for x in ids])}, run.out / "scenes.pt")
    run.log(stage="scenes", images=sum(map(len, latents)))


def decode(model: AutoencoderKL, packed: Tensor) -> Tensor:
    """Images [n, 3, 96, 96] in -1..1 of packed latents."""
    made: Tensor = model.decode(
        transformer.unpack(packed) / model.config.scaling_factor + model.config.shift_factor
    ).sample
    return made


def train_transformer(rank: int, a: argparse.Namespace) -> None:
    """Flow matching: true captions, then loose ones, as loose as leaves a search most to do."""
    place = Place(a.device)
    device, gpu = place.device, place.gpu
    state = common.load(a.out / "scenes.pt")
    assert state is not None
    texts, decoder = load_texts(device, a.out), load_vae(device, a.out)
    latents, ids = state["latents"].to(device), state["ids"].to(device)
    torch.manual_seed(rank)
    model = load_transformer(a.begin).train().requires_grad_(True).to(device)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "blocks" in n and "norm" not in n]
    chosen = {id(p) for p in matrices}
    muon = transformer.Muon(matrices)
    rest = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.97), weight_decay=0.0)
    average = common.Ema({"model": model}, 0.99)
    step, spent, loose = 0, 0.0, -1
    if saved_state := common.load(a.out / "checkpoint.pt"):
        model.load_state_dict(saved_state["model"])
        average.state = saved_state["ema"]
        adam.load_state_dict(saved_state["adam"])
        muon.buffers = [x.to(device) for x in saved_state["muon"]]
        step, spent, loose = saved_state["step"], saved_state["spent"], saved_state["loose"]
    log = common.Log(a.out) if rank == 0 else None
    empty = texts.tokens([""]).to(device)
    torch.manual_seed(1000 * step + rank)
    held = hard.held_out_prompts()[: max(8, int(128 * a.count))]
    limit, batch = a.transformer * a.minutes * 60, 768 if gpu else 80
    losses: list[Tensor] = []
    last, saved, evaluated = clock(), time.time(), clock()

    def evaluate() -> float:
        mine = {k: v.clone() for k, v in model.state_dict().items()}
        model.load_state_dict(average.state["model"])
        images, _ = paint(place, model, texts, decoder, held, 1)
        model.load_state_dict(mine)
        found = figures(verdicts((images, held)))
        if log:
            log(stage="held out", step=step, **found)
            sheet(images[:24], 12, a.out / "transformer.png")
        return found["all"]

    while spent < limit:
        progress = spent / limit
        if progress >= a.loose and loose < 0:
            rate = common.same_on_all(evaluate() if rank == 0 else 0.0)
            words = 11  # colours, shapes, holes and relations of three things
            loose = int(
                np.argmin(
                    [abs(math.log((min(1, GAIN * rate) * (1 - chance) ** words + 1e-3) / WANTED)) for chance in LOOSE]
                )
            )
            if log:
                log(stage="loose", true=rate, chance=LOOSE[loose])
                common.save({"model": halves(average.state["model"])}, a.out / "true.pt")
            last = clock()
        factor = common.schedule(progress, decay=1 - a.loose)
        for group in adam.param_groups:
            group["lr"] = a.rate / 2 * factor
        rows = torch.randint(len(latents), (batch,), device=device)
        x0 = latents[rows].float()
        t = torch.randn(batch, device=device).sigmoid()
        high = torch.rand(batch, device=device)
        t = torch.where(torch.rand(batch, device=device) < 0.5, 0.75 + 0.25 * high, t)[:, None, None]
        noise = torch.randn_like(x0)
        kept = torch.rand(batch, 1, device=device) >= 0.05
        output = model(
            hidden_states=(1 - t) * x0 + t * noise, timestep=t.flatten(), return_dict=False,
            **texts(torch.where(kept, ids[1 + loose if loose >= 0 else 0][rows], empty)),
        )[0]  # fmt: skip
        loss = (output.float() - (noise - x0)).square().mean()
        model.zero_grad()
        loss.backward()
        common.average_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step(a.rate * factor)
        adam.step()
        step += 1
        average.update(step)
        losses.append(loss.detach())
        now = clock()
        spent = common.same_on_all(spent + now - last)
        last = now
        if log and step % 50 == 0:
            log(stage="transformer", step=step, loss=torch.stack(losses[-50:]).mean().item(), minutes=spent / 60)
        if rank == 0 and time.time() - saved > 120:
            both = {"model": model.state_dict(), "ema": average.state, "adam": adam.state_dict(), "muon": muon.buffers}
            common.save(both | {"step": step, "spent": spent, "loose": loose}, a.out / "checkpoint.pt")
            saved = time.time()
        if common.same_on_all(now - evaluated) > a.evaluate * 60:
            if rank == 0:
                evaluate()
            torch.distributed.barrier()
            evaluated = last = clock()
    if rank == 0:
        common.save({"model": halves(average.state["model"])}, a.out / "transformer.pt")
        evaluate()


def load_transformer(path: Path | None) -> Any:
    """A transformer with stored weights; those of the first level where there is no path."""
    from ttsnap.shapes.pipeline import WEIGHTS

    if path is None:
        return type(transformer.build(5)).from_pretrained(WEIGHTS / "transformer", torch_dtype=torch.float32)
    model = transformer.build(5)
    state = common.load(path)
    if state is None:
        raise FileNotFoundError(path)
    model.load_state_dict({name: tensor.float() for name, tensor in state["model"].items()})
    return model.eval().requires_grad_(False)


@torch.no_grad()
def sample(
    place: Place, model: nn.Module, condition: dict[str, Tensor], noise: Tensor, steps: int, watch: Any = None
) -> Tensor:
    """Euler flow from noise to packed latents; `watch(call, x0)` sees each estimate."""
    sigmas = [1 - i / steps for i in range(steps + 1)]
    x = noise
    for call, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
        v = model(
            hidden_states=x, timestep=torch.full((len(x),), sigma, device=x.device), return_dict=False, **condition
        )[0]
        if watch:
            watch(call, x - sigma * v.float())
        x = x + (following - sigma) * v.float()
    return x


def paint(
    place: Place, model: nn.Module, texts: Texts, decoder: AutoencoderKL, prompts: list[str], seed: int, steps: int = 20
) -> tuple[NDArray[np.uint8], Tensor]:  # fmt: skip
    """Images of prompts, one each, as bytes and as floats in 0..1."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), SIDE**2, CHANNELS, generator=generator)
    made, size = [], 1024 if place.gpu else 64
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        latents = sample(place, model, texts(texts.tokens(prompts[part])), noise[part].to(place.device), steps)
        with torch.no_grad():
            made.append(decode(decoder, latents))
    images = torch.cat(made)
    return to_bytes(images), images.clamp(-1, 1) / 2 + 0.5


def figures(found: NDArray[np.float32]) -> dict[str, float]:
    """Shares by kind, all, and mean fidelity."""
    kinds = {kind: float(found[:, i].mean()) for i, kind in enumerate(ALL_KINDS)}
    return kinds | {"all": float(found[:, :5].all(1).mean()), "fidelity": float(found[:, 5].mean())}


def reward_pool(run: Run, decoder: AutoencoderKL, count: int) -> tuple[NDArray[np.uint8], list[str]]:
    """Clean, rebuilt, mixed, noised and malformed images, with the prompts that they were meant to show."""
    images, prompts = [], []
    rng = np.random.default_rng(21)
    jobs = [(i, 256) for i in range(-(-count // 256))]
    for number, (clean, asked) in enumerate(run.workers.imap(draw_any, jobs)):
        kind, made = number % 4, clean
        if kind:
            with torch.no_grad():
                latents = transformer.encode(decoder, to_float(torch.from_numpy(clean).to(run.device)))
                if kind == 2:
                    mask = F.interpolate(torch.rand(256, 1, 3, 3), (GRID, GRID), mode="bilinear") * 1.3 - 0.15
                    latents = torch.lerp(latents, latents[torch.randperm(256)], mask.clamp(0, 1).to(run.device))
                if kind >= 2:
                    level = torch.rand(256, 1, 1, 1, device=run.device) ** 2 * 0.8
                    latents = latents + level * torch.randn_like(latents)
                made = to_bytes(
                    decoder.decode(latents / decoder.config.scaling_factor + decoder.config.shift_factor).sample
                )
            if kind == 3:
                made = np.stack([_malform(image, rng) for image in made])
        images.append(made)
        prompts += asked
    return np.concatenate(images), prompts


def train_reward(run: Run, minutes: float) -> None:
    """The clean reward on labelled images: rendered, rebuilt and malformed ones, and some that transformers made."""
    from ttsnap.shapes.reward import load_reward

    texts, decoder = load_texts(run.device, run.out), load_vae(run.device, run.out)
    pool_of, prompts = reward_pool(run, decoder, run.count(14_336 if not run.gpu else 24_576, 256))
    parts, train, rng = [pool_of], hard.train_prompts(), np.random.default_rng(17)
    for number, name in enumerate(("true.pt", "transformer.pt")):
        model = load_transformer(run.out / name).to(run.device)
        some = [train[i] for i in rng.integers(len(train), size=run.count(1024 if not run.gpu else 4096, 64))]
        parts.append(paint(run, model, texts, decoder, some, 100 + number)[0])
        prompts += some
    images = np.concatenate(parts)
    jobs = [(i, *part) for i, part in enumerate(run.split(images, prompts))]
    labelled = list(run.workers.imap(label, jobs))
    cells, *labels = (torch.from_numpy(np.concatenate(x)).to(run.device) for x in zip(*labelled, strict=True))
    run.log(stage="labels", images=len(images), right=float(labels[0].amin(2).float().mean()))
    pool = torch.from_numpy(images).to(run.device)
    network = RewardNetwork(64, GRID, T5_LENGTH, ALL_KINDS, ("hollow",))
    state = load_reward().network.state_dict()
    known = state["cells"].T.reshape(1, 64, 8, 8)
    state["cells"] = F.interpolate(known, (GRID, GRID), mode="bilinear").flatten(2)[0].T
    begin_from(network, state)
    network = network.to(run.device)
    optimiser = torch.optim.AdamW(network.parameters(), 1.5e-3, betas=(0.9, 0.98), weight_decay=0.02)
    average = common.Ema({"network": network}, 0.998)
    batch = 384 if run.gpu else 96
    seen: list[tuple[Tensor, Tensor]] = []
    for step, progress in run.updates(minutes):
        for group in optimiser.param_groups:
            group["lr"] = 1.5e-3 * common.schedule(progress, warmup=0.02, decay=0.6)
        rows = torch.randint(len(pool), (batch,), device=run.device)
        which = torch.randint(PAIRS, (batch,), device=run.device)
        kinds, met, cell, ids = (x[rows, which] for x in labels)
        noise = 1 + 0.05 * torch.randn(batch, 1, 1, 1, device=run.device)
        x = (to_float(pool[rows]) + 1) / 2 * noise
        x = x + 0.01 * torch.randn_like(x)
        loss, logits = loss_of(network, x, ids, (kinds, met, cell, cells[rows]))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        average.update(step)
        seen = [*seen[-20:], (logits.detach(), kinds)]
        if step % (500 if run.gpu else 100) == 99:
            values, truth = (torch.cat(x).cpu().numpy() for x in zip(*seen, strict=True))
            run.log(stage="reward", step=step + 1, loss=loss.item(),
                    **{kind: auc(values[:, i], truth[:, i] > 0.5) for i, kind in enumerate(ALL_KINDS)})  # fmt: skip
    network.load_state_dict(average.state["network"])
    network.eval().requires_grad_(False)
    export(network, run.out / "reward")


def load_hard_reward(run: Run) -> ShapesReward:
    """The trained clean reward."""
    from ttsnap.shapes.reward import load_reward

    return load_reward(run.device, run.out / "reward")


@torch.no_grad()
def read_all(reward: ShapesReward, prompts: list[str]) -> None:
    """Read all prompts at once, so that none is read alone later."""
    network = reward.network
    unique = list(dict.fromkeys(prompts))
    ids = network.tokenize(unique).to(network.positions.device)
    for start in range(0, len(unique), 2048):
        x, mask = network.encode_text(ids[start : start + 2048])
        for row, prompt in enumerate(unique[start : start + 2048]):
            reward.texts[prompt] = (x[row : row + 1], mask[row : row + 1])


@torch.no_grad()
def trails_of(
    run: Run,
    model: Any,
    texts: Texts,
    decoder: AutoencoderKL,
    reward: ShapesReward,
    prompts: list[str],
    size: int,
    steps: int,
    seed: int,
) -> Trails:
    """Trajectories of prompts in groups of `size`, with features and x0 estimates of all calls but the last."""
    asked = [prompt for prompt in prompts for _ in range(size)]
    read_all(reward, prompts)
    begun = time.time()
    generator = torch.Generator(run.device).manual_seed(seed)
    module = dict(model.named_modules())[foresight.PLACE.module]
    cells, latents, goals = [], [], []
    per = max(1, (2048 if run.gpu else 64) // size) * size
    for start in range(0, len(asked), per):
        part = asked[start : start + per]
        heard: list[Tensor] = []
        estimates: list[Tensor] = []

        def keep(_: Any, __: Any, output: Any, heard: list[Tensor] = heard) -> None:
            hidden = output[-1] if isinstance(output, tuple | list) else output
            heard.append(hidden[:, -(SIDE**2) :].half())

        hook = module.register_forward_hook(keep)
        noise = torch.randn(len(part), SIDE**2, CHANNELS, generator=generator, device=run.device)
        watch = lambda call, x0, estimates=estimates: estimates.append(x0.half())  # noqa: E731
        end = sample(run, model, texts(texts.tokens(part)), noise, steps, watch)
        hook.remove()
        images = in_parts(lambda x: decode(decoder, x), end).clamp(-1, 1) / 2 + 0.5
        logits = torch.cat([reward.logits(images[i : i + 1024], part[i : i + 1024]) for i in range(0, len(part), 1024)])
        found = torch.cat([soft_minimum(logits)[:, None], logits], 1)
        groups = len(part) // size
        cells.append(torch.stack(heard[:-1], 1).unflatten(0, (groups, size)))
        latents.append(torch.stack(estimates[:-1], 1).unflatten(0, (groups, size)))
        goals.append(found.unflatten(0, (groups, size)))
        if not run.gpu and start // per % 16 == 15:
            run.log(stage="trails", done=start + per, minutes=(time.time() - begun) / 60)
    index = np.arange(len(prompts))
    sigmas = np.array([1 - i / steps for i in range(steps - 1)])
    nothing = torch.zeros(len(prompts), 0, 1)
    stacked = torch.cat(cells), torch.cat(goals), sigmas, torch.cat(latents)
    return Trails(tuple(prompts), nothing, nothing[..., 0].bool(), index, *stacked)


def distil(run: Run, student: Any, trails: Trails, decoder: AutoencoderKL, minutes: float) -> None:
    """Teach the student's convolutions to see in x0 latents what the reward's stem sees in the decoded image."""
    assert trails.latents is not None
    flat, calls = trails.latents.flatten(0, 2), len(trails.sigmas)
    levels = torch.from_numpy(trails.sigmas).float().to(run.device)
    network, net = student.network, student.student
    optimiser = torch.optim.AdamW(
        [p for part in (net.noise, net.stem, net.convs, net.near) for p in part.parameters()], 3e-3, weight_decay=0.01
    )
    loss = flat.new_zeros(())
    for _, progress in run.updates(minutes):
        set_rate(optimiser, 3e-3, int(progress * 1000), 1001)
        rows = torch.randint(len(flat), (384 if run.gpu else 64,), device=run.device)
        with torch.no_grad():
            seen = network.encode_image(decode(decoder, flat[rows].float()).clamp(-1, 1) / 2 + 0.5)
        found = net(None, flat[rows].float(), levels[rows % calls])
        loss = (((found - seen) / seen.std((0, 1))) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    run.log(stage="distil", loss=loss.item())


def tau(values: NDArray[np.float64], final: NDArray[np.float64]) -> tuple[float, float]:
    """Mean Kendall tau within groups [groups, size] and its standard error."""
    pairs = np.triu_indices(values.shape[1], 1)
    signs = [np.sign(x[:, pairs[0]] - x[:, pairs[1]]) for x in (values, final)]
    found = (signs[0] * signs[1]).mean(1)
    return float(found.mean()), float(found.std(ddof=1) / math.sqrt(len(found)))


@torch.no_grad()
def early(run: Run, head: Any, reward: ShapesReward, decoder: AutoencoderKL, trails: Trails) -> None:
    """Kendall tau with the finished image's clean reward after each call, clean and noise-aware."""
    assert trails.latents is not None
    final = trails.targets[..., 0].double().cpu().numpy()
    asked = [prompt for prompt in trails.prompts for _ in range(final.shape[1])]
    for call, sigma in enumerate(trails.sigmas):
        latents, cells = (x[:, :, call].flatten(0, 1).float() for x in (trails.latents, trails.cells))
        clean, aware = [], []
        for i in range(0, len(asked), 1024):
            part = slice(i, i + 1024)
            images = decode(decoder, latents[part]).clamp(-1, 1) / 2 + 0.5
            clean.append(reward(images, asked[part]))
            levels = torch.full((len(images),), float(sigma), device=run.device)
            aware.append(soft_minimum(head.logits(cells[part], latents[part], asked[part], levels)))
        both = [torch.cat(x).double().cpu().numpy().reshape(final.shape) for x in (clean, aware)]
        taus = [tau(x, final) for x in both]
        run.log(stage="tau", call=call + 1, sigma=float(sigma), clean=taus[0][0], aware=taus[1][0], error=taus[1][1])


def train_preview(run: Run, trails: Trails, decoder: AutoencoderKL, minutes: float) -> None:
    """The tiny decoder, on x0 estimates of all calls; pictures of half the size."""
    assert trails.latents is not None
    model = preview.build(8, (4, 4, 0)).to(run.device)
    tiny = model.decoder.train()
    optimiser = torch.optim.AdamW(tiny.parameters(), 4e-3, betas=(0.9, 0.98), weight_decay=1e-3)
    average = common.Ema({"decoder": tiny}, 0.998)
    flat = trails.latents.flatten(0, 2)
    loss = flat.new_zeros(())
    for step, progress in run.updates(minutes):
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * common.schedule(progress, decay=0.6)
        packed = flat[torch.randint(len(flat), (128 if run.gpu else 16,), device=run.device)].float()
        with torch.no_grad():
            target = F.interpolate(decode(decoder, packed).clamp(-1, 1), scale_factor=0.5, mode="area")
        loss = vae.reconstruction_loss(tiny(transformer.unpack(packed)), target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tiny.parameters(), 1.0)
        optimiser.step()
        average.update(step)
    tiny.load_state_dict(average.state["decoder"])
    run.log(stage="preview", loss=loss.item())
    model.cpu().to(dtype=torch.float16).save_pretrained(run.out / "preview")


def sheet(images: NDArray[np.uint8], columns: int, path: Path) -> None:
    """A contact sheet."""
    from PIL import Image

    columns = min(columns, len(images))

    rows = [
        np.concatenate(list(images[i : i + columns]), 1) for i in range(0, len(images) // columns * columns, columns)
    ]
    Image.fromarray(np.concatenate(rows)).save(path)


@torch.no_grad()
def gates(run: Run, model: nn.Module, texts: Texts, decoder: AutoencoderKL, reward: ShapesReward) -> None:
    """AUC by kind, best-of-N, steps x best-of-N."""
    prompts = hard.held_out_prompts()[: run.count(240 if run.gpu else 40, 4)]
    read_all(reward, prompts)
    for steps in (2, 3, 4, 6, 8, 12, 20, 32):
        seeds = 64 if steps == 20 else 8
        some = prompts[: run.count(120 if run.gpu else 24, 4)] if steps == 20 else prompts
        asked = [p for p in some for _ in range(seeds)]
        images, floats = paint(run, model, texts, decoder, asked, 1, steps)
        found = run.verdicts(images, asked)
        logits = torch.cat(
            [reward.logits(floats[i : i + 1024], asked[i : i + 1024]) for i in range(0, len(asked), 1024)]
        )
        values = soft_minimum(logits).cpu().numpy().reshape(-1, seeds)
        right, sharp = found[:, :5].all(1).reshape(-1, seeds), found[:, 5].reshape(-1, seeds)
        best = {}
        for n in (1, 2, 4, 8, 16, 32, 64):
            if n <= seeds:
                groups = values.reshape(len(some), -1, n)
                chosen = groups.argmax(2)
                best[f"best_of_{n}"] = float(
                    np.take_along_axis(right.reshape(groups.shape), chosen[..., None], 2).mean()
                )
                best[f"reward_{n}"] = float(groups.max(2).mean())
                best[f"fidelity_{n}"] = float(
                    np.take_along_axis(sharp.reshape(groups.shape), chosen[..., None], 2).mean()
                )
        run.log(stage="steps", steps=steps, oracle=float(right.any(1).mean()), **best)
        if steps == 20:
            run.log(stage="one sample", **figures(found))
            logits_np = logits.cpu().numpy()
            by_kind = {kind: auc(logits_np[:, i], found[:, i] > 0.5) for i, kind in enumerate(ALL_KINDS)}
            run.log(stage="auc", **by_kind, all=auc(values.ravel(), np.asarray(found[:, :5].all(1))))
            sheet(
                images[: 8 * seeds].reshape(-1, seeds, *images.shape[1:])[:, :12].reshape(-1, *images.shape[1:]),
                12,
                run.out / "sheet.png",
            )
            (run.out / "sheet.txt").write_text("\n".join(some[:8]))


def halves(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are stored."""
    return {key: value.half().contiguous().cpu() for key, value in state.items()}


def train_foretelling(run: Run, minutes: float, groups: int) -> None:
    """The noise-aware reward and the tiny decoder, both from the same trajectories of half the steps."""
    texts, decoder, reward = load_texts(run.device, run.out), load_vae(run.device, run.out), load_hard_reward(run)
    model = load_transformer(run.out / "transformer.pt").to(run.device)
    groups, rng = run.count(groups, 8), np.random.default_rng(19)
    some = [hard.sample_spec(rng, fewer=0.03).prompt for _ in range(groups)]
    trails = trails_of(run, model, texts, decoder, reward, some, 8, 10, 70_000)
    head = foresight.begin(copy.deepcopy(reward.network))
    begin_from(head.student, foresight.load_foresight().head.student.state_dict())  # type: ignore[attr-defined]
    head = head.to(run.device)
    distil(run, head, trails, decoder, 0.2 * minutes)
    head._clean.texts = reward.texts  # the reading of prompts is the same
    chunk = 768 if run.gpu else 128
    for count in (5, 20):  # the first is slower
        begun = clock()
        train_foresight(copy.deepcopy(head), trails, updates=count, batch=chunk)
        each = (clock() - begun) / count
    updates = max(5, int(0.7 * minutes * 60 * run.minutes / each))
    head = train_foresight(
        head, trails, updates=updates, batch=chunk, lowest=0.15, tell=lambda line: run.log(note=line)
    )
    notes = {"trajectories": 8 * groups, "updates": updates, "lowest": 0.15}
    foresight.save(head, run.out / "foresight", sigma=0.65, trained=notes)
    train_preview(run, trails, decoder, 0.1 * minutes)


def measure(run: Run, what: str) -> None:
    """Gates of the generator and the clean reward, or of the noise-aware one, on held-out prompts."""
    texts, decoder, reward = load_texts(run.device, run.out), load_vae(run.device, run.out), load_hard_reward(run)
    model = load_transformer(run.out / "transformer.pt").to(run.device)
    if what == "gates":
        gates(run, model, texts, decoder, reward)
        return
    head = foresight.load_foresight(run.device, run.out / "foresight", reward).head
    prompts = hard.held_out_prompts()[-run.count(40, 4) :]
    tests = trails_of(run, model, texts, decoder, reward, prompts, 16, 20, 5)
    early(run, head, reward, decoder, tests)


def export_all(run: Run) -> None:
    """Put everything together as it is shipped, in fp16."""
    import shutil

    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    texts = load_texts(run.device, run.out)
    clip, t5 = texts.tokenizers
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=load_vae(run.device, run.out),
        text_encoder=texts.clip_model,
        tokenizer=clip,
        text_encoder_2=texts.t5_model,
        tokenizer_2=t5,
        transformer=load_transformer(run.out / "transformer.pt"),
    ).to(dtype=torch.float16)
    shutil.rmtree(hard.WEIGHTS, ignore_errors=True)
    pipe.save_pretrained(hard.WEIGHTS / "pipeline")
    for part in ("preview", "reward", "foresight"):
        shutil.copytree(run.out / part, hard.WEIGHTS / part)


def main() -> None:
    """The stages that are named, in their order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages",
        nargs="+",
        choices=("text", "vae", "scenes", "transformer", "reward", "foresight", "gates", "early", "export"),
    )
    parser.add_argument("--out", type=Path, default=Path("runs/hard"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="processes that draw and check")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2, help="of the transformer's training")
    parser.add_argument("--minutes", type=float, default=1.0, help="factor of all times")
    parser.add_argument("--count", type=float, default=1.0, help="factor of all counts")
    parser.add_argument("--transformer", type=float, default=30, help="minutes")
    parser.add_argument("--begin", type=Path, help="weights that the transformer begins with: a `true.pt`")
    parser.add_argument("--loose", type=float, default=0.75, help="share of the time after which captions are loose")
    parser.add_argument("--rate", type=float, default=4e-3, help="of Muon; AdamW takes half")
    parser.add_argument("--evaluate", type=float, default=6, help="minutes between evaluations of the transformer")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    run = Run(a)
    for stage in a.stages:
        if stage == "text":
            train_text(run, 3)
        elif stage == "vae":
            train_vae(run, 6, 5)
        elif stage == "scenes":
            scenes(run, 40_960 if not run.gpu else 262_144)
        elif stage == "transformer":
            common.launch(train_transformer, a.processes, a)
        elif stage == "reward":
            train_reward(run, 9)
        elif stage == "foresight":
            train_foretelling(run, 8, 700 if not run.gpu else 10_000)
        elif stage in ("gates", "early"):
            measure(run, stage)
        else:
            export_all(run)
    run.log(stage="done")
    run.workers.terminate()


if __name__ == "__main__":
    main()
