"""Random combinations of dtype, shape, sharding and options, each against the reference.

``PYTHONPATH=tests python -m fuzz --combinations 1000 --seed 0`` runs so many, on gloo ranks of this
machine: sharded ones on all of them, the others on one each. What a combination is follows from the
seed and its number alone; one that fails prints the command that runs it again. A new keyword is a
line in one of the tables.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import math
import random
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from distributed.launch import run_ranks
from distributed.runs import place, whole
from tolerances import SHARDED, TRAJECTORY, Tolerance, assert_close, statistics_scale
from tolerances import STATISTICS as STATISTICS_TOLERANCE
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from benchmarks import report
from lhopt_fused import CIAO, LHOPT, AdamW
from lhopt_fused.kernels import BackendName

RANKS: Final = 4
STEPS: Final = 5
BATCH: Final = 100  # combinations in one start of the ranks, which is given 300 seconds

DTYPES: Final = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES: Final = (
    *((), (0, 3), (1,), (5,), (8,), (257,), (1, 3), (8, 5), (33, 17), (64, 64), (5, 1)),
    *((3, 4, 3), (2, 3, 3, 3), (4, 1, 2), (1000,)),
)
LAYOUTS: Final = ("dense", "dense", "transposed", "gapped")
SHARDINGS: Final = ("alone", "alone", "copies", "rows", "meshes")
GRADIENTS: Final[dict[str, tuple[Any, ...]]] = {
    "scale": (1e-3, 1.0, 1.0, 100.0),
    "zeros": (0.0, 0.1, 0.9),
    "missing": (0.0, 0.2),  # share of tensors without one in a step
    "nonfinite": (0.0, 0.0, 0.2),  # share of steps with a NaN or inf
}

COMMON: Final[dict[str, tuple[Any, ...]]] = {
    "nonfinite": ("skip", "mask"),
    "inner_feature_frequency": (None, 0, 1, 2),
    "keep_grad_signs": (False, True),
    "master_weights": (False, True),
    "rounding": ("nearest", "stochastic"),
    "rounding_seed": (0, 3),
}
"""Of every optimizer: keyword -> the values that are drawn."""

CIAO_GROUP: Final[dict[str, tuple[Any, ...]]] = {
    "lr": (1e-4, 1e-3, 1e-2),
    "ombeta1": (0.05, 0.1, 0.5, 1.0),
    "ombeta2": (1e-3, 1e-2, 0.2),
    "epsilon": (1e-10, 1e-8, 1e-6, 1e-2),
    "weight_decay": (0.0, 1e-2, 0.5),
    "denominator_norm": (None, 2, "inf"),
    "adam_update_include_weight_decay": (False, True),
    "group_clip_grad_norm": (None, 0.1, 0.8, 10.0),
    "scale_grad_norm_by_rolling_max": (False, True),
    "group_clip_grad_z_score": (None, -1.0, 0.5),
    "grad_clip_ombeta": (None, 1e-2, 0.3),
    "lamb_power": (None, 0.5, 1),
    "lamb_min_trust": (0.0, 1e-3, 0.1),
    "lamb_max_trust": (math.inf, 10.0, 0.5),
    "lamb_ignore_vectors": (False, True),
    "lamb_update_norm_ombeta": (None, 0.05, 0.5),
    "approximate_radam_warmup": (False, True),
    "trust": ("exact", "delayed"),
}
"""Of CIAO and LHOPT, for each group."""

ADAMW_GROUP: Final[dict[str, tuple[Any, ...]]] = {
    "lr": (1e-4, 1e-3, 1e-2),
    "betas": ((0.9, 0.999), (0.5, 0.9), (0.0, 0.99)),
    "eps": (1e-10, 1e-8, 1e-3),
    "weight_decay": (0.0, 1e-2, 0.5),
    "maximize": (False, True),
}
"""Of AdamW, for each group."""

LHOPT_RUN: Final[dict[str, tuple[Any, ...]]] = {
    "policy": ("fixed", "cosine"),
    "outer_steps": (1, 2, 5),
    "total_steps": (STEPS,),
}
"""Of LHOPT: policies that follow from progress alone, so that rounding decides nothing."""

KINDS: Final[dict[str, tuple[Any, dict[str, tuple[Any, ...]], dict[str, tuple[Any, ...]]]]] = {
    "AdamW": (AdamW, ADAMW_GROUP, {}),
    "CIAO": (CIAO, CIAO_GROUP, {}),
    "LHOPT": (LHOPT, CIAO_GROUP, LHOPT_RUN),
}


@dataclass(frozen=True)
class Combination:
    """One run: what is stepped, how it is laid out, and by what.

    Attributes:
        seed: of parameters, gradients and placements.
        shapes, layouts: of each parameter; ``layouts`` in memory.
        keywords: of the optimizer.
        groups: keywords of each group; parameters take turns in them.
    """

    seed: int
    kind: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[str, ...]
    sharding: str
    gradients: dict[str, float]
    keywords: dict[str, Any]
    groups: tuple[dict[str, Any], ...]


# ---------------------------------------------------------------------- drawing


def some_of(chance: random.Random, table: dict[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Values of some keywords; the others are left out."""
    return {name: chance.choice(values) for name, values in table.items() if chance.random() < 0.6}


def drawn(seed: int, number: int) -> Combination:
    """Combination ``number`` of a seed: the first that is not refused."""
    chance = random.Random(f"{seed} {number}")
    return next(c for c in (_any(chance) for _ in itertools.count()) if not is_refused(c))


def _any(chance: random.Random) -> Combination:
    kind = chance.choice(list(KINDS))
    _, group_table, run_table = KINDS[kind]
    sharding = chance.choice(SHARDINGS)
    shapes = tuple(chance.choice(SHAPES) for _ in range(chance.randint(1, 5)))
    return Combination(
        seed=chance.randrange(2**31),
        kind=kind,
        dtype=chance.choice(DTYPES),
        shapes=shapes,
        layouts=tuple(chance.choice(LAYOUTS) if sharding == "alone" else "dense" for _ in shapes),
        sharding=sharding,
        gradients={name: chance.choice(values) for name, values in GRADIENTS.items()},
        keywords={
            **{name: chance.choice(values) for name, values in run_table.items()},
            **some_of(chance, COMMON),
        },
        groups=tuple(
            some_of(chance, group_table) for _ in range(chance.randint(1, min(3, len(shapes))))
        ),
    )


def is_refused(c: Combination) -> bool:
    """Whether it is no combination: the optimizer refuses it, as other tests check."""
    is_pieces = c.sharding in ("rows", "meshes")
    draws = c.keywords.get("rounding") == "stochastic"
    if is_pieces and (draws or c.keywords.get("keep_grad_signs")):
        return True
    if draws and "transposed" in c.layouts:
        return True  # not refused, but chance goes by the place in memory
    try:
        built(c, made(c, whole_ones=True), "auto", alone=True)
    except ValueError:
        return True
    return False


# ---------------------------------------------------------------------- running


def made(c: Combination, whole_ones: bool) -> list[torch.nn.Parameter]:
    """The parameters: as the combination says, or whole and dense."""
    values = [torch.randn(shape, generator=_draws(c, 0, i)) / 2 for i, shape in enumerate(c.shapes)]
    tensors = [value.to(c.dtype) for value in values]
    if not whole_ones:
        tensors = [_laid_out(x, layout) for x, layout in zip(tensors, c.layouts, strict=True)]
        tensors = list(map(place, tensors, placements(c)))
    return list(map(torch.nn.Parameter, tensors))


def _draws(c: Combination, step: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(c.seed + 1_000_003 * step + index)


def _laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        backwards = tuple(range(x.dim()))[::-1]
        return x.permute(backwards).contiguous().permute(backwards)
    if layout == "gapped":
        return torch.stack([x, x], -1)[..., 0]
    return x


@functools.cache
def _mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("data", "model")[: len(shape)])


def placements(c: Combination) -> list[Any]:
    """For each parameter, a mesh and where the parameter is on it, or None for a plain tensor."""
    if c.sharding in ("alone", "copies"):
        return [None] * len(c.shapes)
    if c.sharding == "rows":
        return [(_mesh(RANKS), (Shard(0) if shape else Replicate(),)) for shape in c.shapes]
    chance = random.Random(c.seed)
    return [_somewhere(_mesh(2, RANKS // 2), len(shape), chance) for shape in c.shapes]


def _somewhere(square: Any, dims: int, chance: random.Random) -> Any:
    """Anywhere on a mesh, on a row of it, or on none."""
    ways = [Replicate(), *(Shard(dim) for dim in range(min(dims, 2)))]
    where = chance.choice(("plain", "row", "square", "square"))
    if where == "plain":
        return None
    if where == "row":
        return square["model"], (chance.choice(ways),)
    return square, (chance.choice(ways), chance.choice(ways))


def built(
    c: Combination, params: Sequence[torch.nn.Parameter], backend: BackendName, alone: bool
) -> AdamW | CIAO:
    """The optimizer over ``params``."""
    count = len(c.groups)
    groups = [{"params": params[i::count], **c.groups[i]} for i in range(count)]
    ranks = {"process_group": None} if alone else {}
    optimizer: AdamW | CIAO = KINDS[c.kind][0](groups, backend=backend, **c.keywords, **ranks)
    return optimizer


def gradients(c: Combination, step: int) -> list[torch.Tensor | None]:
    """Whole gradients of a step, the same on every rank."""
    chance = random.Random(c.seed + step)
    drawn = []
    for index, shape in enumerate(c.shapes):
        draws = _draws(c, step + 1, index)
        grad = torch.randn(shape, generator=draws) * c.gradients["scale"]
        grad = grad * (torch.rand(shape, generator=draws) >= c.gradients["zeros"])
        drawn.append(None if chance.random() < c.gradients["missing"] else grad.to(c.dtype))
    if chance.random() < c.gradients["nonfinite"]:
        hit = chance.choice(drawn)
        if hit is not None and hit.numel():
            hit.view(-1)[chance.randrange(hit.numel())] = chance.choice((math.nan, math.inf))
    return drawn


@dataclass
class Reached:
    """What a run has come to, in whole tensors."""

    params: list[torch.Tensor]
    state: list[dict[str, torch.Tensor]]
    statistics: dict[str, torch.Tensor]
    skipped: int


def run(c: Combination, spoilt: float = 1.0) -> Reached:
    """What the combination comes to; ``spoilt`` is a factor of every learning rate."""
    params = made(c, whole_ones=False)
    optimizer = built(c, params, "auto", alone=c.sharding == "alone")
    for group in optimizer.param_groups:
        group["lr"] *= spoilt
    return _stepped(c, optimizer, params, placements(c))


def reference(c: Combination) -> Reached:
    """What the reference comes to, with whole tensors."""
    params = made(c, whole_ones=True)
    return _stepped(c, built(c, params, "reference", alone=True), params, [None] * len(params))


def _stepped(
    c: Combination,
    optimizer: AdamW | CIAO,
    params: Sequence[torch.nn.Parameter],
    where: Sequence[Any],
) -> Reached:
    for step in range(STEPS):
        for param, grad, how in zip(params, gradients(c, step), where, strict=True):
            param.grad = None if grad is None else place(grad, how)
        optimizer.step()
    return _reached(optimizer, params)


def _reached(optimizer: AdamW | CIAO, params: Sequence[torch.nn.Parameter]) -> Reached:
    def held(param: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        state = optimizer.state.get(param, {})
        like = {name: x for name, x in state.items() if x.shape == param.shape}
        return {name: whole(x).double() for name, x in like.items() if x.is_floating_point()}

    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    order = [listed.index(id(p)) for p in params]
    measures = optimizer._settings["inner_feature_frequency"] != 0
    statistics = optimizer.statistics() if measures and any(map(held, params)) else {}
    return Reached(
        params=[whole(p) for p in params],
        state=list(map(held, params)),
        statistics={name: values[order] for name, values in statistics.items()},
        skipped=optimizer.skipped_steps,
    )


# ---------------------------------------------------------------------- comparing


def tolerance_of(c: Combination) -> Tolerance:
    """Of parameters and state, relative to the largest number of a parameter or state."""
    if c.sharding in ("rows", "meshes") and c.dtype in (torch.float32, torch.float64):
        return SHARDED["cpu" if c.dtype == torch.float32 else "reference"]
    return TRAJECTORY[c.dtype]


def compare(c: Combination, found: Reached, expected: Reached) -> None:
    """Element by element.

    Raises:
        AssertionError: they are not the same.
    """
    assert found.skipped == expected.skipped, "another number of skipped steps"
    tolerance = tolerance_of(c)
    scale = max([float(p.abs().max()) for p in expected.params if p.numel()], default=0.0)
    pairs = zip(found.params, found.state, expected.params, expected.state, strict=True)
    for index, (param, state, other, others) in enumerate(pairs):
        _close(f"parameter {index}", param, other, tolerance, scale)
        assert state.keys() == others.keys()
        for name, value in others.items():
            largest = max(scale, float(value.abs().max()) if value.numel() else 0.0)
            _close(f"{name} of parameter {index}", state[name], value, tolerance, largest)
    if c.dtype in (torch.float32, torch.float64) and expected.statistics:
        numel = [math.prod(shape) for shape in c.shapes]
        scales = statistics_scale(numel, torch.stack([*expected.statistics.values()], 1))
        for column, (name, values) in enumerate(expected.statistics.items()):
            slack = STATISTICS_TOLERANCE[c.dtype]
            _close(name, found.statistics[name], values, slack, scales[:, column])


def _close(
    name: str, value: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance, scale: Any
) -> None:
    try:
        assert_close(value, expected, tolerance, scale)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


def check(c: Combination, spoilt: float = 1.0) -> None:
    """Run a combination and the reference; every rank calls it for a sharded one.

    Raises:
        AssertionError: they do not agree.
    """
    compare(c, run(c, spoilt), reference(c))


# ---------------------------------------------------------------------- many


def share(rank: int, ranks: int, seed: int, numbers: Sequence[int], spoilt: float) -> Any:
    """What this rank has seen fail, and how many of the numbers it has got through."""
    warnings.simplefilter("ignore", RuntimeWarning)  # of skipped steps
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # of slow gathers
    failures: list[tuple[int, str]] = []
    for position, number in enumerate(numbers):
        c = drawn(seed, number)
        if c.sharding == "alone" and position % ranks != rank:
            continue
        try:
            check(c, spoilt)
        except AssertionError as error:
            failures.append((number, str(error)))
        except Exception:
            failures.append((number, traceback.format_exc()))
            if c.sharding != "alone":  # ranks may not be where one another are
                return failures, position + 1
    return failures, len(numbers)


def failures(seed: int, numbers: Iterable[int], spoilt: float = 1.0) -> dict[int, str]:
    """What does not agree, by number."""
    left, found = list(numbers), dict[int, str]()
    while left:
        outcomes = run_ranks(share, RANKS, seed, left[:BATCH], spoilt)
        through = min(done for _, done in outcomes)
        seen = dict(itertools.chain.from_iterable(failures for failures, _ in outcomes))
        found |= {number: seen[number] for number in left[:through] if number in seen}
        left = left[through:]
    return found


def main(say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--combinations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="run this combination alone")
    parser.add_argument("--keep", action="store_true", help="write it to benchmarks/results")
    asked = parser.parse_args()
    numbers = range(asked.combinations) if asked.only is None else [asked.only]
    found = failures(asked.seed, numbers)
    for number, text in sorted(found.items()):
        say(f"{drawn(asked.seed, number)}\n{text}")
        say(f"again: PYTHONPATH=tests python -m fuzz --seed {asked.seed} --only {number}")
    agree = len(numbers) - len(found)
    say(f"{agree} of {len(numbers)} combinations agree with the reference")
    if asked.keep:
        report.keep_outcome(
            "fuzz", {"seed": asked.seed, "combinations": len(numbers), "agree": agree}
        )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
