"""Policies by name: the package's own, or a file."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from lhopt_fused.policy.base import Policy
from lhopt_fused.policy.file import PolicyFileError, load_policy_file, parse_json, read_bytes
from lhopt_fused.policy.rules import RulePolicy

__all__ = ["builtin_policies", "load_policy"]

_SUFFIXES = (".json", ".safetensors")


def builtin_policies() -> list[str]:
    """Names of the policies that come with the package."""
    folder = resources.files("lhopt_fused.policy") / "builtin"
    names = (Path(entry.name) for entry in folder.iterdir())
    return sorted(name.stem for name in names if name.suffix in _SUFFIXES)


def load_policy(policy: str | os.PathLike[str]) -> Policy:
    """A built-in policy by its name, or the policy in a file.

    Args:
        policy: one of :func:`builtin_policies`, or the path of a policy file (safetensors) or of a
            rule (``.json``).

    Raises:
        PolicyFileError: the file is not a policy; the message names the field and the difference.
        FileNotFoundError: there is neither a built-in nor a file of that name.
    """
    if isinstance(policy, str) and policy in builtin_policies():
        for suffix in _SUFFIXES:
            resource = resources.files("lhopt_fused.policy") / "builtin" / f"{policy}{suffix}"
            if resource.is_file():
                with resources.as_file(resource) as path:
                    return _load_file(path)
    path = Path(policy)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no policy {os.fspath(policy)!r}: the built-in ones are "
            f"{', '.join(builtin_policies())}, and no file has that path"
        )
    return _load_file(path)


def _load_file(path: Path) -> Policy:
    return _load_rule(path) if path.suffix == ".json" else load_policy_file(path)


def _load_rule(path: Path) -> RulePolicy:
    try:
        return RulePolicy.from_json(parse_json(read_bytes(path)))
    except PolicyFileError:
        raise
    except ValueError as error:
        raise PolicyFileError(f"{path}: {error}") from None
