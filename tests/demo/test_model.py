"""The GPT: causal, seeded, sized as asked."""

from __future__ import annotations

import math

import pytest
import torch

from lhopt_fused.demo.model import GPT, GPTConfig
from lhopt_fused.demo.text import InputError

SMALL = GPTConfig(context=8, width=16, layers=2, heads=2)


def test_logits_do_not_see_the_future():
    model = GPT(SMALL)
    tokens = torch.arange(8).repeat(2, 1)
    changed = tokens.clone()
    changed[:, 5:] += 7
    torch.testing.assert_close(model(tokens)[:, :5], model(changed)[:, :5], rtol=0, atol=0)


def test_weights_follow_from_the_seed_and_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    one, same, other = (GPT(SMALL, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["token.weight"], other["token.weight"])


def test_an_untrained_model_guesses_evenly():
    loss = GPT(SMALL).loss(torch.arange(9).repeat(4, 1))
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


@pytest.mark.parametrize("size", ["context", "width", "layers", "heads"])
def test_sizes_must_be_positive(size):
    with pytest.raises(InputError, match=rf"--{size}: must be an integer >= 1, got 0"):
        GPTConfig(**{size: 0})


def test_width_must_split_into_heads():
    with pytest.raises(InputError, match="130 does not split into 4 heads"):
        GPTConfig(width=130, heads=4)
