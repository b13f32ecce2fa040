"""The import rules between rooms, and what the built package carries."""

from __future__ import annotations

import ast
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "features": {"types"},
    "layout": {"types", "kernels.formats"},
    "kernels": {"types", "kernels.gradients"},
    "kernels.gradients": set(),
    "kernels.rounding": set(),
    "kernels.formats": {"kernels.rounding"},
    "kernels.reference": {"types", "kernels.gradients", "kernels.rounding", "kernels.formats"},
    "kernels.cpu": {"types", "kernels.formats", "kernels.gradients", "_C"},
    "kernels.triton": {"types", "kernels.formats", "kernels.gradients", "kernels.triton"},
    "placement": {"layout", "kernels.gradients", "_C"},
    "ranks": {"types"},
    "sharding": {"types", "kernels", "kernels.formats", "kernels.gradients", "placement", "ranks"},
    "compiled": set(),
    "optimizer": {
        "types",
        "compiled",
        "features",
        "layout",
        "kernels",
        "kernels.formats",
        "kernels.gradients",
        "numbers",
        "placement",
        "ranks",
        "sharding",
    },
    "release": {"types", "kernels.gradients", "optimizer", "ranks"},
    "offload": {"layout", "optimizer", "ranks"},
    "json_fields": set(),
    "actions": {"types", "json_fields"},
    "cdf": set(),
    "policy": {"types", "actions", "cdf", "json_fields", "_C"},
    "registers": set(),
    "history": {"actions"},
    "numbers": set(),
    "schedules": set(),
    "ciao": {"types", "numbers", "kernels", "optimizer", "ranks"},
    "adamw": {"types", "numbers", "kernels", "optimizer", "ranks"},
    "lhopt": {
        "types",
        "kernels",
        "ciao",
        "compiled",
        "actions",
        "policy",
        "registers",
        "history",
        "ranks",
        "sharding",
    },
    "integrations": {"lhopt", "policy", "history"},
    "demo": {"types", "actions", "adamw", "ciao", "lhopt", "optimizer", "policy", "history"},
    "policy_command": {"actions", "policy"},
    "meta": {
        "types",
        "features",
        "kernels",
        "kernels.gradients",
        "layout",
        "actions",
        "cdf",
        "policy",
        "ciao",
        "adamw",
        "lhopt",
        "demo",
        "stopping",
        "schedules",
    },
    "evaluation": {
        "types",
        "actions",
        "policy",
        "ciao",
        "lhopt",
        "demo",
        "meta",
        "schedules",
        "stopping",
        "__init__",
    },
    "stopping": set(),
    "cli": {
        "demo",
        "history",
        "policy_command",
        "meta",
        "evaluation",
        "stopping",
        "_C",
        "__init__",
    },
    "__init__": {"types", "adamw", "ciao", "lhopt", "offload", "release"},
}
"""Room -> the rooms of the package that it may import at module level or anywhere inside."""

LAZY = {("kernels", "kernels.reference"), ("kernels", "kernels.cpu"), ("kernels", "kernels.triton")}
"""Imports that the one place that chooses a backend does when it is asked for it."""


def modules() -> list[tuple[str, Path]]:
    sources = [("", ROOT / "lhopt_fused"), ("kernels.", ROOT / "kernels")]
    return [
        (prefix + ".".join(path.relative_to(folder).with_suffix("").parts), path)
        for prefix, folder in sources
        for path in sorted(folder.rglob("*.py"))
    ]


def room(module: str) -> str:
    """``kernels.triton_apply`` -> ``kernels.triton``; ``demo.model`` -> ``demo``."""
    if module.startswith("kernels.triton"):
        return "kernels.triton"
    parts = module.split(".")
    if parts[0] == "kernels" and len(parts) > 1 and parts[1] != "__init__":
        return f"kernels.{parts[1]}"
    return parts[0] or "__init__"


def imports(path: Path) -> set[str]:
    """Modules of the package that a source file imports, anywhere in it, without the prefix."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            module = node.module or ""
            submodules = {f"{module}.{alias.name}" for alias in node.names}
            known = {f"lhopt_fused.{name}" for name, _ in modules()} | {"lhopt_fused._C"}
            found |= (submodules & known) or {module}
    inside = {name for name in found if name.split(".")[0] == "lhopt_fused"}
    return {name.removeprefix("lhopt_fused").removeprefix(".") or "__init__" for name in inside}


@pytest.mark.parametrize(("module", "path"), modules(), ids=[name for name, _ in modules()])
def test_imports_go_one_way(module: str, path: Path) -> None:
    own = room(module)
    seen = {room(name) for name in imports(path)}
    lazy = {target for source, target in LAZY if source == own}
    assert seen <= ALLOWED[own] | lazy | {own}


def test_a_forbidden_import_is_seen(tmp_path: Path) -> None:
    bad = tmp_path / "types.py"
    bad.write_text("def f():\n    from lhopt_fused.optimizer import MeasuredOptimizer\n")
    assert {room(name) for name in imports(bad)} == {"optimizer"}


def test_the_extension_has_no_torch_in_it() -> None:
    sources = [*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc").glob("*.cpp")]
    assert sources
    for source in sources:
        assert "#include <torch" not in source.read_text()
        assert "#include <ATen" not in source.read_text()


def test_types_are_shipped() -> None:
    assert resources.files("lhopt_fused").joinpath("py.typed").is_file()
