"""Mutated policy files: none crashes, hangs, or is accepted as something that it is not.

``LHOPT_FUZZ_FILES`` sets how many are made (10000 under the sanitizers).
"""

from __future__ import annotations

import copy
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policy.samples import SPACE, observation, of_run, random_policy
from policy.sealing import parts, seal

from lhopt_fused.policy import LearnedPolicy, PolicyFileError, load_policy_file, save_policy
from lhopt_fused.policy.base import RunObservation

FILES = int(os.environ.get("LHOPT_FUZZ_FILES", "400"))
SHARDS = 8

ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1e-320,
    1e308,
    10**30,
    -(10**400),
    0.5,
    "",
    "lr",
    "\ud800\0\u202e",
    [],
    [[]],
    {},
    {"": {}},
    [0.0] * 70,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small policy, so that mutations hit its header about as often as its weights."""
    path = tmp_path_factory.mktemp("fuzz") / "policy"
    save_policy(random_policy(0, hidden=16), path)
    return path.read_bytes()


@pytest.fixture(scope="module")
def seen() -> RunObservation:
    return of_run(observation(torch.Generator().manual_seed(0), 1, 0.5), 0)


def _position(data: bytearray, rng: random.Random) -> int:
    """Anywhere, the header as often as all the rest."""
    header = 8 + int.from_bytes(data[:8], "little")
    end = min(header, len(data)) if rng.random() < 0.5 else len(data)
    return rng.randrange(max(end, 1))


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        data[_position(data, rng)] ^= 1 << rng.randrange(8)


def overwrite(data: bytearray, rng: random.Random) -> None:
    at, size = _position(data, rng), rng.choice([1, 2, 4, 64])
    data[at : at + size] = rng.choice([b"\0" * size, b"\xff" * size, rng.randbytes(size)])


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[_position(data, rng) :]


def cut_or_repeat(data: bytearray, rng: random.Random) -> None:
    at, size = _position(data, rng), rng.randrange(1, 200)
    piece = data[at : at + size]
    if rng.random() < 0.5:
        del data[at : at + size]
    else:
        data[at:at] = piece


def change_header_length(data: bytearray, rng: random.Random) -> None:
    size = rng.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(data), rng.randrange(2 * len(data))])
    data[:8] = size.to_bytes(8, "little")


def change_a_number(data: bytearray, rng: random.Random) -> None:
    """One digit of the header: shapes, offsets, bounds."""
    size = int.from_bytes(data[:8], "little")
    digits = [i for i in range(8, 8 + size) if chr(data[i]).isdigit()]
    data[rng.choice(digits)] = ord(rng.choice('0123456789-eE."'))


BYTE_MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flip_bits,
    overwrite,
    truncate,
    cut_or_repeat,
    change_header_length,
    change_a_number,
)


def mutate_header(header: dict[str, Any], rng: random.Random) -> None:
    """Replaces, drops, adds or repeats something somewhere in the JSON."""
    place: Any = header
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        break
    kind = rng.randrange(4)
    if kind == 0:
        del place[key]
    elif kind == 1 and isinstance(place, list):
        place.insert(rng.randrange(len(place) + 1), copy.deepcopy(place[key]))
    elif isinstance(place[key], int | float) and kind == 2:
        place[key] *= rng.choice([-1, 0.5, 2, 1e300])
    else:
        place[key] = copy.deepcopy(rng.choice(ODD_VALUES))


def mutate_weights(weights: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice(sorted(weights))
    value = weights[name].copy()
    kind = rng.randrange(6)
    if kind == 0:
        del weights[name]
        return
    if kind == 1:
        weights[rng.choice(["x", name + "x", "heads.9.down.weight"])] = value
    elif kind == 2:
        value = value.astype(rng.choice([np.float16, np.float64]))
    elif kind == 3:
        value = np.resize(value, [rng.choice([0, 1, 15, 16, 17, 32]) for _ in value.shape])
    elif value.size:
        odd = rng.choice([math.nan, math.inf, -math.inf, 3e38, 1e4, -1e4, 1e-45, 0.0])
        value.flat[rng.randrange(value.size)] = odd
    weights[name] = value


def same(policy: LearnedPolicy, other: LearnedPolicy) -> bool:
    fields = ("name", "shape", "action_space", "start_hyperparameters", "trained_on", "commit")
    return all(getattr(policy, f) == getattr(other, f) for f in fields) and all(
        np.array_equal(policy.weights[name], other.weights[name]) for name in other.weights
    )


def check_that_it_works(policy: LearnedPolicy, seen: RunObservation) -> None:
    """What was accepted decides, within the bounds that it states."""
    run = policy.start_run(mode="sample")
    for _ in range(3):
        decision = run.decide(seen)
    assert np.isfinite(decision.probabilities).all()
    assert np.isfinite(decision.features).all()
    for action, value, before, shift in zip(
        policy.action_space.actions,
        decision.hyperparameters,
        seen.hyperparameters,
        decision.shifts,
        strict=True,
    ):
        stays = shift == 0 or before == 0 or math.isnan(before)
        assert action.low <= value <= action.high or (stays and np.array_equal(value, before, True))
    run.set_state(run.get_state())


@pytest.mark.parametrize("shard", range(SHARDS))
def test_mutated_bytes_are_refused_or_change_nothing(
    shard: int, whole: bytes, tmp_path: Path
) -> None:
    original, path, refused = random_policy(0, hidden=16), tmp_path / "mutant", 0
    for index in range(shard, FILES // 2, SHARDS):
        rng = random.Random(index)
        data = bytearray(whole)
        rng.choice(BYTE_MUTATIONS)(data, rng)
        path.write_bytes(data)
        try:
            assert same(load_policy_file(path), original), index
        except PolicyFileError:
            refused += 1
    assert refused > 0.8 * (FILES // 2 // SHARDS)


@pytest.mark.parametrize("shard", range(SHARDS))
def test_sealed_mutants_are_refused_or_work(
    shard: int, whole: bytes, seen: RunObservation, tmp_path: Path
) -> None:
    """With a right checksum, so that every later check is reached."""
    path = tmp_path / "mutant"
    refused = accepted = 0
    for index in range(shard, FILES // 2, SHARDS):
        rng = random.Random(-1 - index)
        header, weights = parts(whole)
        if rng.random() < 0.6:
            mutate_header(header, rng)
        else:
            mutate_weights(weights, rng)
        path.write_bytes(seal(header, weights))
        try:
            policy = load_policy_file(path)
        except PolicyFileError:
            refused += 1
        else:
            accepted += 1
            check_that_it_works(policy, seen)
    assert refused > 0
    assert accepted > 0  # a free text, say, or a weight of another size


def test_the_unchanged_file_is_accepted(whole: bytes, seen: RunObservation, tmp_path: Path) -> None:
    header, weights = parts(whole)
    path = tmp_path / "policy"
    for data in (whole, seal(header, weights)):
        path.write_bytes(data)
        policy = load_policy_file(path)
        assert same(policy, random_policy(0, hidden=16))
        assert policy.action_space == SPACE
        check_that_it_works(policy, seen)


def test_a_mutant_that_got_through_would_be_seen() -> None:
    original = random_policy(0, hidden=16)
    weights = {name: value.copy() for name, value in original.weights.items()}
    weights["post.bias"][3] = np.nextafter(weights["post.bias"][3], np.float32(9))
    mutant = LearnedPolicy(**{**original.__dict__, "weights": weights})
    assert not same(mutant, original)
    assert same(random_policy(0, hidden=16), original)
