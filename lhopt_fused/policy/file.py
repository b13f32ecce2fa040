"""Policy files: a learned policy as safetensors with a JSON header. Never pickle.

The tensors are the network's ``state_dict``. The header's metadata holds one entry,
``lhopt_policy``, the JSON object of :data:`FIELDS`; its ``sha256`` covers all other fields and all
tensors, so that a file whose bits have changed is refused even where it still makes sense.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from lhopt_fused.actions import ActionSpace
from lhopt_fused.json_fields import (
    expect_equal,
    expect_integer,
    expect_list,
    expect_number,
    expect_object,
    expect_string,
)
from lhopt_fused.policy.base import StartOptions
from lhopt_fused.policy.features import FEATURES, FEATURES_HASH, FEATURES_VERSION
from lhopt_fused.policy.learned import LearnedPolicy
from lhopt_fused.policy.network import NORM_BETA, NORM_CLIP, NORM_EPSILON, NetworkShape
from lhopt_fused.types import HYPERPARAMETERS

__all__ = [
    "FIELDS",
    "FORMAT_VERSION",
    "LARGEST_FILE",
    "PolicyFileError",
    "inspect_policy",
    "load_policy_file",
    "parse_json",
    "read_bytes",
    "save_policy",
]

FORMAT_VERSION: Final = 2
"""Files of version 1 lack ``start_options``."""

LARGEST_FILE: Final = 64 * 2**20
"""Bytes; a policy of the usual size has 3 MiB."""

FIELDS: Final = (
    "format_version",
    "name",
    "features",
    "action_space",
    "start_hyperparameters",
    "start_options",
    "network",
    "normalisation",
    "trained_on",
    "commit",
    "sha256",
)

_KEY: Final = "lhopt_policy"
_NORMALISATION: Final = {"beta": NORM_BETA, "epsilon": NORM_EPSILON, "clip": NORM_CLIP}

_Arrays = Mapping[str, NDArray[np.float32]]
_T = TypeVar("_T")


class PolicyFileError(ValueError):
    """Not a policy file of this version; the message names the field and the difference."""


def save_policy(policy: LearnedPolicy, path: str | os.PathLike[str]) -> None:
    """Write a policy file; the file at ``path`` is whole at any time.

    Raises:
        ValueError: ``trained_on`` is not made of plain JSON values.
    """
    header = _header(policy)
    header["sha256"] = _checksum(header, policy.weights)
    data = safetensors.numpy.save(dict(policy.weights), {_KEY: _canonical(header)})
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def load_policy_file(
    path: str | os.PathLike[str], *, action_space: ActionSpace | None = None
) -> LearnedPolicy:
    """Read a policy file.

    Args:
        path: of the file.
        action_space: the only one that is taken, if given.

    Raises:
        PolicyFileError: the file is not a policy for these features and actions; the message says
            which field differs, and how.
        OSError: the file is not there or cannot be read.
    """
    policy, _ = _read(Path(path))
    if action_space is not None:
        difference = action_space.difference(policy.action_space)
        if difference is not None:
            raise PolicyFileError(f"{path}: action_space: {difference}")
    return policy


def inspect_policy(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The header of a valid policy file, as plain JSON values.

    Raises:
        PolicyFileError, OSError: as :func:`load_policy_file`.
    """
    return _read(Path(path))[1]


def read_bytes(path: Path) -> bytes:
    """The whole of a regular file of at most :data:`LARGEST_FILE` bytes.

    Raises:
        PolicyFileError: it is something else, a directory say.
        OSError: it is not there or cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise PolicyFileError(f"{path} is {kind}, expected a policy file")
    if status.st_size > LARGEST_FILE:
        raise PolicyFileError(
            f"{path} has {status.st_size} bytes, expected at most {LARGEST_FILE} of a policy file"
        )
    return path.read_bytes()


def parse_json(text: str | bytes) -> Any:
    """JSON without its extensions for NaN and infinities.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _header(policy: LearnedPolicy) -> dict[str, Any]:
    """All fields but the checksum, as plain JSON values."""
    shape = policy.shape
    return {
        "format_version": FORMAT_VERSION,
        "name": policy.name,
        "features": {
            "version": FEATURES_VERSION,
            "sha256": FEATURES_HASH,
            "names": list(FEATURES),
        },
        "action_space": policy.action_space.to_json(),
        "start_hyperparameters": dict(policy.start_hyperparameters),
        "start_options": policy.start_options.to_plain(),
        "network": {
            "features": shape.features,
            "heads": list(shape.heads),
            "hidden": shape.hidden,
            "head_hidden": shape.head_hidden,
        },
        "normalisation": dict(_NORMALISATION),
        "trained_on": dict(policy.trained_on),
        "commit": policy.commit,
    }


def _canonical(header: Mapping[str, Any]) -> str:
    return json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _checksum(header: Mapping[str, Any], arrays: _Arrays) -> str:
    """sha256 of every field but itself, and of every tensor with its name and shape."""
    fields = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(_canonical(fields).encode())
    for name in sorted(arrays):
        digest.update(f"\n{name} {list(arrays[name].shape)}\n".encode())
        digest.update(arrays[name].astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


def _read(path: Path) -> tuple[LearnedPolicy, dict[str, Any]]:
    data = read_bytes(path)
    try:
        tensors = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise PolicyFileError(f"{path} is not a safetensors file: {error}") from None
    try:
        header = _parse_header(data)
        policy = _parse_policy(header, _parse_arrays(tensors))
    except ValueError as error:
        raise PolicyFileError(f"{path}: {error}") from None
    return policy, header


def _parse_header(data: bytes) -> dict[str, Any]:
    """The policy's fields, out of a header that safetensors has found to be sound."""
    size = int.from_bytes(data[:8], "little")
    metadata = parse_json(data[8 : 8 + size]).get("__metadata__") or {}
    if list(metadata) != [_KEY]:
        raise ValueError(
            f"metadata has the entries {sorted(metadata)}, expected [{_KEY!r}]; "
            "this is a safetensors file, but not a policy"
        )
    header = parse_json(metadata[_KEY])
    version = header.get("format_version") if isinstance(header, dict) else None
    # first of all: other versions may have other fields
    expect_equal(version, "format_version", FORMAT_VERSION)
    return expect_object(header, _KEY, FIELDS)


def _parse_arrays(tensors: list[tuple[str, dict[str, Any]]]) -> dict[str, NDArray[np.float32]]:
    arrays = {}
    for name, tensor in tensors:
        if tensor["dtype"] != "F32":
            raise ValueError(f"weight {name} has dtype {tensor['dtype']}, expected F32")
        flat = np.frombuffer(tensor["data"], "<f4").astype(np.float32)
        arrays[name] = flat.reshape(tensor["shape"])
    return arrays


def _parse_policy(header: dict[str, Any], arrays: _Arrays) -> LearnedPolicy:
    _check_features(header["features"])
    space = ActionSpace.from_json(header["action_space"])
    normalisation = expect_object(header["normalisation"], "normalisation", tuple(_NORMALISATION))
    for name, expected in _NORMALISATION.items():
        expect_equal(normalisation[name], f"normalisation.{name}", expected)
    trained_on = header["trained_on"]
    if not isinstance(trained_on, dict):
        raise ValueError("trained_on is not an object")
    start = expect_object(header["start_hyperparameters"], "start_hyperparameters", HYPERPARAMETERS)
    policy = LearnedPolicy(
        name=expect_string(header["name"], "name"),
        shape=_parse_shape(header["network"]),
        weights=arrays,
        action_space=space,
        start_hyperparameters=_each(start, "start_hyperparameters", expect_number),
        start_options=_parse_options(header["start_options"]),
        trained_on=trained_on,
        commit=expect_string(header["commit"], "commit"),
    )
    expect_equal(header["sha256"], "sha256", _checksum(header, arrays))
    return policy


def _parse_options(value: object) -> StartOptions:
    names = [field.name for field in dataclasses.fields(StartOptions)]
    try:
        return StartOptions(**expect_object(value, "start_options", names))
    except ValueError as error:
        raise ValueError(f"start_options.{str(error).removeprefix('start_options.')}") from None


def _parse_shape(value: object) -> NetworkShape:
    fields = expect_object(value, "network", ("features", "heads", "hidden", "head_hidden"))
    heads = [
        expect_integer(size, f"network.heads[{index}]")
        for index, size in enumerate(expect_list(fields["heads"], "network.heads"))
    ]
    widths = {name: size for name, size in fields.items() if name != "heads"}
    sizes = _each(widths, "network", expect_integer)
    try:
        return NetworkShape(heads=tuple(heads), **sizes)
    except ValueError as error:
        raise ValueError(f"network.{error}") from None


def _each(
    fields: Mapping[str, object], where: str, expect: Callable[[object, str], _T]
) -> dict[str, _T]:
    return {name: expect(value, f"{where}.{name}") for name, value in fields.items()}


def _check_features(value: object) -> None:
    """Refuse a policy that was trained on other features, naming the first that differs."""
    fields = expect_object(value, "features", ("version", "sha256", "names"))
    names = expect_list(fields["names"], "features.names")
    for index, (found, expected) in enumerate(zip(names, FEATURES, strict=False)):
        expect_equal(found, f"features.names[{index}]", expected)
    if len(names) != len(FEATURES):
        raise ValueError(f"features.names has {len(names)} entries, expected {len(FEATURES)}")
    expect_equal(fields["version"], "features.version", FEATURES_VERSION)
    expect_equal(fields["sha256"], "features.sha256", FEATURES_HASH)
