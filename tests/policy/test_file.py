"""Policy files: a round trip to the bit, and a refusal that names the field for everything else."""

from __future__ import annotations

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from policy.samples import SPACE, START, observation, of_run, random_network, random_policy
from policy.sealing import parts, seal

from lhopt_fused.actions import ACTIONS, ActionSpace
from lhopt_fused.policy import (
    FEATURES_HASH,
    LearnedPolicy,
    PolicyFileError,
    StartOptions,
    inspect_policy,
    load_policy_file,
    save_policy,
)
from lhopt_fused.policy.file import FIELDS, LARGEST_FILE

Change = Callable[[dict[str, Any], dict[str, Any]], Any]
"""Of a header and weights, in place."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    target = tmp_path / "policy.safetensors"
    save_policy(random_policy(0, hidden=16), target)
    return target


def test_round_trip(path: Path) -> None:
    policy, again = random_policy(0, hidden=16), load_policy_file(path)
    for field in ("name", "shape", "action_space", "start_hyperparameters", "trained_on", "commit"):
        assert getattr(again, field) == getattr(policy, field)
    assert again.weights.keys() == policy.weights.keys()
    assert all(np.array_equal(again.weights[k], v) for k, v in policy.weights.items())
    seen = of_run(observation(torch.Generator().manual_seed(0), 1, 0.5), 0)
    for a, b in zip(policy.start_run().decide(seen), again.start_run().decide(seen), strict=True):
        assert np.array_equal(a, b, equal_nan=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            again.network().state_dict().values(),
            random_network(0, hidden=16).state_dict().values(),
            strict=True,
        )
    )


def test_the_same_policy_gives_the_same_bytes(path: Path, tmp_path: Path) -> None:
    save_policy(load_policy_file(path), tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again", path.name]


def test_inspect_shows_the_header(path: Path) -> None:
    header = inspect_policy(path)
    assert set(header) == set(FIELDS)
    assert header["features"]["sha256"] == FEATURES_HASH
    assert header["trained_on"] == {"tasks": ["none"], "episodes": 0}
    json.dumps(header)


def test_another_action_space_is_refused_with_the_difference(path: Path) -> None:
    assert load_policy_file(path, action_space=SPACE).action_space == SPACE
    other = ActionSpace((replace(ACTIONS[0], choices=(0.5, 2.0)), *ACTIONS[1:]), True)
    with pytest.raises(PolicyFileError, match=r"action_space: lr\.choices is .*, expected \[0\.5"):
        load_policy_file(path, action_space=other)


def refuse(path: Path, data: bytes, message: str) -> None:
    path.write_bytes(data)
    with pytest.raises(PolicyFileError, match=message):
        load_policy_file(path)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(PolicyFileError, match="is a directory"):
        load_policy_file(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PolicyFileError, match="is no regular file"):
        load_policy_file(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        load_policy_file(tmp_path / "nothing")


def test_what_is_not_safetensors(path: Path) -> None:
    whole = path.read_bytes()
    for data in (b"", b"\0" * 8, b"\xff" * 100, whole[:7], whole[:100], whole[:-1], whole + b"x"):
        refuse(path, data, "is not a safetensors file")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        refuse(path, pickle.dumps({"lr": 1.0}, protocol), "is not a safetensors file")
    header = json.dumps({"x": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}})
    refuse(path, struct.pack("<Q", len(header)) + header.encode() + b"\0" * 4, "not a safetensors")
    refuse(path, struct.pack("<Q", 2**63) + whole[8:], "not a safetensors")


def test_huge_files_are_not_read(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(LARGEST_FILE + 1)
    with pytest.raises(PolicyFileError, match=f"has {LARGEST_FILE + 1} bytes"):
        load_policy_file(path)


def test_foreign_safetensors(path: Path) -> None:
    weights = dict(random_policy(0, hidden=16).weights)
    refuse(path, seal(None, weights), r"metadata has the entries \[\]")
    refuse(path, seal("7", weights), "format_version is None")
    refuse(path, seal("[[", weights), "Expecting value")
    refuse(path, seal("[" * 100_000, weights), "nested too deeply")
    refuse(path, seal('{"format_version": NaN}', weights), "NaN is not JSON")


def test_a_flipped_bit_is_refused(path: Path) -> None:
    """Even in the last bit of a weight, where the number still makes sense."""
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    refuse(path, bytes(data), "sha256 is")


def _set(*keys: str | int, to: Any) -> Change:
    def change(header: dict[str, Any], weights: dict[str, Any]) -> None:
        place: Any = header
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = to

    return change


def _weight(
    name: str, to: Callable[[Any], Any]
) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(header: dict[str, Any], weights: dict[str, Any]) -> None:
        weights[name] = to(weights[name].copy())

    return change


def _nan(array: np.ndarray) -> np.ndarray:
    array.flat[3] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format_version", to=1), "format_version is 1, expected 2"),
        (_set("format_version", to=True), "format_version is True, expected 2"),
        (_set("extra", to=1), "extra is unknown"),
        (lambda header, weights: header.pop("commit"), "commit is missing"),
        (_set("commit", to=None), "commit is None, expected a string"),
        (_set("name", to=["a"]), "name is"),
        (_set("features", "names", 5, to="colour"), r"features\.names\[5\] is 'colour', expected"),
        (lambda h, w: h["features"]["names"].pop(), "features.names has 145 entries, expected 146"),
        (_set("features", "version", to=9), r"features\.version is 9, expected 1"),
        (_set("features", "sha256", to="0"), r"features\.sha256 is '0'"),
        (_set("action_space", "actions", 0, "name", to="lrr"), r"actions\[0\]: name is 'lrr'"),
        (lambda h, w: h["action_space"]["actions"].reverse(), "actions are for lamb_update"),
        (_set("action_space", "registers", to=[]), r"network\.heads is .* but the action space"),
        (_set("action_space", "actions", 0, "choices", to=[1.0]), r"network\.heads is \[7, 2"),
        (_set("start_hyperparameters", "lr", to=5.0), r"start_hyperparameters\.lr is 5\.0"),
        (_set("start_hyperparameters", "lr", to="1"), r"start_hyperparameters\.lr is '1'"),
        (_set("start_hyperparameters", to={}), r"start_hyperparameters\.lr is missing"),
        (_set("start_options", "trust", to="late"), r"start_options\.trust is 'late', expected"),
        (_set("start_options", "lamb_ignore_vectors", to=1), r"lamb_ignore_vectors is 1, expected"),
        (_set("start_options", "lr_steps", to=0), r"start_options\.lr_steps is 0, expected"),
        (_set("start_options", "lr_steps", to=1.5), r"start_options\.lr_steps is 1\.5, expected"),
        (_set("start_options", "lr_reach", to=0.5), r"start_options\.lr_reach is 0\.5, expected"),
        (_set("start_options", "lr_reach", to="2"), r"start_options\.lr_reach is '2', expected"),
        (_set("start_options", "lamb_power", to=2), r"start_options\.lamb_power is unknown"),
        (_set("network", "hidden", to=10**15), r"network\.hidden is 1000000000000000"),
        (_set("network", "hidden", to=32), r"weight heads\.0\.down\.weight has shape \[16, 16\]"),
        (_set("network", "features", to=145), r"network\.features is 145, expected 146"),
        (_set("network", "heads", to="7"), r"network\.heads is '7', expected a list"),
        (_set("network", "heads", 0, to=7.0), r"network\.heads\[0\] is 7\.0, expected an integer"),
        (_set("normalisation", "clip", to=3.0), r"normalisation\.clip is 3\.0, expected 2\.0"),
        (_set("trained_on", to=[]), "trained_on is not an object"),
        (_weight("post.bias", lambda x: x[:-1].copy()), r"post\.bias has shape \[15\], expected"),
        (_weight("post.bias", lambda x: x.astype(np.float64)), r"post\.bias has dtype F64"),
        (_weight("post.bias", lambda x: x.astype(np.float16)), r"post\.bias has dtype F16"),
        (_weight("post.bias", _nan), r"post\.bias holds nan at 3"),
        (_weight("post.bias", lambda x: x + 1e30), r"post\.bias holds 1.*e\+30"),
        (_weight("normalisation.var", lambda x: -x), r"normalisation\.var holds -"),
        (lambda h, w: w.pop("post.bias"), r"post\.bias is missing"),
        (lambda h, w: w.update(x=np.zeros(3, np.float32)), "weight x is unknown"),
    ],
)
def test_a_sealed_file_with_other_contents_is_refused_by_field(
    change: Change, message: str, path: Path
) -> None:
    """The checksum is right in each: it is the field that is refused."""
    header, weights = parts(path.read_bytes())
    path.write_bytes(seal(header, weights))
    load_policy_file(path)  # the twin: sealed without a change
    change(header, weights)
    refuse(path, seal(header, weights), message)


def test_policies_are_checked_before_they_are_saved() -> None:
    policy = random_policy(0)
    with pytest.raises(ValueError, match=r"weight pre\.bias is missing"):
        replace(policy, weights={k: v for k, v in policy.weights.items() if k != "pre.bias"})
    with pytest.raises(ValueError, match="start_hyperparameters are for lr; expected"):
        replace(policy, start_hyperparameters={"lr": START["lr"]})
    with pytest.raises(ValueError, match="mode is 'best'"):
        policy.start_run(mode="best")
    with pytest.raises(ValueError, match="seed is -1"):
        policy.start_run(seed=-1)


def test_options_go_with_the_file(path: Path) -> None:
    options = StartOptions("delayed", lamb_ignore_vectors=False, lr_steps=200, lr_reach=1.5)
    assert load_policy_file(path).start_options == StartOptions()  # as published
    save_policy(replace(random_policy(0), start_options=options), path)
    assert load_policy_file(path).start_options == options


def test_what_is_no_json_is_not_saved(tmp_path: Path) -> None:
    policy: LearnedPolicy = replace(random_policy(0), trained_on={"loss": float("nan")})
    with pytest.raises(ValueError, match="JSON"):
        save_policy(policy, tmp_path / "x")
    assert not list(tmp_path.iterdir())
