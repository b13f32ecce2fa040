"""Policy files taken apart, and sealed again with a right checksum whatever they hold.

Written from the format, not with the package's own writer.
"""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import numpy as np
import safetensors.numpy

DTYPES = {"F16": np.float16, "F32": np.float32, "F64": np.float64}


def parts(data: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The policy's header without its checksum, and the tensors."""
    (size,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + size])
    header = json.loads(table.pop("__metadata__")["lhopt_policy"])
    del header["sha256"]
    return header, safetensors.numpy.load(data)


def seal(header: dict[str, Any] | str | None, weights: dict[str, np.ndarray]) -> bytes:
    """A safetensors file; a header that is text goes in as it is, None leaves it out."""
    if header is None:
        return safetensors.numpy.save(weights)
    if not isinstance(header, str):
        header = {**header, "sha256": checksum(header, weights)}
        header = json.dumps(header)
    return safetensors.numpy.save(weights, {"lhopt_policy": header})


def checksum(header: dict[str, Any], weights: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True, separators=(",", ":")).encode())
    for name in sorted(weights):
        digest.update(f"\n{name} {list(weights[name].shape)}\n".encode())
        digest.update(weights[name].tobytes())
    return digest.hexdigest()
