"""Ways to do an optimizer step: ours, torch's, and those of other packages."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any, Final

import torch

import lhopt_fused
from benchmarks import references
from benchmarks.references import BETAS, EPSILON, WEIGHT_DECAY
from benchmarks.registry import Build, Run, Settings, Shape, Unavailable, Variant

__all__ = ["PEER_PACKAGES", "VARIANTS"]

PEER_TOLERANCE: Final = 2e-5
"""Some packages take bias corrections in float32; 1 - 0.999 is off by 6e-5 of itself there."""
HALF: Final[dict[str, Any]] = {
    "dtype": torch.bfloat16,
    "tolerance": 6 * 2.0**-8,  # a unit in the last place of the largest parameter in each step
    "on_request": ("cpu", "cuda"),
    "on_request_reason": "its parameters are bfloat16",
}
PEER_PACKAGES: Final = ("flashoptim", "pytorch-optimizer", "deepspeed", "heavyball")

Params = list[torch.nn.Parameter]


# ---------------------------------------------------------------------------------------- ours


def _adamw(**keywords: Any) -> Build:
    def build(params: Params, settings: Settings) -> Run:
        optimizer = lhopt_fused.AdamW(
            params,
            settings.lr,
            BETAS,
            EPSILON,
            WEIGHT_DECAY,
            backend=settings.backend,
            capturable=settings.captured,
            **keywords,
        )
        return Run(optimizer.step, optimizer)

    return build


def _lhopt(**keywords: Any) -> Build:
    def build(params: Params, settings: Settings) -> Run:
        optimizer = lhopt_fused.CIAO.lhopt(
            params, lr=settings.lr, backend=settings.backend, **keywords
        )
        return Run(optimizer.step, optimizer)

    return build


def _ours(name: str, label: str, build: Build, **fields: Any) -> Variant:
    adam = {"reference": references.adamw, "features_reference": references.measured_adamw}
    return Variant(name, label, build, ours=True, **{**adam, "peer": "torch-fused", **fields})


def _our_half(
    name: str, label: str, count: int, *, peer: str = "torch-fused-bf16", **keywords: Any
) -> Variant:
    """AdamW with bfloat16 parameters; the gate has seen its features in float32."""
    return _ours(
        name,
        label,
        _adamw(nonfinite="mask", **keywords),
        features_reference=None,
        bytes_per_element=_bytes(count),
        **{**HALF, "peer": peer},
    )


def _our_lhopt(name: str, label: str, *, every: int = 1, trust: str = "exact") -> Variant:
    keywords = {"inner_feature_frequency": every, "trust": trust}
    reference = references.lhopt(**keywords)
    return _ours(
        name,
        label,
        _lhopt(**keywords),
        reference=reference,
        features_reference=reference,
        bytes_per_element=_lhopt_bytes if trust == "exact" else _bytes(32),
        cached_bytes_per_element=32 if trust == "exact" else None,
        period=every,
        peer="torch-clip-fused",
    )


# --------------------------------------------------------------------------------------- torch


def _torch_adamw(*, clips: bool = False, **keywords: Any) -> Build:
    def build(params: Params, settings: Settings) -> Run:
        optimizer = torch.optim.AdamW(
            params,
            settings.lr,
            BETAS,
            EPSILON,
            WEIGHT_DECAY,
            capturable=settings.captured,
            **keywords,
        )

        def clip_and_step() -> None:
            torch.nn.utils.clip_grad_norm_(params, settings.max_norm, foreach=True)
            optimizer.step()

        return Run(clip_and_step if clips else optimizer.step, optimizer)

    return build


# ------------------------------------------------------------------------------ other packages


def _import(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except Exception as error:  # a broken peer must not stop the run
        reason = "not installed" if isinstance(error, ModuleNotFoundError) else repr(error)
        raise Unavailable(f"cannot import {module} of {package}: {reason}") from error


def _flashoptim(*, quantize: bool = False, master_weight_bits: int | None = None) -> Build:
    def build(params: Params, settings: Settings) -> Run:
        flashoptim = _import("flashoptim", "flashoptim")
        optimizer = flashoptim.FlashAdamW(
            params,
            settings.lr,
            BETAS,
            EPSILON,
            WEIGHT_DECAY,
            quantize=quantize,
            compress_state_dict=False,
            master_weight_bits=master_weight_bits,
            fused=params[0].device.type == "cuda",
        )
        return Run(optimizer.step, optimizer)

    return build


def _pytorch_optimizer_lamb(params: Params, settings: Settings) -> Run:
    pytorch_optimizer = _import("pytorch_optimizer", "pytorch-optimizer")
    optimizer = pytorch_optimizer.Lamb(
        params, settings.lr, BETAS, weight_decay=WEIGHT_DECAY, eps=EPSILON
    )
    return Run(optimizer.step, optimizer)


def _deepspeed(params: Params, settings: Settings) -> Run:
    adam = _import("deepspeed.ops.adam", "deepspeed")
    optimizer = adam.DeepSpeedCPUAdam(
        params, settings.lr, betas=BETAS, eps=EPSILON, weight_decay=WEIGHT_DECAY
    )
    return Run(optimizer.step, optimizer)


def _heavyball(params: Params, settings: Settings) -> Run:
    heavyball = _import("heavyball", "heavyball")
    optimizer = heavyball.AdamW(
        params, settings.lr, BETAS, EPSILON, WEIGHT_DECAY, consume_grad=False
    )
    return Run(optimizer.step, optimizer)


# --------------------------------------------------------------------------------------- bytes


def _bytes(count: int) -> Any:
    return lambda shape: count


def _lhopt_bytes(shape: Shape) -> int:
    """Norm 4, moments and statistics 24, apply 16; vectors have no trust ratio: 4 and 28."""
    return 44 if len(shape) > 1 else 32


UNFUSED_ADAMW: Final = 80  # decay 8, m 12, v 20, sqrt 8, two scalings of it 16, apply 16
UNFUSED_FLASHOPTIM: Final = 96  # the same, and both moments divided by their bias corrections
UNFUSED_LAMB: Final = 112  # decay 8, m 20, v 20, update 36, two norms 8, trust ratio 8, apply 12

VARIANTS: Final = (
    _ours(
        "adamw-skip",
        "AdamW, statistics",
        _adamw(),
        bytes_per_element=_bytes(32),
    ),
    _ours(
        "adamw-mask",
        "AdamW, statistics, mask",
        _adamw(nonfinite="mask"),
        bytes_per_element=_bytes(28),
    ),
    _ours(
        "adamw-bare",
        "AdamW, no statistics, mask",
        _adamw(nonfinite="mask", inner_feature_frequency=0),
        features_reference=None,
        bytes_per_element=_bytes(28),
    ),
    _our_lhopt("lhopt-exact", "LHOPT exact, statistics"),
    _our_lhopt("lhopt-exact-every4", "LHOPT exact, every 4th step", every=4),
    _our_lhopt("lhopt-delayed", "LHOPT delayed, statistics", trust="delayed"),
    _our_half("adamw-bf16", "AdamW bf16, statistics, mask", 22),
    _our_half(
        "adamw-bf16-stochastic", "AdamW bf16, stochastic rounding", 22, rounding="stochastic"
    ),
    _our_half("adamw-bf16-master", "AdamW bf16, fp32 master weights", 28, master_weights=True),
    _our_half("adamw-bf16-moments", "AdamW bf16, bf16 moments", 14, moments="bfloat16"),
    _our_half("adamw-bf16-int8", "AdamW bf16, int8 moments", 10, moments="int8"),
    _our_half(
        "adamw-bf16-int8-split8",
        "AdamW bf16, int8 moments, 8 bits of masters",
        12,
        peer="flashoptim-adamw-int8",
        moments="int8",
        master_weights="split8",
    ),
    Variant(
        "torch-fused-bf16",
        "torch AdamW fused, bf16",
        _torch_adamw(fused=True),
        references.adamw,
        _bytes(14),
        peer="torch-fused-bf16",
        **HALF,
    ),
    Variant(
        "torch-clip-fused",
        "torch clip + AdamW fused",
        _torch_adamw(fused=True, clips=True),
        partial(references.adamw, clips=True),
        _bytes(40),
        peer="torch-clip-fused",
    ),
    Variant(
        "torch-fused",
        "torch AdamW fused",
        _torch_adamw(fused=True),
        references.adamw,
        _bytes(28),
        peer="torch-fused",
    ),
    Variant(
        "torch-foreach",
        "torch AdamW foreach",
        _torch_adamw(foreach=True),
        references.adamw,
        _bytes(UNFUSED_ADAMW),
        peer="torch-fused",
    ),
    Variant(
        "torch-loop",
        "torch AdamW for-loop",
        _torch_adamw(foreach=False, fused=False),
        references.adamw,
        _bytes(UNFUSED_ADAMW),
        peer="torch-fused",
    ),
    Variant(
        "flashoptim-adamw",
        "flashoptim AdamW",
        _flashoptim(),
        references.adamw,
        _bytes(28),
        peer="torch-fused",
        tolerance=PEER_TOLERANCE,
        devices=("cuda",),
        capturable=False,
    ),
    Variant(
        "flashoptim-adamw-int8",
        "flashoptim AdamW bf16, int8 moments, 8 bits of masters",
        _flashoptim(quantize=True, master_weight_bits=24),
        references.adamw,
        _bytes(12),
        peer="flashoptim-adamw-int8",
        devices=("cuda",),
        capturable=False,
        **HALF,
    ),
    Variant(
        "flashoptim-adamw-unfused",
        "flashoptim AdamW unfused",
        _flashoptim(),
        references.adamw,
        _bytes(UNFUSED_FLASHOPTIM),
        peer="torch-fused",
        tolerance=PEER_TOLERANCE,
        devices=("cpu",),
    ),
    Variant(
        "pytorch-optimizer-lamb",
        "pytorch-optimizer Lamb",
        _pytorch_optimizer_lamb,
        references.lamb,
        _bytes(UNFUSED_LAMB),
        peer="torch-fused",
        tolerance=PEER_TOLERANCE,
        capturable=False,
    ),
    Variant(
        "deepspeed-cpu-adam",
        "DeepSpeed CPUAdam",
        _deepspeed,
        references.adamw,
        _bytes(28),
        peer="torch-fused",
        tolerance=PEER_TOLERANCE,
        devices=("cpu",),
    ),
    Variant(
        "heavyball-adamw",
        "HeavyBall AdamW",
        _heavyball,
        references.clamped_adamw,
        _bytes(28),
        peer="torch-fused",
        tolerance=PEER_TOLERANCE,
        capturable=False,
        on_request=("cpu",),
        on_request_reason="compiles for a minute or more on every list of tensors",
    ),
)
