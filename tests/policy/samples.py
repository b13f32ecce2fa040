"""Random observations, networks and policies that the policy tests share."""

from __future__ import annotations

import torch

from lhopt_fused.actions import ACTIONS, ActionSpace
from lhopt_fused.ciao import LHOPT_START
from lhopt_fused.policy import FEATURES, LearnedPolicy, NetworkShape, Observation, PolicyNetwork
from lhopt_fused.policy.base import RunObservation
from lhopt_fused.types import HYPERPARAMETERS

START = {name: float(LHOPT_START[name]) for name in HYPERPARAMETERS}
SPACE = ActionSpace(ACTIONS, registers=True)
START_ROW = torch.tensor([START[name] for name in HYPERPARAMETERS], dtype=torch.float64)

ODD_LOSSES = (torch.nan, torch.inf, -torch.inf, 0.0, -1.0, 5e-324, 1e300)
"""What a loss may be besides an ordinary number."""


def observation(generator: torch.Generator, batch: int, progress: float) -> Observation:
    """A batch of observations; about one number in ten is missing, infinite or absurd."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator, dtype=torch.float64)

    def chance(p: float, *shape: int) -> torch.Tensor:
        return torch.rand(batch, *shape, generator=generator) < p

    def loss(*shape: int) -> torch.Tensor:
        which = torch.randint(len(ODD_LOSSES), (batch, *shape), generator=generator)
        odd = torch.tensor(ODD_LOSSES, dtype=torch.float64)[which]
        return torch.where(chance(0.1, *shape), odd, normal(*shape).exp())

    empty = chance(0.3, 3)
    hyperparameters = START_ROW * (0.3 * normal(8)).exp()
    return Observation(
        inner=torch.where(chance(0.1, 13), torch.nan, 3.0 * normal(13)),
        train_loss=loss(),
        eval_loss=loss(),
        has_eval_loss=chance(0.7),
        progress=torch.full((batch,), progress, dtype=torch.float64),
        outer_steps=torch.randint(2, 129, (batch,), generator=generator).double(),
        path_length=torch.where(chance(0.05), 0.0, normal().exp()),
        param_norm=torch.where(chance(0.05), torch.nan, normal().exp()),
        hyperparameters=hyperparameters.masked_fill(chance(0.05, 8), torch.nan).masked_fill(
            chance(0.05, 8), 0.0
        ),
        start_hyperparameters=START_ROW.expand(batch, 8),
        register_losses=torch.where(empty, torch.nan, loss(3)),
        register_progress=torch.where(empty, torch.nan, chance(0.5, 3).double()),
    )


def of_run(batch: Observation, run: int) -> RunObservation:
    """One run of a batch, in plain numbers."""

    def numbers(values: torch.Tensor) -> list[float]:
        return values[run].tolist()

    return RunObservation(
        inner=numbers(batch.inner),
        train_loss=batch.train_loss[run].item(),
        eval_loss=batch.eval_loss[run].item() if batch.has_eval_loss[run] else None,
        progress=batch.progress[run].item(),
        outer_steps=int(batch.outer_steps[run]),
        path_length=batch.path_length[run].item(),
        param_norm=batch.param_norm[run].item(),
        hyperparameters=numbers(batch.hyperparameters),
        start_hyperparameters=numbers(batch.start_hyperparameters),
        register_losses=numbers(batch.register_losses),
        register_progress=numbers(batch.register_progress),
    )


def random_network(
    seed: int, hidden: int = 32, head_hidden: int = 16, space: ActionSpace = SPACE
) -> PolicyNetwork:
    """A network whose every weight, bias and statistic is random; heads that have opinions."""
    generator = torch.Generator().manual_seed(seed)
    network = PolicyNetwork(
        NetworkShape(len(FEATURES), space.head_sizes, hidden, head_hidden)
    ).eval()
    with torch.no_grad():
        for name, value in network.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.dim() == 2:
                value.copy_(noise / value.shape[1] ** 0.5)
            else:
                centre = 1.0 if name.endswith("norm.weight") else 0.0
                value.copy_(centre + 0.3 * noise)
        for head in network.heads:
            head.logits.weight.mul_(3.0)
        normalisation = network.normalisation
        normalisation.mean.copy_(torch.randn(len(FEATURES), generator=generator))
        normalisation.var.copy_(torch.rand(len(FEATURES), generator=generator) * 4 + 0.1)
        normalisation.total_weight.fill_(0.5)
    return network


def random_policy(
    seed: int, hidden: int = 32, head_hidden: int = 16, registers: bool = True
) -> LearnedPolicy:
    space = ActionSpace(ACTIONS, registers)
    return LearnedPolicy.from_network(
        random_network(seed, hidden, head_hidden, space),
        name="random",
        action_space=space,
        start_hyperparameters=START,
        trained_on={"tasks": ["none"], "episodes": 0},
        commit="0" * 40,
    )
