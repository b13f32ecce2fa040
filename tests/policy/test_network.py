"""The network against its formulas written out, and its input normalisation over time."""

from __future__ import annotations

import pytest
import torch
from policy.samples import SPACE, random_network

from lhopt_fused.policy.network import (
    InputNormalisation,
    LayerNormLSTMCell,
    LSTMState,
    NetworkShape,
    PolicyNetwork,
)


def _norm(x: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def test_the_cell_is_its_formula() -> None:
    torch.manual_seed(0)
    cell = LayerNormLSTMCell(16)
    for parameter in cell.parameters():
        torch.nn.init.normal_(parameter)
    x, h, c = torch.randn(3, 4, 16)
    w = dict(cell.named_parameters())
    gates = _norm(x @ w["input.weight"].T) * w["input_norm.weight"] + w["input_norm.bias"]
    gates = gates + _norm(h @ w["recurrent.weight"].T) * w["recurrent_norm.weight"]
    i, f, g, o = gates.chunk(4, -1)
    new_c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    scaled = _norm(new_c) * w["cell_norm.weight"] + w["cell_norm.bias"]
    state = cell(x, LSTMState(h, c))
    assert torch.allclose(state.c, new_c, atol=1e-5)
    assert torch.allclose(state.h, o.sigmoid() * scaled.tanh(), atol=1e-5)
    assert not torch.allclose(state.h, o.sigmoid() * new_c.tanh(), atol=1e-2)  # no norm on c


def test_batches_do_not_mix() -> None:
    network = random_network(0)
    x = torch.randn(2, 5, network.shape.features)
    logits, state = network(x, network.initial_state((2, 5)))
    assert logits.shape == (2, 5, sum(SPACE.head_sizes))
    alone, alone_state = network(x[1, 3], network.initial_state())
    assert torch.allclose(logits[1, 3], alone, atol=1e-5)
    assert torch.allclose(state.c[1, 3], alone_state.c, atol=1e-5)


def test_fresh_heads_are_nearly_uniform() -> None:
    torch.manual_seed(0)
    network = PolicyNetwork(NetworkShape(10, (7, 2))).eval()
    logits, _ = network(torch.randn(64, 10), network.initial_state((64,)))
    assert logits.abs().max() < 0.1


def test_normalisation_is_the_bias_corrected_average() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = 3 + 2 * torch.randn(20, 8, 4, generator=generator, dtype=torch.float64)
    norm = InputNormalisation(4).double()
    weights = torch.tensor([0.999**age for age in range(19, -1, -1)], dtype=torch.float64)
    weights /= weights.sum()
    for batch in batches:
        out = norm(batch)
    mean = torch.einsum("t,tbf->f", weights, batches) / 8
    square = torch.einsum("t,tbf->f", weights, batches**2) / 8
    assert torch.allclose(norm.mean, mean, atol=1e-9)
    assert torch.allclose(norm.var, square - mean**2, atol=1e-9)
    expected = ((batches[-1] - mean) / (norm.var + 1e-5).sqrt()).clamp(-2, 2)
    assert torch.allclose(out, expected, atol=1e-9)
    assert out.abs().max() == 2


def test_normalisation_keeps_small_variances_on_large_means() -> None:
    """E[x^2] - E[x]^2 in float32 would lose them."""
    generator = torch.Generator().manual_seed(0)
    norm = InputNormalisation(1)
    for _ in range(100):
        norm(1000 + torch.randn(256, 1, generator=generator) / 100)
    assert norm.var.item() == pytest.approx(1e-4, rel=0.1)


def test_evaluation_freezes_the_statistics() -> None:
    norm = InputNormalisation(3)
    x = torch.randn(16, 3)
    norm(x)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    norm.eval()(5 * x)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
    norm.train()(5 * x)
    assert not torch.equal(before["mean"], norm.mean)


def test_gradients_reach_every_weight() -> None:
    network = PolicyNetwork(NetworkShape(12, (3, 10), 16, 16))
    state = network.initial_state((4,))
    for _ in range(2):
        logits, state = network(torch.randn(4, 12), state)
    (logits * torch.randn_like(logits)).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"features": 0}, "features is 0"),
        ({"hidden": 100}, "hidden is 100, expected a multiple of 16"),
        ({"hidden": 10**12}, "hidden is 1000000000000, expected an integer from 1 to 2048"),
        ({"head_hidden": True}, "head_hidden is True"),
        ({"heads": ()}, "heads has 0 entries"),
        ({"heads": (3, 65)}, r"heads\[1\] is 65"),
    ],
)
def test_shapes_are_checked(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NetworkShape(**{"features": 12, "heads": (3,), **fields})
