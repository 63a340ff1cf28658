from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.pipelines import tiny
from ttsnap.pipelines.negtome import REPEL, Negtome, Pushed, applied, parse, push
from ttsnap.pipelines.sampler import Sampler
from ttsnap.recordings.image_tree import ImageTree

A, B = "a red circle", "a blue square left of a green circle"
STRONG = Negtome(merging_alpha=1.0, merging_threshold=-1.0, t_end=500.0)
DROPPED = replace(STRONG, merging_dropout=0.2)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def pipe():
    return tiny.flux()


def sampler_of(pipe, max_batch=8, **options):
    return Sampler(
        pipe, num_inference_steps=4, height=32, width=32, max_sequence_length=12, max_batch=max_batch, **options
    )


def finish(sampler, prompts=(A, A, A), seeds=(1, 2, 3), to_step=4):
    return sampler.advance(sampler.start(prompts, seeds), to_step).latents


def hooks(pipe):
    modules = pipe.transformer.modules()
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


def plain(x, y, parameters):
    """The update, token by token."""
    result = x.clone()
    for i, token in enumerate(x):
        similarities = [float(torch.cosine_similarity(token.double(), other.double(), dim=0)) for other in y]
        best = int(np.argmax(similarities))
        if similarities[best] > parameters.merging_threshold:
            result[i] = token + parameters.merging_alpha * (token - y[best])
    return result


@pytest.mark.parametrize("parameters", [Negtome(0.9, 0.2), Negtome(0.9, -1.0)])
def test_the_update_is_the_plain_one(parameters):
    x, y = torch.randn(2, 7, 6), torch.randn(2, 5, 6)
    expected = torch.stack([plain(a, b, parameters) for a, b in zip(x, y, strict=True)])
    torch.testing.assert_close(push(x, y, parameters), expected)
    assert not torch.equal(expected, x)


def test_a_call_is_the_plain_one_on_every_attention(pipe, monkeypatch):
    """Independent of the hooks: the attention processors themselves are wrapped."""
    sampler = sampler_of(pipe)
    with applied(sampler, STRONG):
        ours = finish(sampler, (A, A), (1, 2), 1)
    tokens = sampler.probe.sample[1]
    for block in [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]:
        attention = block.attn
        module = attention.to_out[0] if hasattr(attention, "to_out") else None
        if module is not None:
            forward = module.forward

            def joint(x, forward=forward):
                return forward(torch.stack([x[0], plain(x[1], x[0], STRONG)]))

            monkeypatch.setattr(module, "forward", joint)
        else:
            forward = attention.forward

            def single(*args, forward=forward, **kwargs):
                x = forward(*args, **kwargs)
                x[1, -tokens:] = plain(x[1, -tokens:], x[0, -tokens:], STRONG)
                return x

            monkeypatch.setattr(attention, "forward", single)
    expected = finish(sampler, (A, A), (1, 2), 1)
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_nothing_to_do_is_stock_to_the_last_bit(pipe):
    sampler = sampler_of(pipe)
    stock = finish(sampler)
    for parameters in (
        Negtome(merging_alpha=0.0),
        Negtome(merging_threshold=1.0),
        Negtome(num_joint_blocks=0, num_single_blocks=0),
        Negtome(merging_dropout=1.0, merging_threshold=-1.0),
    ):
        with applied(sampler, parameters):
            assert torch.equal(finish(sampler), stock)


def test_only_between_t_start_and_t_end(pipe):
    sampler = sampler_of(pipe)  # timesteps 1000, 750, 500, 250
    stock = [finish(sampler, to_step=step) for step in (1, 2)]
    with applied(sampler, Negtome(merging_threshold=-1, t_start=800, t_end=600)):
        assert torch.equal(finish(sampler, to_step=1), stock[0])
        assert not torch.equal(finish(sampler, to_step=2)[1:], stock[1][1:])
    with applied(sampler, Negtome(merging_threshold=-1, t_start=240, t_end=0)):
        assert torch.equal(finish(sampler), finish(sampler_of(pipe)))


def test_the_first_candidate_stays_and_the_others_leave_it(pipe):
    sampler = sampler_of(pipe)
    stock = finish(sampler)
    with applied(sampler, STRONG):
        ours = finish(sampler)
    assert torch.equal(ours[0], stock[0])
    assert (ours[1:] - ours[0]).norm() > (stock[1:] - stock[0]).norm()


def test_the_group_is_the_prompt(pipe):
    sampler = sampler_of(pipe)
    with applied(sampler, STRONG):
        alone = finish(sampler, (A, A), (1, 2))
    with applied(sampler, STRONG):
        mixed = finish(sampler, (B, A, B, A), (7, 1, 8, 2))
    torch.testing.assert_close(mixed[[1, 3]], alone, **CLOSE)


@pytest.mark.parametrize("parameters", [STRONG, DROPPED])
@pytest.mark.parametrize("options", [{}, {"negative_prompt": "a cyan square", "true_cfg_scale": 2.0}])
def test_batches_do_not_matter(pipe, parameters, options):
    whole, split = sampler_of(pipe, **options), sampler_of(pipe, max_batch=1, **options)
    prompts, seeds = (A, A, B, A, B), (1, 2, 3, 4, 5)
    with applied(whole, parameters) as state:
        together = finish(whole, prompts, seeds)
        assert state.extra_calls == 0
    with applied(split, parameters) as state:
        torch.testing.assert_close(finish(split, prompts, seeds), together, **CLOSE)
        assert state.extra_calls > 0


def test_a_pruned_reference_still_counts(pipe):
    sampler = sampler_of(pipe)
    with applied(sampler, STRONG) as state:
        whole = sampler.advance(sampler.start((A, A, A), (1, 2, 3)), 1)
        rest = sampler.advance(whole.select([2]), 4).latents
        assert state.extra_calls == 3  # at timesteps 1000, again, 750 and 500
        state.forget()
        sampler.group((A, A, A), (1, 2, 3))
        again = sampler.advance(whole.select([2]), 4).latents  # from the reference's noise
        torch.testing.assert_close(again, rest, **CLOSE)
        torch.testing.assert_close(finish(sampler)[2:], rest, **CLOSE)


def test_dropout_is_decided_by_the_seed(pipe):
    sampler = sampler_of(pipe)
    with applied(sampler, DROPPED):
        first = finish(sampler)
    with applied(sampler, DROPPED):
        torch.rand(3)
        assert torch.equal(finish(sampler), first)
        torch.testing.assert_close(finish(sampler, (A, A), (1, 3)), first[[0, 2]], **CLOSE)
    with applied(sampler, STRONG):
        assert not torch.equal(finish(sampler)[1:], first[1:])


def test_repel_takes_the_best_match_among_all_other_images(pipe):
    """Nobody is the reference: each is pushed from the others of its prompt, as the authors' code does."""
    sampler = sampler_of(pipe)
    stock = finish(sampler)
    with applied(sampler, replace(REPEL, merging_threshold=-1.0, merging_dropout=0.0, t_end=500.0)):
        ours = finish(sampler)
        alone = finish(sampler, (A,), (1,))
    assert all(not torch.equal(ours[row], stock[row]) for row in range(3))
    torch.testing.assert_close(alone, stock[:1], **CLOSE)
    x = torch.randn(3, 6, 4)
    pushed = Pushed(replace(REPEL, merging_threshold=-1.0), 3, [0, 1, 2], [[1, 2], [0, 2], [0, 1]])(x, 6, None)
    for row, others in enumerate([[1, 2], [0, 2], [0, 1]]):
        expected = plain(x[row], torch.cat([x[other] for other in others]), replace(REPEL, merging_threshold=-1.0))
        torch.testing.assert_close(pushed[row], expected)


def test_hooks_are_gone_afterwards(pipe, monkeypatch):
    sampler = sampler_of(pipe)
    before = hooks(pipe)
    with applied(sampler, STRONG):
        finish(sampler)
        assert hooks(pipe) == before
    assert sampler.diversity is None
    proj_out = pipe.transformer.proj_out
    monkeypatch.setattr(proj_out, "forward", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match="division by zero"), applied(sampler, STRONG):
        finish(sampler)
    assert hooks(pipe) == before
    assert sampler.diversity is None


BAD = {
    "dropout=2": "no parameter 'dropout'",
    "merging_dropout=2": "must be in 0..1, got 2",
    "merging_alpha=nan": "must be a finite number",
    "merging_alpha": "takes a value such as merging_alpha=0.5, got ''",
    "repel=maybe": "takes a value such as repel=true, got 'maybe'",
    "num_joint_blocks=-2": "must be -1 .all. or more",
    "t_start=800": "must ascend within 0..1000, got 900 and 800",
    "merging_threshold=2": "must be in -1..1",
}


@pytest.mark.parametrize("options", BAD)
def test_bad_options_are_one_sentence(options):
    with pytest.raises(ValueError, match=BAD[options]):
        parse("negtome", options)


def test_names():
    assert parse(None) is None
    assert parse("negtome") == Negtome()
    assert parse("repel", "merging_alpha=1.5, num_joint_blocks=2").merging_alpha == 1.5
    with pytest.raises(ValueError, match="known are negtome, repel"):
        parse("cads")
    with pytest.raises(ValueError, match="need --diversity"):
        parse(None, "merging_alpha=1")
    from tests.pipelines.toy import toy_sampler

    with pytest.raises(ValueError, match=r"works with FluxPipeline, .*, not with"), applied(toy_sampler()):
        pass


def test_recorded_with_it_and_gone_on_with(ttsnap, tmp_path):
    options = ["record", A, B, "--per-prompt", 4, "--steps", 6, "--max-batch", 2, "--calls", "1,6"]
    options += ["--diversity", "negtome", "--diversity-options", "t_end=500"]
    assert ttsnap(*options, "--out", tmp_path / "whole")[0] == 0
    tree = ImageTree.open(tmp_path / "whole")
    assert tree.settings["diversity"]["t_end"] == 500
    images = {path: path.read_bytes() for path in sorted(tree.root.rglob("*.png"))}
    for path in images:
        if "id003" in str(path):
            path.unlink()
    ttsnap(*options, "--out", tmp_path / "whole")
    assert {path: path.read_bytes() for path in images} == images
    code, _, err = ttsnap(*options[:-4], "--out", tmp_path / "whole")
    assert code == 2
    assert "(diversity differ)" in err


def test_generated_with_it_says_so(ttsnap, tmp_path):
    options = ["generate", B, "--candidates", 4, "--steps", 6, "--diversity", "repel", "--json", "--no-board"]
    code, out, _ = ttsnap(*options, "--out", tmp_path / "out")
    record = json.loads(out)
    assert code == 0
    assert record["diversity"]["merging_alpha"] == 3
    assert record["seed"] == 0 or record["reproduce"].startswith("not by the pipeline alone")
    code, _, err = ttsnap("generate", B, "--diversity", "magic")
    assert code == 2
    assert "known are negtome, repel" in err
