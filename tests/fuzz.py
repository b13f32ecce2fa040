"""Random combinations of dtype, shape, sharding and options, each against the reference.

``PYTHONPATH=tests python -m fuzz --combinations 1000 --seed 0`` runs so many, on gloo ranks of this
machine: sharded ones on all of them, the others on one each. What a combination is follows from the
seed and its number alone; one that fails prints the command that runs it again. With ``--backend
triton`` and ``TRITON_INTERPRET=1`` in the environment, Triton's kernels take the place of the C++.
A new keyword is a line in one of the tables.

Where what is kept has fewer bits than it has been computed in, a last bit may decide which way it
is rounded, and that goes on. Each step begins with the reference's numbers then.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from distributed.launch import run_ranks
from distributed.runs import place
from stored import assert_same_moment
from tolerances import SHARDED, SPLIT8, TRAJECTORY, Tolerance, assert_close, statistics_scale
from tolerances import STATISTICS as STATISTICS_TOLERANCE
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from benchmarks import report
from lhopt_fused import CIAO, LHOPT, AdamW
from lhopt_fused.kernels import BackendName
from lhopt_fused.kernels.formats import BLOCK, QUANTISED, join_master, takes_blocks
from lhopt_fused.ranks import local_tensor

RANKS: Final = 4
STEPS: Final = 5
BATCH: Final = 100  # combinations in one start of the ranks, which is given 300 seconds

BLOCK_SHAPES: Final = ((64, 64), (33, 128), (16, 512), (3, 32, 64), (64, 4, 4, 4))
"""Of tensors that take blocks."""

DTYPES: Final = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES: Final = (
    *((), (0, 3), (1,), (5,), (8,), (257,), (1, 3), (8, 5), (33, 17), (64, 64), (5, 1)),
    *((3, 4, 3), (2, 3, 3, 3), (4, 1, 2), (1000,)),
    *(*BLOCK_SHAPES[1:], (0, 64)),
)
"""Some have fewer rows than there are ranks, so that pieces are empty."""
LAYOUTS: Final = ("dense", "dense", "transposed", "gapped")
SHARDINGS: Final = ("alone", "alone", "copies", "rows", "meshes")
BACKENDS: Final = ("fast", "fast", "fast", "reference")
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
    "master_weights": (False, True, "split8", "split16"),
    "moments": ("float32", "bfloat16", "int8"),
    "rounding": ("nearest", "stochastic"),
    "rounding_seed": (0, 3),
}
"""Of every optimizer: keyword -> the values that are drawn."""

TOGETHER: Final[tuple[dict[str, Any], ...]] = (
    *[{}] * 4,
    {"moments": "int8", "master_weights": "split8"},
)
"""On top of that, what is meant to be used together, with bfloat16 parameters that take blocks."""

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


KEPT: Final = frozenset(f"{name}{what}" for name in QUANTISED for what in ("", "_scale")) | {
    "master_param",
    "master_correction",
}
"""Names of state that has an entry for each element or block."""

Held = dict[str, torch.Tensor]


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
    backend: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]
    layouts: tuple[str, ...]
    sharding: str
    gradients: dict[str, float]
    keywords: dict[str, Any]
    groups: tuple[dict[str, Any], ...]

    @property
    def is_in_pieces(self) -> bool:
        return self.sharding in ("rows", "meshes")

    @property
    def keeps_fewer_bits(self) -> bool:
        """Whether parameters or moments have fewer bits than they are computed in."""
        fewer = self.dtype == torch.float32 and self.moments != "float32"
        return fewer or self.dtype in (torch.bfloat16, torch.float16)

    @property
    def goes_by_memory(self) -> bool:
        """Whether an element's place in memory counts: for chance, for blocks, for dithering."""
        return self.keywords.get("rounding") == "stochastic" or self.moments != "float32"

    @property
    def moments(self) -> str:
        return str(self.keywords.get("moments", "float32"))


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
    dtype, together = chance.choice(DTYPES), chance.choice(TOGETHER)
    if together:
        dtype, shapes = torch.bfloat16, (chance.choice(BLOCK_SHAPES), *shapes[1:])
    return Combination(
        seed=chance.randrange(2**31),
        kind=kind,
        backend=chance.choice(BACKENDS),
        dtype=dtype,
        shapes=shapes,
        layouts=tuple(chance.choice(LAYOUTS) if sharding == "alone" else "dense" for _ in shapes),
        sharding=sharding,
        gradients={name: chance.choice(values) for name, values in GRADIENTS.items()},
        keywords={
            **{name: chance.choice(values) for name, values in run_table.items()},
            **some_of(chance, COMMON),
            **together,
        },
        groups=tuple(
            some_of(chance, group_table) for _ in range(chance.randint(1, min(3, len(shapes))))
        ),
    )


def is_refused(c: Combination) -> bool:
    """Whether it is no combination: the optimizer refuses it, as other tests check."""
    draws = c.keywords.get("rounding") == "stochastic"
    if c.is_in_pieces and (draws or c.keywords.get("keep_grad_signs")):
        return True
    try:
        built(c, whole_params(c), "auto", alone=True)
    except (TypeError, ValueError):
        return True
    return False


# ---------------------------------------------------------------------- running


def whole_params(c: Combination) -> list[torch.nn.Parameter]:
    """The parameters whole, and dense unless memory counts."""
    return list(map(torch.nn.Parameter, _values(c, is_laid_out=c.goes_by_memory)))


def placed_params(c: Combination) -> list[torch.nn.Parameter]:
    """The parameters as the combination says."""
    tensors = map(place, _values(c, is_laid_out=True), placements(c))
    return list(map(torch.nn.Parameter, tensors))


def _values(c: Combination, is_laid_out: bool) -> list[torch.Tensor]:
    values = [torch.randn(shape, generator=_draws(c, 0, i)) / 2 for i, shape in enumerate(c.shapes)]
    tensors = [value.to(c.dtype) for value in values]
    return list(map(_laid_out, tensors, c.layouts)) if is_laid_out else tensors


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
    if not c.is_in_pieces:
        return [None] * len(c.shapes)
    if c.sharding == "rows":
        return [(_mesh(RANKS), (Shard(0) if shape else Replicate(),)) for shape in c.shapes]
    chance = random.Random(c.seed)
    square = _mesh(2, RANKS // 2)
    return [_somewhere(square, _dims(c, torch.Size(shape)), chance) for shape in c.shapes]


def _dims(c: Combination, shape: torch.Size) -> list[int]:
    """Along which dimensions a parameter may be cut, whatever the number of ranks; blocks are
    not."""
    holds = len(shape) == 2 and shape[1] % (RANKS * BLOCK) == 0
    is_whole = c.moments == "int8" and takes_blocks(shape) and not holds
    return list(range(min(len(shape), 1 if is_whole else 2)))


def _somewhere(square: Any, dims: Sequence[int], chance: random.Random) -> Any:
    """Anywhere on a mesh, on a row of it, or on none."""
    ways = [Replicate(), *map(Shard, dims)]
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


class Side:
    """One of the two runs that are compared.

    Attributes:
        params: whole, or as far as this rank has them.
        where: each of them is, as :func:`placements` says.
    """

    def __init__(self, params: list[torch.nn.Parameter], where: list[Any], optimizer: Any) -> None:
        self.params, self.where, self.optimizer = params, where, optimizer

    def step(self, grads: Sequence[torch.Tensor | None], factor: float = 1.0) -> None:
        """A step with these whole gradients, multiplied by ``factor``."""
        for param, grad, how in zip(self.params, grads, self.where, strict=True):
            param.grad = None if grad is None else place(grad * factor, how)
        self.optimizer.step()

    def held(self, index: int) -> Held:
        """A parameter, and what is kept of it by element or by block."""
        param = self.params[index]
        state = self.optimizer.state.get(param, {})
        return {"param": param.detach(), **{name: x for name, x in state.items() if name in KEPT}}

    def statistics(self) -> dict[str, torch.Tensor]:
        """Those of the last step that took any, in the order of ``params``; {} if none did."""
        measures = self.optimizer._settings["inner_feature_frequency"] != 0
        if not measures or not self.optimizer.state:
            return {}
        listed = [id(p) for group in self.optimizer.param_groups for p in group["params"]]
        order = [listed.index(id(p)) for p in self.params]
        return {name: values[order] for name, values in self.optimizer.statistics().items()}


def tested(c: Combination, fast: BackendName) -> Side:
    """The side under test."""
    backend: BackendName = "reference" if c.backend == "reference" else fast
    if c.dtype == torch.float64:
        backend = "auto"
    params = placed_params(c)
    return Side(params, placements(c), built(c, params, backend, alone=c.sharding == "alone"))


def defining(c: Combination) -> Side:
    """The reference, with whole tensors."""
    params = whole_params(c)
    return Side(params, [None] * len(params), built(c, params, "reference", alone=True))


# ---------------------------------------------------------------------- comparing


def compare(c: Combination, found: Side, expected: Side) -> None:
    """Element by element, as far as this rank has them: all but the statistics.

    Raises:
        AssertionError: they are not the same.
    """
    assert found.optimizer.skipped_steps == expected.optimizer.skipped_steps, "skipped steps"
    largest = max(largest_of(param.detach()) for param in expected.params)
    for index, how in enumerate(found.where):
        mine, wholes = found.held(index), expected.held(index)
        assert mine.keys() == wholes.keys(), f"state of parameter {index}"
        for name, x in mine.items():
            assert x.shape == wholes[name].shape, f"{name} of parameter {index}"
            assert getattr(x, "placements", None) == (how and how[1]), f"{name} is elsewhere"
        here = {name: local_tensor(x) for name, x in mine.items()}
        theirs = {name: local_tensor(place(x, how)) for name, x in wholes.items()}
        with _said_of(f"parameter {index}"):
            _compare_masters(c, here, theirs, largest)
            _compare_moments(c, here, theirs)


def _compare_masters(c: Combination, mine: Held, theirs: Held, largest: float) -> None:
    """Of one tensor; ``largest`` is the largest parameter."""
    with _said_of("the parameter"):
        assert_close(mine["param"], theirs["param"], tolerance_of(c, c.dtype), largest)
    tolerance = tolerance_of(c, torch.float32)
    with _said_of("its master"):
        if "master_param" in theirs:
            assert_close(mine["master_param"], theirs["master_param"], tolerance, largest)
        if "master_correction" in theirs:
            tolerance = SPLIT8 if theirs["master_correction"].dtype == torch.int8 else tolerance
            joined = [join_master(x["param"], x["master_correction"]) for x in (mine, theirs)]
            assert_close(*joined, tolerance, largest)


def _compare_moments(c: Combination, mine: Held, theirs: Held) -> None:
    """Of one tensor."""
    spread = largest_of(theirs["exp_avg_sq"]) ** 0.5 if "exp_avg_sq" in theirs else 0.0
    for name in QUANTISED:
        stored = theirs.get(name)
        if stored is None or not stored.numel():
            continue
        with _said_of(name):
            assert mine[name].dtype == stored.dtype
            if stored.dtype in (torch.float32, torch.float64):
                # momentum may be a small difference of gradients
                scale = max(largest_of(stored), spread if name == "exp_avg" else 0.0)
                assert_close(mine[name], stored, tolerance_of(c, stored.dtype), scale)
                continue
            pairs = ((of[name], of.get(f"{name}_scale")) for of in (mine, theirs))
            is_aligned = not c.is_in_pieces or stored.dtype != torch.bfloat16
            assert_same_moment(*pairs, is_aligned=is_aligned)


def tolerance_of(c: Combination, dtype: torch.dtype) -> Tolerance:
    """Of what is kept in ``dtype``, relative to the largest number of its kind."""
    if c.is_in_pieces and dtype in (torch.float32, torch.float64):
        return SHARDED["cpu" if dtype == torch.float32 else "reference"]
    return TRAJECTORY[dtype]


def largest_of(x: torch.Tensor) -> float:
    """Magnitude of the largest element, 0 where there is none."""
    return float(x.abs().max()) if x.numel() else 0.0


def compare_statistics(c: Combination, found: Side, expected: Side) -> None:
    """Those of whole tensors; a collective where they are sharded.

    Raises:
        AssertionError: they are not the same.
    """
    measured, defined = found.statistics(), expected.statistics()
    assert measured.keys() == defined.keys()
    if not defined:
        return
    numel = [math.prod(shape) for shape in c.shapes]
    scales = statistics_scale(numel, torch.stack([*defined.values()], 1))
    for column, (name, values) in enumerate(defined.items()):
        with _said_of(name):
            tolerance = STATISTICS_TOLERANCE[c.dtype]
            assert_close(measured[name], values, tolerance, scales[:, column])


@contextmanager
def _said_of(what: str) -> Iterator[None]:
    """Let an assertion that fails say what it is about."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{what}: {error}") from None


@torch.no_grad()
def take_over(side: Side, other: Side) -> None:
    """Let a side go on with the numbers of another one, whose tensors are whole."""
    for index, how in enumerate(side.where):
        theirs = other.held(index)
        for name, x in side.held(index).items():
            local_tensor(x).copy_(local_tensor(place(theirs[name], how)))


def check(c: Combination, fast: BackendName = "auto", spoilt: float = 1.0) -> None:
    """Step a combination and the reference; every rank calls it for a sharded one.

    Args:
        fast: the backend of combinations that do not ask for the reference itself.
        spoilt: a factor of learning rates and gradients, which makes it a wrong step.

    Raises:
        AssertionError: they do not agree; after the last step, since other ranks may not know.
    """
    found, expected = tested(c, fast), defining(c)
    for group in found.optimizer.param_groups:
        group["lr"] *= spoilt
    seen: list[str] = []

    def note(comparison: Callable[[Combination, Side, Side], None], step: int) -> None:
        try:
            comparison(c, found, expected)
        except AssertionError as error:
            seen.append(f"step {step}: {error}")

    for step in range(STEPS):
        grads = gradients(c, step)
        found.step(grads, spoilt)
        expected.step(grads)
        is_last = step == STEPS - 1
        if c.keeps_fewer_bits or is_last:
            note(compare, step)
        if c.keeps_fewer_bits and not is_last:
            take_over(found, expected)
    note(compare_statistics, STEPS - 1)
    assert not seen, seen[0]


# ---------------------------------------------------------------------- many


def share(
    rank: int,
    ranks: int,
    seed: int,
    numbers: Sequence[int],
    fast: BackendName,
    spoilt: float,
) -> Any:
    """What this rank has seen fail, and how many of the numbers it has got through."""
    warnings.simplefilter("ignore", RuntimeWarning)  # of skipped steps
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # of slow gathers
    failures: list[tuple[int, str]] = []
    for position, number in enumerate(numbers):
        c = drawn(seed, number)
        if c.sharding == "alone" and position % ranks != rank:
            continue
        try:
            check(c, fast, spoilt)
        except AssertionError as error:
            failures.append((number, str(error)))
        except Exception:
            failures.append((number, traceback.format_exc()))
            if c.sharding != "alone":  # ranks may not be where one another are
                return failures, position + 1
    return failures, len(numbers)


def failures(
    seed: int, numbers: Iterable[int], fast: BackendName = "auto", spoilt: float = 1.0
) -> dict[int, str]:
    """What does not agree, by number."""
    left, found = list(numbers), dict[int, str]()
    while left:
        outcomes = run_ranks(share, RANKS, seed, left[:BATCH], fast, spoilt)
        through = min(done for _, done in outcomes)
        seen = dict(itertools.chain.from_iterable(failures for failures, _ in outcomes))
        found |= {number: seen[number] for number in left[:through] if number in seen}
        left = left[through:]
    return found


def main(say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--combinations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", choices=("auto", "triton"), default="auto")
    parser.add_argument("--only", type=int, help="run this combination alone")
    parser.add_argument("--keep", action="store_true", help="write it to benchmarks/results")
    asked = parser.parse_args()
    numbers = range(asked.combinations) if asked.only is None else [asked.only]
    found = failures(asked.seed, numbers, asked.backend)
    for number, text in sorted(found.items()):
        say(f"{drawn(asked.seed, number)}\n{text}")
        again = f"--backend {asked.backend} --seed {asked.seed} --only {number}"
        say(f"again: PYTHONPATH=tests python -m fuzz {again}")
    agree = len(numbers) - len(found)
    say(f"{agree} of {len(numbers)} combinations agree with the reference")
    if asked.keep:
        report.keep(
            "fuzz",
            {
                "seed": asked.seed,
                "backend": asked.backend,
                "combinations": len(numbers),
                "agree": agree,
            },
        )
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
