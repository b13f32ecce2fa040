"""From param groups to a :class:`StepLayout`: what is refused, laid out dense and allocated.

Everything is checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lhopt_fused.kernels.formats import (
    CORRECTIONS,
    QUANTISED,
    correction_of,
    decode,
    encode,
    join_master,
    scales_shape,
    takes_blocks,
)
from lhopt_fused.types import (
    GROUP_STATE,
    SCALARS,
    TENSOR_STATE,
    MasterWeights,
    Moments,
    Rounding,
    StepLayout,
    StepOptions,
)

__all__ = [
    "DenseViews",
    "bind_layout",
    "check_params",
    "check_split",
    "check_storage",
    "same_memory_order",
]

_HALVES = (torch.float16, torch.bfloat16)
_DTYPES = (*_HALVES, torch.float32, torch.float64)


def check_storage(
    rounding: object, rounding_seed: object, master_weights: object, moments: object
) -> None:
    """Refuse settings of how numbers are kept that no layout can mean.

    Raises:
        ValueError: a setting of another kind, or stochastic rounding where nothing is rounded.
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be one of {get_args(Rounding)}, got {rounding!r}")
    if isinstance(rounding_seed, bool) or not isinstance(rounding_seed, int):
        raise ValueError(f"rounding_seed must be an integer, got {rounding_seed!r}")
    if not isinstance(master_weights, bool) and master_weights not in CORRECTIONS:
        raise ValueError(
            f"master_weights must be True, False or one of {(*CORRECTIONS,)}, got "
            f"{master_weights!r}"
        )
    if moments not in get_args(Moments):
        raise ValueError(f"moments must be one of {get_args(Moments)}, got {moments!r}")
    if master_weights and rounding == "stochastic":
        raise ValueError(
            f"master_weights={master_weights!r} keeps what rounding loses, so that "
            "rounding='stochastic' has nothing to do; choose one of them"
        )


def check_params(params: Sequence[torch.Tensor], where: str) -> None:
    """Refuse parameters that no backend can step.

    Raises:
        TypeError: a parameter is complex, integral or sparse.
        ValueError: a parameter overlaps itself (an expanded view), or shares memory with another.
    """
    for index, p in enumerate(params):
        name = f"{where}['params'][{index}]"
        if is_traceable_wrapper_subclass(p):
            raise TypeError(
                f"{name} is a {type(p).__name__}, which wraps other tensors; pass plain tensors"
            )
        if p.layout is not torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {p.layout}")
        if p.dtype not in _DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, got {p.dtype}; "
                "leave it out of the optimizer, or view complex parameters as real"
            )
        if _overlaps_itself(p):
            raise ValueError(
                f"{name} of shape {tuple(p.shape)} and strides {p.stride()} has elements that "
                "share memory; make it contiguous before you pass it to the optimizer"
            )


def check_split(params: Sequence[torch.Tensor], master_weights: MasterWeights, where: str) -> None:
    """Refuse parameters whose masters cannot be split.

    Raises:
        TypeError: a float16 parameter, of which there is no such master.
    """
    if isinstance(master_weights, bool):
        return
    for index, p in enumerate(params):
        if p.dtype == torch.float16:
            raise TypeError(
                f"{where}['params'][{index}] is float16, whose range is not that of float32; "
                f"master_weights={master_weights!r} takes bfloat16: use master_weights=True"
            )


def check_disjoint(params: Sequence[torch.Tensor]) -> None:
    """Refuse parameters that share memory with one another (a view of a parameter, say).

    Raises:
        ValueError: naming the two positions, counted over all groups.
    """
    spans = []
    for index, p in enumerate(params):
        if p.numel() and p.device.type != "meta":
            last = sum(
                (size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True)
            )
            spans.append((p.device.index or 0, p.data_ptr(), last * p.element_size(), index))
    spans.sort()
    for (device, start, length, i), (other_device, other_start, _, j) in pairwise(spans):
        if (
            device == other_device
            and other_start <= start + length
            and _share(params[i], params[j])
        ):
            raise ValueError(
                f"parameters {i} and {j} share memory; pass each parameter to the optimizer once"
            )


def _share(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors whose address ranges meet have a byte in common."""
    if _is_dense(x) and _is_dense(y):
        return True
    base = min(x.data_ptr(), y.data_ptr())
    first, second = (_byte_addresses(t) - base for t in (x, y))
    return bool(torch.isin(first, second).any())


def _byte_addresses(x: torch.Tensor) -> torch.Tensor:
    addresses = torch.tensor(x.data_ptr())
    for size, stride in zip(x.shape, x.stride(), strict=True):
        addresses = addresses[..., None] + torch.arange(size) * stride * x.element_size()
    return (addresses[..., None] + torch.arange(x.element_size())).flatten()


def _overlaps_itself(x: torch.Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return x.numel() > 0
            reach += stride * (size - 1)
    return False


def _is_dense(x: torch.Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order of dimensions."""
    if x.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_memory_order(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two dense tensors of one shape keep corresponding elements at equal positions."""
    if x.stride() == y.stride() or (x.is_contiguous() and y.is_contiguous()):
        return True
    return all(
        size <= 1 or s == t for size, s, t in zip(x.shape, x.stride(), y.stride(), strict=True)
    )


class DenseViews:
    """Dense stand-ins for parameters and gradients that a backend cannot address as they are.

    A parameter with gaps between its elements is stepped in a dense buffer and written back; a
    gradient in another memory order than its parameter is copied into the parameter's. Both are
    rare; buffers are kept from step to step.
    """

    def __init__(self, params: Sequence[torch.Tensor]) -> None:
        self.params = [p.detach() if _is_dense(p) else torch.empty_like(p) for p in params]
        self._gapped = [
            (p, dense) for p, dense in zip(params, self.params, strict=True) if not _is_dense(p)
        ]
        self._grads: dict[int, torch.Tensor] = {}

    def load(self) -> None:
        """Copy parameters with gaps into their buffers."""
        for param, dense in self._gapped:
            dense.copy_(param)

    def store(self) -> None:
        """Copy the stepped buffers back."""
        for param, dense in self._gapped:
            param.copy_(dense)

    def grad(self, index: int, grad: torch.Tensor) -> torch.Tensor:
        """``grad`` in the memory order of parameter ``index``."""
        param = self.params[index]
        if _is_dense(grad) and same_memory_order(grad, param):
            return grad
        dense = self._grads.get(index)
        if dense is None or dense.dtype != grad.dtype:
            dense = self._grads[index] = torch.empty_like(param, dtype=grad.dtype)
        return dense.copy_(grad)


def check_grad(index: int, param: torch.Tensor, grad: torch.Tensor) -> None:
    """Refuse a gradient that does not fit its parameter.

    Raises:
        TypeError: the gradient is sparse, complex or integral.
        ValueError: it has another shape or device.
    """
    what = f"the gradient of parameter {index} (shape {tuple(param.shape)})"
    if grad.layout is not torch.strided:
        raise TypeError(
            f"{what} has layout {grad.layout}, but must be dense; for embeddings set sparse=False"
        )
    if grad.dtype not in _DTYPES or (grad.dtype == torch.float64) != (param.dtype == torch.float64):
        raise TypeError(
            f"{what} is {grad.dtype}, but its parameter is {param.dtype}; cast the gradient first"
        )
    if grad.shape != param.shape:
        raise ValueError(f"{what} has shape {tuple(grad.shape)}; they must be equal")
    if grad.device != param.device:
        raise ValueError(f"{what} is on {grad.device}, its parameter on {param.device}")


def bind_layout(
    params: Sequence[torch.Tensor],
    dense_params: list[torch.Tensor],
    states: Sequence[dict[str, Any]],
    group_of: list[int],
    groups: Sequence[dict[str, Any]],
    options: list[StepOptions],
    *,
    keep_grad_signs: bool,
    masks_nonfinite: bool,
    rounding: Rounding,
    rounding_seed: int,
    master_weights: MasterWeights,
    moments: Moments = "float32",
    whole_shapes: Sequence[torch.Size] | None = None,
) -> StepLayout:
    """Allocate what is missing in ``states`` and ``groups`` and bind all of it into one layout.

    The scalars of a tensor's state become 0-dim float64 views into ``layout.tensor_state``, those
    of a group a view into ``layout.group_state``; values that are there already are kept, whatever
    tensor they were in. Moments and masters that are kept otherwise than is wanted are converted.

    Args:
        params: T tensors to be stepped, or pieces of them.
        dense_params: their stand-ins, see :class:`DenseViews`.
        states: what is kept of each.
        group_of: index of each one's group.
        groups: what is kept of each group.
        options: of each group.
        keep_grad_signs, masks_nonfinite, rounding, rounding_seed, master_weights, moments: as
            for :class:`~lhopt_fused.CIAO` and :class:`StepLayout`.
        whole_shapes: of the whole tensors, where ``params`` are pieces of them.

    Raises:
        ValueError: parameters on more than one device, or state of another shape.
    """
    devices = {p.device for p in params}
    if len(devices) != 1:
        raise ValueError(
            "all parameters of one optimizer must be on one device, got "
            f"{sorted(map(str, devices))}; make one optimizer per device"
        )
    (device,) = devices

    def table(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    shapes = [p.shape for p in params] if whole_shapes is None else whole_shapes
    for state, param, shape in zip(states, dense_params, shapes, strict=True):
        for name in QUANTISED:
            _bind_moment(state, name, param, _moment_dtype(name, param.dtype, shape, moments))
    masters = [
        _bind_master(*of, master_weights) for of in zip(states, dense_params, params, strict=True)
    ]
    layout = StepLayout(
        params=dense_params,
        exp_avgs=[state["exp_avg"] for state in states],
        exp_avg_sqs=[state["exp_avg_sq"] for state in states],
        grad_signs=(
            [_signs(s, p) for s, p in zip(states, dense_params, strict=True)]
            if keep_grad_signs
            else None
        ),
        group_of=group_of,
        is_vector=[p.dim() <= 1 for p in params],
        options=options,
        run_of=[0] * len(groups),
        scalars=table(len(groups), len(SCALARS)),
        group_state=table(len(groups), len(GROUP_STATE)),
        tensor_state=table(len(params), len(TENSOR_STATE)),
        skipped_steps=torch.zeros(1, dtype=torch.int64, device=device),
        masks_nonfinite=masks_nonfinite,
        master_params=masters if master_weights is True else None,
        master_corrections=masters if master_weights in CORRECTIONS else None,
        exp_avg_scales=_column(states, "exp_avg_scale"),
        exp_avg_sq_scales=_column(states, "exp_avg_sq_scale"),
        rounding=rounding,
        rounding_seed=rounding_seed,
        whole_numel=[shape.numel() for shape in shapes],
    )
    values = [[float(s.get(name, 0.0)) for name in TENSOR_STATE] for s in states]
    layout.tensor_state.copy_(torch.tensor(values, dtype=torch.float64))
    for state, row in zip(states, layout.tensor_state, strict=True):
        state.update(zip(TENSOR_STATE, row, strict=True))
    for group, row in zip(groups, layout.group_state, strict=True):
        if group.get("clip_state") is not None:
            row.copy_(group["clip_state"])
        group["clip_state"] = row
    return layout


def _column(states: Sequence[dict[str, Any]], name: str) -> list[torch.Tensor | None] | None:
    """State ``name`` of each tensor, None where none has it."""
    column = [state.get(name) for state in states]
    return column if any(value is not None for value in column) else None


def _moment_dtype(
    name: str, param_dtype: torch.dtype, whole_shape: torch.Size, moments: Moments
) -> torch.dtype:
    """What the moment ``name`` of a tensor is kept in."""
    if param_dtype == torch.float64:
        return torch.float64
    if moments == "bfloat16":
        return torch.bfloat16
    return QUANTISED[name] if moments == "int8" and takes_blocks(whole_shape) else torch.float32


def _bind_moment(state: dict[str, Any], name: str, param: torch.Tensor, dtype: torch.dtype) -> None:
    """See that the moment ``name`` of one tensor is there, and as it is to be kept.

    Raises:
        ValueError: it has another shape than the parameter, or its scales do not fit it.
    """
    is_quantised = dtype in QUANTISED.values()
    if state.get(name) is None:
        state[name] = torch.zeros_like(param, dtype=dtype)
        if is_quantised:
            state[f"{name}_scale"] = torch.zeros(
                scales_shape(param.shape), dtype=torch.bfloat16, device=param.device
            )
        return
    held, scales = state[name], state.pop(f"{name}_scale", None)
    if held.dtype in QUANTISED.values():
        _check_scales(name, held, scales)
    if held.dtype == dtype and (not is_quantised or same_memory_order(held, param)):
        _beside(state, name, param, dtype)
    else:
        kept_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        state[name] = decode(held if _is_dense(held) else held.contiguous(), scales)
        state[name], scales = encode(_beside(state, name, param, kept_dtype), dtype)
    if is_quantised:
        shape = scales_shape(param.shape)
        state[f"{name}_scale"] = scales.to(param.device).reshape(shape).contiguous()


def _check_scales(name: str, codes: torch.Tensor, scales: torch.Tensor | None) -> None:
    expected = scales_shape(codes.shape)
    if scales is None or scales.shape != expected or scales.dtype != torch.bfloat16:
        found = "missing" if scales is None else f"{scales.dtype} {tuple(scales.shape)}"
        raise ValueError(
            f"state {name!r} has codes of 8 bits, and its scales, {name + '_scale'!r}, are "
            f"{found}; expected bfloat16 {expected}: load the state dict as it was saved"
        )


def _bind_master(
    state: dict[str, Any], param: torch.Tensor, start: torch.Tensor, kind: MasterWeights
) -> torch.Tensor | None:
    """What a 16-bit parameter, which begins as ``start``, keeps beside itself; None for nothing.

    What is there of another kind is converted; what is not wanted, and would not be kept up to
    date, is dropped.
    """
    master, correction = state.pop("master_param", None), state.pop("master_correction", None)
    if param.dtype not in _HALVES or kind is False:
        return None
    if kind is True:
        if master is None and correction is not None:
            master = join_master(start, correction)
        state["master_param"] = start.detach().float() if master is None else master
        return _beside(state, "master_param", param, torch.float32)
    dtype = CORRECTIONS[str(kind)]
    if correction is None or correction.dtype != dtype:
        if correction is not None:
            master = join_master(start, correction)
        master = start.detach().float() if master is None else master
        correction = correction_of(master, start, dtype)
    state["master_correction"] = correction
    return _beside(state, "master_correction", param, dtype)


def _beside(
    state: dict[str, Any], name: str, param: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """State ``name`` in the memory order of ``param``, on its device; a copy where it was not.

    Raises:
        ValueError: it has another shape than the parameter.
    """
    value: torch.Tensor = state[name]
    if value.shape != param.shape:
        raise ValueError(
            f"state {name!r} has shape {tuple(value.shape)}, its parameter {tuple(param.shape)}; "
            "was the state dict saved from another model?"
        )
    if not (
        value.dtype == dtype
        and value.device == param.device
        and _is_dense(value)
        and same_memory_order(value, param)
    ):
        state[name] = value = torch.empty_like(param, dtype=dtype).copy_(value)
    return value


def _signs(state: dict[str, Any], param: torch.Tensor) -> torch.Tensor:
    """The packed signs of the last gradient, one bit per element."""
    signs = state.get("grad_signs")
    size = (param.numel() + 7) // 8
    if signs is None:
        signs = torch.zeros(size, dtype=torch.uint8, device=param.device)
    elif signs.shape != (size,):
        raise ValueError(
            f"state 'grad_signs' has shape {tuple(signs.shape)}, expected ({size},) for a "
            f"parameter of shape {tuple(param.shape)}"
        )
    signs = signs.to(device=param.device, dtype=torch.uint8)
    state["grad_signs"] = signs
    return signs
