"""Policy features: the table, their meanings, their invariances, and what never gets through."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from policy.samples import ODD_LOSSES, START_ROW, observation

from lhopt_fused.actions import REGISTER_CHOICES
from lhopt_fused.policy.features import (
    FEATURES,
    FEATURES_HASH,
    SERIES,
    FeatureState,
    Observation,
    policy_features,
    schema_hash,
)


def plain(**changes: object) -> Observation:
    """One ordinary observation without batch dimensions."""

    def number(x: float) -> torch.Tensor:
        return torch.tensor(x, dtype=torch.float64)

    fields = Observation(
        inner=torch.arange(13, dtype=torch.float64) / 7,
        train_loss=number(2.0),
        eval_loss=number(3.0),
        has_eval_loss=torch.tensor(True),
        progress=number(0.25),
        outer_steps=number(40.0),
        path_length=number(0.5),
        param_norm=number(8.0),
        hyperparameters=START_ROW.clone(),
        start_hyperparameters=START_ROW.clone(),
        register_losses=torch.full((3,), torch.nan, dtype=torch.float64),
        register_progress=torch.full((3,), torch.nan, dtype=torch.float64),
    )
    as_tensors = {
        name: torch.tensor(value, dtype=torch.float64) if isinstance(value, float) else value
        for name, value in changes.items()
    }
    return replace(fields, **as_tensors)


def named(vector: torch.Tensor) -> dict[str, float]:
    return dict(zip(FEATURES, vector.tolist(), strict=True))


def first(**changes: object) -> dict[str, float]:
    return named(policy_features(plain(**changes), FeatureState.initial())[0])


def sequence(*observations: Observation) -> torch.Tensor:
    state = FeatureState.initial(observations[0].train_loss.shape)
    rows = []
    for one in observations:
        row, state = policy_features(one, state)
        rows.append(row)
    return torch.stack(rows)


def test_the_table_has_one_name_per_feature() -> None:
    assert len(FEATURES) == len(set(FEATURES)) == 146
    assert FEATURES[0] == "progress"
    assert FEATURES[-1] == "no_eval_loss"


def test_the_hash_sees_names_order_and_version() -> None:
    """A new hash means that policies must be trained anew: change it knowingly."""
    assert FEATURES_HASH == "23ab16da84d04595ed6581a3b0d07aa2dd54de127640ee04d90379c045bbd1fb"
    assert schema_hash(FEATURES, 2) != FEATURES_HASH
    assert schema_hash(FEATURES[::-1], 1) != FEATURES_HASH
    assert schema_hash((*FEATURES[:-1], "no_eval"), 1) != FEATURES_HASH


def test_meanings() -> None:
    values = first(
        hyperparameters=START_ROW * 2,
        register_losses=torch.tensor([4.0, torch.nan, 1.0], dtype=torch.float64),
        register_progress=torch.tensor([0.1, torch.nan, 0.2], dtype=torch.float64),
    )
    assert values["progress"] == 0.25
    assert values["outer_step_length"] == pytest.approx(1 / 40)
    assert values["did_grad_clip"] == 0.0
    assert values["sqrt_v_hat_gt_epsilon"] == pytest.approx(1 / 7)
    assert values["log_loss_ratio_tanh"] == pytest.approx(math.tanh(math.log(2 / 3)))
    assert values["log_path_ratio_tanh"] == pytest.approx(math.tanh(math.log(0.5 / 8)))
    assert values["log_norm_ratio_tanh"] == 0.0  # there is no outer step before
    assert values["register_0_log_loss_ratio_tanh"] == pytest.approx(math.tanh(math.log(2)))
    assert values["register_1_log_loss_ratio_tanh"] == values["register_1_progress"] == 0.0
    assert values["register_2_progress"] == pytest.approx(0.2)
    assert values["lr_relative_to_start"] == pytest.approx(math.log(2))
    bound = 1 - 1e-10  # 1.6 is beyond it
    logit = math.log(bound / (1 - bound)) - math.log(0.8 / 0.2)
    assert values["group_clip_grad_norm_relative_to_start"] == pytest.approx(logit, rel=1e-5)
    assert all(values[f"previous_register_{choice}"] == 0.0 for choice in REGISTER_CHOICES)


def test_what_comes_from_the_outer_step_before() -> None:
    _, state = policy_features(plain(), FeatureState.initial())
    state = state.after(torch.arange(8, dtype=torch.float64), torch.tensor(4))
    values = named(policy_features(plain(param_norm=16.0), state)[0])
    assert values["log_norm_ratio_tanh"] == pytest.approx(math.tanh(math.log(2)))
    assert values["previous_ombeta2"] == 2.0
    assert [values[f"previous_register_{choice}"] for choice in REGISTER_CHOICES] == [
        float(index == 4) for index in range(10)
    ]


@pytest.mark.parametrize(
    ("loss", "is_nan", "is_inf"),
    [(math.nan, 1, 0), (-1.0, 1, 0), (math.inf, 0, 1), (0.0, 0, 1), (1.0, 0, 0)],
)
def test_flags(loss: float, is_nan: int, is_inf: int) -> None:
    for kind in ("train", "eval"):
        values = first(**{f"{kind}_loss": loss})
        assert values[f"log_{kind}_loss_is_nan"] == is_nan
        assert values[f"log_{kind}_loss_is_inf"] == is_inf
        assert values["log_loss_ratio_is_nan"] == is_nan
        assert values["no_eval_loss"] == 0


def test_no_eval_loss_is_a_flag_of_its_own() -> None:
    """Whatever stands in its place: a run without an eval loss has not diverged."""
    without = [
        first(has_eval_loss=torch.tensor(False), eval_loss=loss) for loss in (1.0, math.nan, 0.0)
    ]
    assert without[0] == without[1] == without[2]
    assert without[0]["no_eval_loss"] == 1
    assert without[0]["log_eval_loss_is_nan"] == without[0]["log_loss_ratio_is_nan"] == 0
    assert without[0]["log_eval_loss_is_inf"] == without[0]["log_loss_ratio_tanh"] == 0


def test_never_nan_nor_infinite() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = sequence(*(observation(generator, 200, step / 20) for step in range(20)))
    assert rows.dtype == torch.float32
    assert bool(rows.isfinite().all())
    for bad in (math.nan, math.inf, -math.inf, 1e308, -1e308, 0.0):
        everything = replace(
            plain(),
            **{
                name: torch.full_like(getattr(plain(), name), bad)
                for name in Observation.__dataclass_fields__
                if name != "has_eval_loss"
            },
        )
        assert bool(sequence(everything, plain(), everything).isfinite().all())


@pytest.mark.parametrize("odd", ODD_LOSSES)
def test_an_odd_loss_spoils_no_later_feature(odd: float) -> None:
    """The CDFs after it are what they would be without it."""
    losses = (2.0, 1.5, 1.9, 1.1, 1.3)
    rows = sequence(*(plain(train_loss=x) for x in losses))
    spoilt = sequence(*(plain(train_loss=x) for x in (*losses[:2], odd, *losses[2:])))
    if 0 < odd < math.inf:
        return  # an ordinary number, if an absurd one
    column = FEATURES.index("log_train_loss_cdf_5")
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(spoilt[kept, column], rows[:, column])
    assert spoilt[2, column] == 0.5


def test_the_scale_of_the_loss_does_not_matter() -> None:
    """Train, eval and register losses scaled alike, as a loss in other units would be."""
    generator = torch.Generator().manual_seed(1)
    ordinary = [observation(generator, 50, step / 10) for step in range(10)]
    scaled = [
        replace(
            one,
            train_loss=1000 * one.train_loss,
            eval_loss=1000 * one.eval_loss,
            register_losses=1000 * one.register_losses,
        )
        for one in ordinary
    ]
    one_sided = [replace(one, train_loss=1000 * one.train_loss) for one in ordinary]
    usual = sequence(*ordinary)
    absurd = torch.stack([(one.train_loss < 1e-300) | (one.eval_loss < 1e-300) for one in ordinary])
    runs = ~absurd.any(0)  # subnormal losses lose digits
    assert torch.allclose(sequence(*scaled)[:, runs], usual[:, runs], rtol=0, atol=1e-5)
    assert not torch.allclose(sequence(*one_sided)[:, runs], usual[:, runs], rtol=0, atol=1e-2)


def test_the_scale_of_parameters_and_units_of_hyperparameters_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    ordinary = [observation(generator, 50, step / 10) for step in range(10)]
    scaled = [
        replace(
            one,
            path_length=30 * one.path_length,
            param_norm=30 * one.param_norm,
            hyperparameters=torch.where(
                torch.arange(8) == 0, 30 * one.hyperparameters, one.hyperparameters
            ),
            start_hyperparameters=torch.where(
                torch.arange(8) == 0, 30 * one.start_hyperparameters, one.start_hyperparameters
            ),
        )
        for one in ordinary
    ]
    assert torch.allclose(sequence(*scaled), sequence(*ordinary), rtol=0, atol=1e-6)


def test_a_saved_state_goes_on() -> None:
    generator = torch.Generator().manual_seed(3)
    one, two = (observation(generator, 5, p) for p in (0.1, 0.2))
    _, state = policy_features(one, FeatureState.initial((5,)))
    restored = FeatureState.from_tensors(state.tensors())
    assert torch.equal(policy_features(two, restored)[0], policy_features(two, state)[0])
    fresh = FeatureState.initial((5,))
    assert not torch.equal(policy_features(two, fresh)[0], policy_features(two, state)[0])


def test_the_series_come_in_the_order_of_the_table() -> None:
    order = [name.removesuffix("_cdf_5") for name in FEATURES if name.endswith("_cdf_5")]
    assert tuple(order) == SERIES
