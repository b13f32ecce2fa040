"""Stacked networks and losses are what torch's own layers give, one task at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from tolerances import DROPPED_SHARE, STACKED_NETWORK, assert_close
from torch import nn

from lhopt_fused.meta.tasks.image_cnn import CNN
from lhopt_fused.meta.tasks.layers import (
    ACTIVATIONS,
    NORMS,
    Dropout,
    Loss,
    Norm,
    draw_parameters,
    losses,
)
from lhopt_fused.meta.tasks.mlp import MLP
from lhopt_fused.meta.tasks.recurrent import Cell, Recurrent
from lhopt_fused.meta.tasks.supervised import Network
from lhopt_fused.meta.tasks.transformer import Transformer

RUNS = 3
SEEDS = torch.tensor([5, 6, 7])

Params = dict[str, torch.Tensor]


def drawn(network: Network) -> Params:
    """Starting values with every constant moved, so that none could be left out."""
    params = draw_parameters(network.parameters, SEEDS, torch.ones(RUNS))
    generator = torch.Generator().manual_seed(0)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in params.items()
    }


def check(network: Network, inputs: torch.Tensor, plain: Callable[..., torch.Tensor]) -> None:
    """``plain(params of one task, its inputs)`` agrees for each task, and not for another's."""
    params = drawn(network)
    outputs = network.forward(params, inputs, None)
    expected = torch.stack(
        [plain({key: own[run] for key, own in params.items()}, inputs[run]) for run in range(RUNS)]
    )
    assert_close(outputs, expected.view(outputs.shape), STACKED_NETWORK, expected.abs().max())
    with pytest.raises(AssertionError):
        assert_close(outputs.roll(1, 0), expected.view(outputs.shape), STACKED_NETWORK, 1.0)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def symbols(count: int, *shape: int) -> torch.Tensor:
    return torch.randint(count, shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("norm", NORMS)
def test_mlp(norm: Norm, activation: str) -> None:
    def plain(params: Params, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs
        for index in ("0", "1"):
            hidden = hidden @ params[f"{index}.weight"] + params[f"{index}.bias"]
            if norm == "layer":
                scale, shift = params[f"{index}.scale"], params[f"{index}.shift"]
                hidden = F.layer_norm(hidden, (7,), scale, shift)
            if norm == "batch":
                scale, shift = params[f"{index}.scale"], params[f"{index}.shift"]
                hidden = F.batch_norm(hidden, None, None, scale, shift, training=True)
            hidden = ACTIVATIONS[activation](hidden)
        return hidden @ params["2.weight"] + params["2.bias"]

    check(MLP(5, (7, 7), 3, activation, norm), normal(RUNS, 4, 5), plain)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("norm", NORMS)
def test_cnn(norm: Norm, pooled: bool) -> None:
    def plain(params: Params, inputs: torch.Tensor) -> torch.Tensor:
        hidden = inputs
        for index, stride in enumerate((1, 2)):
            weight, bias = params[f"{index}.weight"], params[f"{index}.bias"]
            hidden = F.conv2d(hidden, weight, bias, stride=stride, padding=1)
            if norm == "layer":
                scale, shift = params[f"{index}.scale"], params[f"{index}.shift"]
                hidden = F.group_norm(hidden, 1, scale, shift)
            if norm == "batch":
                scale, shift = params[f"{index}.scale"], params[f"{index}.shift"]
                hidden = F.batch_norm(hidden, None, None, scale, shift, training=True)
            hidden = hidden.relu()
        hidden = hidden.mean(dim=(2, 3)) if pooled else hidden.flatten(1)
        return hidden @ params["head.weight"] + params["head.bias"]

    network = CNN((2, 6, 5), ((4, 1), (3, 2)), 3, "relu", norm, pooled)
    check(network, normal(RUNS, 4, 2, 6, 5), plain)


def torch_cell(cell: Cell, params: Params) -> nn.Module:
    """Torch's module with one task's weights; its LSTM orders gates i f g o, ours i f o g."""
    gates = params["recurrent.weight"].shape[1]
    order = torch.arange(gates)
    if cell == "lstm":
        i, f, o, g = order.chunk(4)
        order = torch.cat([i, f, g, o])
    kinds = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
    count, width = params["symbols.weight"].shape[0], params["recurrent.weight"].shape[0]
    module = kinds[cell](count, width, batch_first=True)
    with torch.no_grad():
        module.weight_ih_l0.copy_(params["symbols.weight"].T[order])
        module.bias_ih_l0.copy_(params["symbols.bias"][order])
        module.weight_hh_l0.copy_(params["recurrent.weight"].T[order])
        module.bias_hh_l0.zero_()
    return module


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_recurrent(cell: Cell, every_step: bool) -> None:
    def plain(params: Params, inputs: torch.Tensor) -> torch.Tensor:
        hidden = torch_cell(cell, params)(F.one_hot(inputs, 5).float())[0]
        if not every_step:
            hidden = hidden[:, -1]
        return hidden.flatten(0, -2) @ params["head.weight"] + params["head.bias"]

    check(Recurrent(cell, 5, 6, 7, 3, every_step), symbols(5, RUNS, 4, 6), plain)


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer(norm_first: bool) -> None:
    network = Transformer(6, 8, 2, 2, 12, "relu", norm_first)

    def plain(params: Params, inputs: torch.Tensor) -> torch.Tensor:
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, norm_first=norm_first, batch_first=True)
        hidden = params["symbols"][inputs] + params["positions"]
        mask = torch.full((6, 6), -math.inf).triu(1)
        for index in range(2):
            layer.load_state_dict(torch_layer(params, index))
            hidden = layer(hidden, src_mask=mask)
        hidden = F.layer_norm(hidden, (8,), params["head.scale"], params["head.shift"])
        return (hidden @ params["head.weight"] + params["head.bias"]).flatten(0, 1)

    check(network, symbols(32, RUNS, 4, 6), plain)


def test_a_transformer_that_starts_as_gpt2_does() -> None:
    network = Transformer(6, 8, 2, 2, 12, "relu", True, small_start=True)
    assert "head.weight" not in network.parameters

    def plain(params: Params, inputs: torch.Tensor) -> torch.Tensor:
        untied = Transformer(6, 8, 2, 2, 12, "relu", True)
        head = {"head.weight": params["symbols"].T, "head.bias": torch.zeros(32)}
        stacked = {name: value[None] for name, value in {**params, **head}.items()}
        return untied.forward(stacked, inputs[None], None)[0]

    check(network, symbols(32, RUNS, 4, 6), plain)
    start = draw_parameters(network.parameters, torch.arange(64), torch.ones(64))
    for name, value in start.items():
        if name.endswith(("scale", "shift", "bias")):
            continue
        adds_up = name.endswith(("mix.weight", "fall.weight"))
        assert value.std().item() == pytest.approx(0.02 / (2 if adds_up else 1), rel=0.03)


def torch_layer(params: Params, index: int) -> Params:
    """The parameters of one layer, as torch's encoder layer names and lays them out."""
    state = {
        "self_attn.in_proj_weight": params[f"{index}.attend.weight"].T,
        "self_attn.in_proj_bias": params[f"{index}.attend.bias"],
    }
    linears = {"self_attn.out_proj": "mix", "linear1": "rise", "linear2": "fall"}
    for theirs, ours in linears.items():
        state[f"{theirs}.weight"] = params[f"{index}.{ours}.weight"].T
        state[f"{theirs}.bias"] = params[f"{index}.{ours}.bias"]
    for theirs, ours in {"norm1": "attend", "norm2": "rise"}.items():
        state[f"{theirs}.weight"] = params[f"{index}.{ours}.scale"]
        state[f"{theirs}.bias"] = params[f"{index}.{ours}.shift"]
    return state


def test_a_transformer_does_not_see_what_comes() -> None:
    network = Transformer(6, 8, 2, 2, 12, "relu", True)
    params, inputs = drawn(network), symbols(32, RUNS, 4, 6)
    changed = inputs.clone()
    changed[..., 4] = (changed[..., 4] + 1) % 32
    before = network.forward(params, inputs, None).view(RUNS, 4, 6, 32)
    after = network.forward(params, changed, None).view(RUNS, 4, 6, 32)
    assert_close(after[:, :, :4], before[:, :, :4], STACKED_NETWORK, before.abs().max())
    assert not torch.allclose(after[:, :, 4:], before[:, :, 4:], atol=1e-3)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error", "hinge"])
def test_losses_of_classes(loss: Loss) -> None:
    outputs, targets = normal(RUNS, 6, 4), symbols(4, RUNS, 6)
    kinds: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
        "cross_entropy": F.cross_entropy,
        "squared_error": lambda o, t: 4 * F.mse_loss(o, F.one_hot(t, 4).float()),
        "hinge": F.multi_margin_loss,
    }
    expected = torch.stack([kinds[loss](outputs[run], targets[run]) for run in range(RUNS)])
    assert_close(losses(outputs, targets, loss), expected, STACKED_NETWORK, 1.0)
    with pytest.raises(AssertionError):
        assert_close(losses(outputs, targets.roll(1, 1), loss), expected, STACKED_NETWORK, 1.0)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error", "hinge"])
def test_a_loss_is_positive_and_shows_nan(loss: Loss) -> None:
    targets = symbols(4, RUNS, 6)
    certain = 100.0 * F.one_hot(targets, 4).float()
    right = certain if loss != "squared_error" else certain / 100.0
    assert bool((losses(right, targets, loss) > 0).all())
    right[1, 2, 0] = math.nan
    assert losses(right, targets, loss).isnan().tolist() == [False, True, False]


def test_losses_of_numbers() -> None:
    outputs, targets = normal(RUNS, 6, 2), normal(2, RUNS, 6).movedim(0, 2).contiguous()
    expected = torch.stack([F.mse_loss(outputs[run], targets[run]) for run in range(RUNS)])
    assert_close(losses(outputs, targets, "squared_error"), expected, STACKED_NETWORK, 1.0)


def test_dropout_drops_a_share_and_keeps_the_mean() -> None:
    rates = torch.tensor([0.0, 0.2, 0.5])
    inputs = torch.ones(RUNS, 50, 200)
    dropout = Dropout(SEEDS, 3, rates)
    dropped, again = dropout(inputs), dropout(inputs)
    share = (dropped == 0).float().mean(dim=(1, 2))
    assert_close(share, rates, DROPPED_SHARE, 1.0)
    assert torch.equal(dropped[0], inputs[0])
    assert bool((dropped[2][dropped[2] != 0] == 2.0).all())
    assert not torch.equal(dropped, again)  # each call has masks of its own
    assert torch.equal(Dropout(SEEDS, 3, rates)(inputs), dropped)
    assert not torch.equal(Dropout(SEEDS, 4, rates)(inputs), dropped)


@pytest.mark.parametrize(
    ("network", "inputs"),
    [
        (MLP(5, (7, 7), 3, "tanh", "none"), normal(RUNS, 4, 5)),
        (CNN((2, 6, 5), ((4, 1),), 3, "tanh", "none", False), normal(RUNS, 4, 2, 6, 5)),
        (Recurrent("gru", 5, 6, 7, 3, True), symbols(5, RUNS, 4, 6)),
        (Transformer(6, 8, 2, 2, 12, "relu", True), symbols(32, RUNS, 4, 6)),
    ],
    ids=["mlp", "cnn", "recurrent", "transformer"],
)
def test_networks_drop_at_each_task_s_own_rate(network: Network, inputs: torch.Tensor) -> None:
    params, rates = drawn(network), torch.tensor([0.0, 0.5, 0.5])
    whole = network.forward(params, inputs, None)
    dropped = network.forward(params, inputs, Dropout(SEEDS, 3, rates))
    again = network.forward(params, inputs, Dropout(SEEDS, 3, rates))
    assert torch.equal(dropped, again)
    assert_close(dropped[0], whole[0], STACKED_NETWORK, whole.abs().max())
    assert not torch.allclose(dropped[1:], whole[1:], atol=1e-3)
