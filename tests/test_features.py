"""The 13 inner features against direct computation on whole tensors, and what leaves them alone."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lhopt_fused import EXTRA_FEATURES, INNER_FEATURES
from lhopt_fused.features import mean_features, step_norms, tensor_features
from lhopt_fused.types import STATISTICS


def sums(
    g: torch.Tensor, m_hat: torch.Tensor, u: torch.Tensor, p: torch.Tensor, m: torch.Tensor
) -> dict[str, float]:
    """Raw sums of one made-up step with lr T = 0.1 and a decoupled decay of 0.01."""
    values = {
        "taken": 1.0,
        "grad_nonfinite": 0.0,
        "clip_coefficient": 0.5,
        "step_size": 0.1,
        "decay_factor": 0.99,
        "grad_sq": g @ g,
        "param_sq": p @ p,
        "update_sq": u @ u,
        "m_hat_sq": m_hat @ m_hat,
        "m_hat_minus_grad_sq": (m_hat - g) @ (m_hat - g),
        "grad_dot_param": g @ p,
        "grad_dot_m_hat": g @ m_hat,
        "grad_dot_update": g @ u,
        "count_gt_epsilon": (u > 0).sum(),
        "sum_log_abs_update": (u.abs() + 1e-8).log().sum(),
        "grad_dot_momentum": g @ m,
        "momentum_sq": m @ m,
        "count_same_sign_momentum": ((g < 0) == (m < 0)).sum(),
        "count_same_sign_grad": ((g < 0) == (u < 0)).sum(),
    }
    return {name: float(value) for name, value in values.items()}


def table(*rows: dict[str, float]) -> torch.Tensor:
    return torch.tensor([[row[name] for name in STATISTICS] for row in rows], dtype=torch.float64)


def vectors(seed: int, size: int = 12) -> list[torch.Tensor]:
    """Five random vectors without small elements, beside which the 1e-8 inside log would show."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(5)]
    return [x + 0.1 * x.sign() for x in drawn]


def features_of(*rows: dict[str, float], size: int = 12, clips: bool = True) -> torch.Tensor:
    numel = torch.full((len(rows),), float(size), dtype=torch.float64)
    return tensor_features(table(*rows), numel, torch.full((len(rows),), clips))


def named(row: torch.Tensor) -> dict[str, float]:
    return dict(zip((*INNER_FEATURES, *EXTRA_FEATURES), row.tolist(), strict=True))


def test_features_are_what_their_names_say() -> None:
    g, m_hat, u, p, m = vectors(0)
    values = named(features_of(sums(g, m_hat, u, p, m))[0])
    cosine = torch.nn.functional.cosine_similarity

    def phi(x: torch.Tensor) -> float:
        return NormalDist().cdf(float(x) * math.sqrt(12))

    p_new = 0.99 * p - 0.1 * u
    cosine_param = g @ p_new / (g.norm() * p.norm())
    expected = {
        "did_grad_clip": 1.0,
        "sqrt_v_hat_gt_epsilon": (u > 0).double().mean(),
        "mean_log_abs_adam_pre_lr_update": (u.abs() + 1e-8).log().mean(),
        "log_two_regimes_scale": (m_hat.norm() / g.norm()).log(),
        "log_adam_update_norm_over_param_norm": (0.1 * u.norm() / p.norm()).log(),
        "log_noise_scale": (m_hat.norm() / (m_hat - g).norm()).log(),
        "cosine_similarity_grad_momentum": cosine(g, m_hat, dim=0),
        "cosine_similarity_grad_param": cosine_param,
        "log_lamb": (p.norm() / u.norm()).log(),
        "cosine_similarity_grad_update": cosine(g, u, dim=0),
        "logit_cdf_cosine_similarity_grad_momentum": math.log(
            phi(cosine(g, m_hat, dim=0)) / (1 - phi(cosine(g, m_hat, dim=0)))
        ),
        "logit_cdf_cosine_similarity_grad_update": math.log(
            phi(cosine(g, u, dim=0)) / (1 - phi(cosine(g, u, dim=0)))
        ),
        "cdf_cosine_similarity_grad_param": phi(cosine_param),
        "cosine_similarity_grad_previous_momentum": cosine(g, m, dim=0),
        "sign_agreement_grad_previous_momentum": ((g < 0) == (m < 0)).double().mean(),
        "sign_agreement_consecutive_grads": ((g < 0) == (u < 0)).double().mean(),
    }
    assert values == pytest.approx({k: float(v) for k, v in expected.items()}, rel=1e-7)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_the_scale_of_gradients_does_not_matter(seed: int, scale: float) -> None:
    """Scaling gradients and momentum together, as scaling the loss does under Adam."""
    g, m_hat, u, p, m = vectors(seed)
    plain = features_of(sums(g, m_hat, u, p, m))
    scaled = features_of(sums(scale * g, scale * m_hat, u, p, scale * m))
    assert torch.allclose(plain, scaled, rtol=1e-4, atol=2e-4)  # the 1e-8 inside log shows


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), scale=st.floats(1e-3, 1e3))
def test_the_scale_of_parameters_and_updates_does_not_matter(seed: int, scale: float) -> None:
    g, m_hat, u, p, m = vectors(seed)
    plain = named(features_of(sums(g, m_hat, u, p, m))[0])
    scaled = named(features_of(sums(g, m_hat, scale * u, scale * p, m))[0])
    shifted = plain.pop("mean_log_abs_adam_pre_lr_update") + math.log(scale)
    assert scaled.pop("mean_log_abs_adam_pre_lr_update") == pytest.approx(shifted, abs=2e-4)
    assert scaled == pytest.approx(plain, rel=1e-4, abs=2e-4)


def test_means_are_over_tensors_then_groups_and_leave_out_what_was_not_measured() -> None:
    values = torch.tensor([[1.0], [3.0], [10.0], [torch.nan]], dtype=torch.float64)
    of = torch.tensor([0, 0, 1, 1])
    one_run, two_runs = torch.tensor([0, 0]), torch.tensor([0, 1])
    assert mean_features(values, of, one_run, 1).tolist() == [[6.0]]
    assert mean_features(values, of, two_runs, 2).tolist() == [[2.0], [10.0]]
    assert mean_features(values[None].expand(5, 4, 1), of, one_run, 1).shape == (5, 1, 1)
    nothing = torch.full((4, 1), torch.nan, dtype=torch.float64)
    assert mean_features(nothing, of, one_run, 1).isnan().all()


def test_norms_are_over_all_tensors_of_a_run() -> None:
    table = torch.zeros(3, len(STATISTICS), dtype=torch.float64)
    table[:2, STATISTICS.index("taken")] = 1.0
    table[:, STATISTICS.index("step_size")] = 0.5
    table[:, STATISTICS.index("update_sq")] = torch.tensor([36.0, 64.0, 1.0])
    table[:, STATISTICS.index("param_sq")] = torch.tensor([9.0, 16.0, 1.0])
    assert step_norms(table, torch.tensor([0, 0, 0]), 1).tolist() == [[5.0, 5.0]]
    apart = step_norms(table, torch.tensor([0, 1, 2]), 3)
    assert apart[:2].tolist() == [[3.0, 3.0], [4.0, 4.0]]
    assert apart[2].isnan().all()


def test_what_was_not_measured_is_nan() -> None:
    row = sums(*vectors(1))
    assert math.isnan(named(features_of(row, clips=False)[0])["did_grad_clip"])
    assert features_of({**row, "taken": 0.0}).isnan().all()
    first = named(features_of({**row, "momentum_sq": 0.0, "count_same_sign_grad": math.nan})[0])
    assert all(math.isnan(first[name]) for name in EXTRA_FEATURES)
    empty = dict.fromkeys(STATISTICS, 0.0) | {"taken": 1.0}
    assert features_of(empty, size=0).isnan().all()


def test_the_tails_of_the_normal_are_clipped_alike() -> None:
    g = torch.ones(400, dtype=torch.float64)
    values = named(features_of(sums(g, g, -g, g, g), size=400)[0])
    bound = math.log((1 - 1e-8) / 1e-8)
    assert values["logit_cdf_cosine_similarity_grad_momentum"] == pytest.approx(bound)
    assert values["logit_cdf_cosine_similarity_grad_update"] == pytest.approx(-bound)
