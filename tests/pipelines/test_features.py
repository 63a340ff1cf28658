"""Features are what the denoiser made of a candidate in a call that was made anyway; listening changes nothing."""

from __future__ import annotations

import pytest
import torch

from tests.pipelines import tiny, tiny_sd
from ttsnap.pipelines.features import Place, Tap, attach
from ttsnap.pipelines.sampler import Sampler

PROMPTS = ["a red circle", "a blue square left of a green circle"]
SMALL = {"height": 32, "width": 64, "max_sequence_length": 12, "num_inference_steps": 4}
PLACE = Place("single_transformer_blocks.0", grid=4)


class Reads:
    """A reward that reads features of a place."""

    def __init__(self, place=PLACE):
        self.places = [place]


@pytest.fixture
def sampler():
    made = Sampler(tiny.flux(), **SMALL)
    attach(made, {"it": Reads()})
    return made


def test_features_are_those_of_the_last_call_and_listening_changes_nothing(sampler):
    plain = Sampler(sampler.pipe, **SMALL)
    seen = []
    block = sampler.pipe.transformer.single_transformer_blocks[0]
    hook = block.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    state = sampler.advance(sampler.start(PROMPTS, [1, 2]), 3)
    hook.remove()
    assert len(seen) == 3
    torch.testing.assert_close(state.cells, _pooled(seen[-1]))
    torch.testing.assert_close(state.x0, plain.advance(plain.start(PROMPTS, [1, 2]), 3).x0, atol=0, rtol=0)
    assert not block._forward_hooks
    features = sampler.features(state)
    assert features.cells is state.cells
    for prompt, words in zip(PROMPTS, features.words, strict=True):
        expected = sampler.pipe.encode_prompt(prompt, None, max_sequence_length=12)[0][0]
        torch.testing.assert_close(words, expected)


def _pooled(tokens):
    """128 tokens, 8 rows of 16 (an image of 32 x 64 pixels), as 4 x 4 cells."""
    return tokens.unflatten(1, (4, 2, 4, 4)).mean((2, 4)).flatten(1, 2)


def test_a_candidates_features_do_not_depend_on_its_batch(sampler):
    prompts, seeds = [PROMPTS[i % 2] for i in range(8)], list(range(8))
    together = sampler.advance(sampler.start(prompts, seeds), 2)
    sampler.max_batch = 1
    alone = sampler.advance(sampler.start(prompts, seeds), 2)
    torch.testing.assert_close(together.cells, alone.cells, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.select([5, 2]).cells, together.cells[[5, 2]])


def test_with_guidance_the_pass_with_the_prompt_counts():
    guided = Sampler(tiny.flux(), **SMALL, negative_prompt="a cyan triangle", true_cfg_scale=3.0)
    plain = Sampler(guided.pipe, **SMALL)
    for sampler in (guided, plain):
        attach(sampler, {"it": Reads()})
    one, other = (sampler.advance(sampler.start(PROMPTS, [1, 2]), 1) for sampler in (guided, plain))
    torch.testing.assert_close(one.cells, other.cells)
    words, plain_words = (sampler.features(state).words for sampler, state in ((guided, one), (plain, other)))
    torch.testing.assert_close(words, plain_words)


def test_of_a_doubled_batch_the_half_with_the_prompt_counts():
    """As UNets run classifier-free guidance: the unconditional half first."""

    class Unet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv_norm_out = torch.nn.Identity()

        def forward(self, sample, encoder_hidden_states):
            return self.conv_norm_out(sample)

    unet = Unet()
    tap = Tap(unet, [Place("conv_norm_out", "input", grid=2)])
    maps, states = torch.rand(4, 3, 8, 8), torch.rand(4, 5, 6)
    with tap.listen(PROMPTS) as heard:
        unet(maps, encoder_hidden_states=states)
    torch.testing.assert_close(heard[0], maps[2:].unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5)).flatten(2).mT)
    torch.testing.assert_close(torch.stack(tap.words(PROMPTS)), states[2:])


def test_the_first_batch_by_which_merging_is_tried_is_heard_as_any_other():
    """With guidance a candidate alone has two rows, as many as a batch of two has candidates."""
    options = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 5.0}
    pipe, place = tiny_sd.stable_diffusion(), Place("mid_block", grid=2)
    together, alone = Sampler(pipe, **options), Sampler(pipe, **options)
    for sampler in (together, alone):
        attach(sampler, {"it": Reads(place)})
    alone.max_batch = 1
    together.probe.sure.clear()
    both = together.advance(together.start(PROMPTS, [1, 2]), 1)
    single = alone.advance(alone.start(PROMPTS, [1, 2]), 1)
    torch.testing.assert_close(both.cells, single.cells, atol=1e-4, rtol=1e-4)
    for mine, theirs in zip(together.features(both).words, alone.features(single).words, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_of_a_video_whose_frames_are_rows_the_mean_over_its_frames_counts():
    """As UNets with motion modules run them: frames among the rows, and the words once for each frame."""

    class Unet(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mid_block = torch.nn.Identity()

        def forward(self, sample, encoder_hidden_states):
            return self.mid_block(sample.transpose(1, 2).flatten(0, 1))

    unet = Unet()
    tap = Tap(unet, [Place("mid_block", grid=2), Place("x0", grid=2)])
    videos, words = torch.rand(4, 3, 5, 8, 8), torch.rand(4, 6, 7)
    with tap.listen(PROMPTS) as heard:
        unet(videos, encoder_hidden_states=words.repeat_interleave(5, 0))
    cells = videos[2:].mean(2).unflatten(3, (2, 4)).unflatten(2, (2, 4)).mean((3, 5)).flatten(2).mT
    torch.testing.assert_close(heard[0], cells)
    torch.testing.assert_close(torch.stack(tap.words(PROMPTS)), words[2:])
    frames = videos[2:].transpose(1, 2).flatten(0, 1)
    together = tap.with_x0(heard[0], frames, 2)
    assert together.shape == (2, 4, 3 + 3 * 16)
    torch.testing.assert_close(together, tap.with_x0(heard[0], videos[2:], 2))


def test_what_cannot_be_read_is_one_sentence(sampler):
    with pytest.raises(ValueError, match="reads the module 'nowhere', which FluxTransformer2DModel does not have"):
        attach(sampler, {"it": Reads(Place("nowhere"))})
    with pytest.raises(ValueError, match=r"must read the same ones, got norm_out, single_transformer_blocks\.0"):
        attach(sampler, {"it": Reads(), "other": Reads(Place("norm_out", "input"))})
    attach(sampler, {"clean": object()})
    assert sampler.tap is None
    with pytest.raises(ValueError, match="no features were kept"):
        sampler.features(sampler.advance(sampler.start(PROMPTS, [1, 2]), 1))
