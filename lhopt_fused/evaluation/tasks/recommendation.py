"""Recommendation on MovieLens: GMF and NeuMF, judged by leaving out each user's last films."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F

from lhopt_fused.evaluation.task import (
    Batch,
    DataError,
    Scores,
    Size,
    Split,
    Task,
    epochs,
    find_data,
)

__all__ = ["GMF", "NeuMF", "read_ratings"]

_SOURCE: Final = (
    "https://grouplens.org/datasets/movielens: ml-100k/u.data or ml-1m/ratings.dat; or "
    "recbole/dataset_example/ml-100k/ml-100k.inter of the PyPI package recbole"
)
_PLACES: Final[dict[Size, tuple[str, ...]]] = {
    "small": ("ml-100k/u.data", "ml-100k/ml-100k.inter"),
    "full": ("ml-1m/ratings.dat", "ml-1m/ml-1m.inter", "ml-100k/u.data", "ml-100k/ml-100k.inter"),
}
_STRANGERS: Final = 99  # items that a held-out one is ranked among
_NEGATIVES: Final = 4  # items never met, for each one that was
_CUT: Final = 10


class _Interactions(NamedTuple):
    """Of U users and I items, both counted from 0.

    Attributes:
        training: users and items, int64 ``[N]``.
        held_out: users ``[M]`` and items ``[M, 100]``, the one that was met first.
        met: bool ``[U, I]``, in any split.
    """

    training: Batch
    held_out: dict[Split, Batch]
    met: torch.Tensor


def read_ratings(path: Path) -> NDArray[np.int64]:
    """Users, items and times, int64 ``[N, 3]``, of u.data, ratings.dat or an .inter file.

    Raises:
        DataError: a line is something else.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); get it from {_SOURCE}") from error
    for number, line in enumerate(lines, 1):
        if number == 1 and line.startswith("user_id:"):
            continue
        fields = line.split("::") if "::" in line else line.split("\t")
        try:
            user, item, _, moment = fields[:4]
            rows.append((int(user), int(item), int(float(moment))))
        except ValueError as error:
            raise DataError(
                f"{path}: line {number} is {line[:60]!r}, expected user, item, rating and time "
                f"between tabs or '::'; get it from {_SOURCE}"
            ) from error
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


@lru_cache(maxsize=2)
def _interactions(size: Size, data_dir: Path | None) -> _Interactions:
    roots = [data_dir / name for name in _PLACES[size]] if data_dir is not None else []
    path = find_data("MovieLens", roots, _SOURCE)
    rows = read_ratings(path)
    if len(rows) == 0:
        raise DataError(f"{path} is empty; get it from {_SOURCE}")
    rows = rows[np.lexsort((rows[:, 1], rows[:, 2], rows[:, 0]))]  # by user, then time
    users = np.unique(rows[:, 0], return_inverse=True)[1]
    items = np.unique(rows[:, 1], return_inverse=True)[1]
    met = np.zeros((users.max() + 1, items.max() + 1), dtype=bool)
    met[users, items] = True
    left = np.bincount(users)[users] - _place_of(users)  # films of the user from here on
    enough = np.bincount(users)[users] >= 3
    free = (~met).sum(1)[users] >= _STRANGERS
    splits: dict[Split, Batch] = {}
    splits["report"], splits["policy_eval"] = (
        _candidates(met, users[chosen], items[chosen], seed)
        for seed, chosen in enumerate(((left == 1) & enough & free, (left == 2) & enough & free))
    )
    if len(splits["report"][0]) == 0:
        raise DataError(
            f"{path} has no user with three films or more and {_STRANGERS} never met; get it from "
            f"{_SOURCE}"
        )
    kept = (left > 2) | ~enough | ~free
    training = (torch.from_numpy(users[kept]), torch.from_numpy(items[kept]))
    return _Interactions(training, splits, torch.from_numpy(met))


def _place_of(users: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many rows of the same user come before; users are sorted."""
    first = np.searchsorted(users, users)
    return np.arange(len(users)) - first


def _candidates(
    met: NDArray[np.bool_], users: NDArray[np.int64], items: NDArray[np.int64], seed: int
) -> Batch:
    """Users and, for each, the item that was met and 99 that never were, ``[M, 100]``."""
    rng = np.random.default_rng(seed)
    rows = [
        np.append(item, rng.choice(np.flatnonzero(~met[user]), _STRANGERS, replace=False))
        for user, item in zip(users, items, strict=True)
    ]
    found = np.array(rows, dtype=np.int64).reshape(-1, 1 + _STRANGERS)
    return torch.from_numpy(users), torch.from_numpy(found)


class _Factors(nn.Module):
    """NeuMF (He et al. 2017): a product of factors, beside a network where there is one."""

    def __init__(self, users: int, items: int, factors: int, deep: bool) -> None:
        super().__init__()
        self.user = nn.Embedding(users, factors)
        self.item = nn.Embedding(items, factors)
        self.deep_user = nn.Embedding(users, 2 * factors) if deep else None
        self.deep_item = nn.Embedding(items, 2 * factors) if deep else None
        self.deep = nn.Sequential(
            nn.Linear(4 * factors, 2 * factors), nn.ReLU(), nn.Linear(2 * factors, factors),
            nn.ReLU(),
        ) if deep else None  # fmt: skip
        self.head = nn.Linear(2 * factors if deep else factors, 1)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Logits of users having met items, any shape."""
        found = [self.user(users) * self.item(items)]
        if self.deep is not None and self.deep_user is not None and self.deep_item is not None:
            pair = torch.cat([self.deep_user(users), self.deep_item(items)], -1)
            found.append(self.deep(pair))
        logits: torch.Tensor = self.head(torch.cat(found, -1))
        return logits.squeeze(-1)


class GMF(Task):
    """Generalised matrix factorisation, with four films never met for each one that was.

    Of each user the last film is for the report, the one before for policies; each is ranked
    among 99 that the user never met.
    """

    name = "gmf"
    metric = "hit_ratio_at_10"
    deep = False

    def __init__(self, size: Size, data_dir: Path | None) -> None:
        found = _interactions(size, data_dir)
        small = size == "small"
        batch = 256 if small else 1_024
        steps = 500 if small else 10_000
        super().__init__(found.training, found.held_out, steps=steps, batch_size=batch)
        self.met = found.met
        self.factors = 16 if small else 64

    def make_model(self) -> nn.Module:
        users, items = self.met.shape
        return _Factors(users, items, self.factors, self.deep)

    def batches(self, generator: torch.Generator) -> Iterator[Batch]:
        """Users ``[B]`` and items ``[B, 5]``, the one that was met first."""
        users, items = self.training
        positives = min(self.batch_size // (1 + _NEGATIVES), len(users))
        for picked in epochs(len(users), positives, generator):
            shape = (len(picked), _NEGATIVES)
            negatives = torch.randint(self.met.shape[1], shape, generator=generator)
            again = self.met[users[picked, None], negatives]  # draw those once more
            second = torch.randint(self.met.shape[1], shape, generator=generator)
            negatives = torch.where(again, second, negatives)
            yield users[picked], torch.cat([items[picked, None], negatives], 1)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        users, items = batch
        logits = model(users[:, None].expand_as(items), items)
        targets = torch.zeros_like(logits)
        targets[:, 0] = 1.0
        return F.binary_cross_entropy_with_logits(logits, targets)

    def scores(self, model: nn.Module, batch: Batch) -> Scores:
        users, items = batch
        loss = self.loss(model, (users, items[:, : 1 + _NEGATIVES]))
        logits = model(users[:, None].expand_as(items), items)
        rank = (logits[:, 1:] >= logits[:, :1]).sum(1).double()  # ties count against it
        hit = rank < _CUT
        gain = torch.where(hit, 1.0 / (rank + 2.0).log2(), 0.0)
        metrics = {"hit_ratio_at_10": hit.double().mean().item(), "ndcg_at_10": gain.mean().item()}
        return Scores(loss.item(), metrics)


class NeuMF(GMF):
    """The same with a network beside the factors."""

    name = "neumf"
    deep = True
