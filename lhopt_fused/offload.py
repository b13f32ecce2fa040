"""Training state in host memory: an optimizer that steps there what is trained on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lhopt_fused.layout import check_disjoint, check_grad, check_params
from lhopt_fused.optimizer import MeasuredOptimizer, listed
from lhopt_fused.ranks import is_sharded

__all__ = ["HostOffload"]

_ALONE: Final = (
    "ranks average their gradients after they have been accumulated, so that they cannot be copied "
    "at that moment; let FSDP2 keep shards in host memory "
    "(fully_shard(model, offload_policy=CPUOffloadPolicy())), which every optimizer here steps, or "
    "pass process_group=None on a single rank"
)


class HostOffload(Optimizer):
    """Keeps the state of an optimizer in host memory, and does its steps there.

    Beside the model a GPU holds its gradients; copies of both, moments and masters are in host
    memory (pinned), where the ``cpu`` backend steps them. A gradient is copied as soon as the
    backward pass has accumulated it, and parameters go back without anything waiting for them but
    the next kernel that is launched::

        optimizer = HostOffload(model.parameters(), lambda params: LHOPT(params, total_steps=N))

    A training loop does with it what it does with that optimizer.

    Every element, statistic, decision and checkpoint is that of the same optimizer without this:
    a step takes parameters and gradients as they are when it is called, however many backward
    passes have gone into them; what has changed since it was copied is copied again. Changes are
    seen by the version counters of autograd: where gradients are changed by something that does not
    count (``param.grad.data``, a kernel of one's own), pass ``in_backward=False``.

    If the optimizer has a :class:`GradientRelease`, which can be made in ``build``, a bucket is
    stepped while later gradients come and parameters of earlier ones go back; else a step begins
    when all gradients are there. Parameters in host memory are stepped by the same rules.

    Args:
        params: parameters or param groups, all on one CUDA device or all on the CPU.
        build: makes the optimizer (:class:`AdamW`, :class:`CIAO` or :class:`LHOPT`) of param groups
            with the copies; whatever it is to do is said there.
        in_backward: copy gradients during the backward pass; False copies them in ``step()``.

    Attributes:
        optimizer: that optimizer; its history, statistics and so on are to be found there.

    Raises:
        TypeError: ``build`` makes something else, or a parameter cannot be stepped.
        ValueError: parameters overlap, are on other devices than these or on more than one, or
            several ranks train the model.
    """

    # GradScaler leaves no trace on gradients; like this, it says in step() what it has done
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: ParamsT,
        build: Callable[[list[dict[str, Any]]], MeasuredOptimizer],
        *,
        in_backward: bool = True,
    ) -> None:
        self._copies: dict[torch.Tensor, _Copy] = {}
        self._arriving: dict[_Copy, None] = {}  # in this order
        self._hooks: list[Any] = []
        self._stream: torch.cuda.Stream | None = None
        groups, hosted = _groups(params), []
        for group in groups:
            on_host, copies = self._on_host(group)
            hosted.append(on_host)
            self._copies |= copies
        self.optimizer = build(hosted)
        if not isinstance(self.optimizer, MeasuredOptimizer):
            raise TypeError(
                f"build must make an optimizer of lhopt_fused, got {type(self.optimizer).__name__}"
            )
        if self.optimizer._met_ranks() is not None:
            raise ValueError(_ALONE)
        for name in ("eval_fn", "callback"):  # which look at the model
            function = getattr(self.optimizer, name, None)
            if function is not None:
                setattr(self.optimizer, name, self._after_sending(function))
        super().__init__(groups, self.optimizer.defaults)
        self._show()
        self._in_backward = in_backward
        self._hook()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`MeasuredOptimizer.add_param_group`."""
        if len(self.param_groups) < len(self.optimizer.param_groups):
            super().add_param_group(param_group)  # at first, the optimizer has them all
            return
        (group,) = _groups([param_group])
        hosted, copies = self._on_host(group)
        self._say()
        self.optimizer.add_param_group(hosted)
        self._copies |= copies
        super().add_param_group(group)
        self._show()
        self._hook()

    def _on_host(self, group: dict[str, Any]) -> tuple[dict[str, Any], dict[torch.Tensor, _Copy]]:
        """``group`` with copies in place of its parameters, and these copies."""
        params = [p[1] if isinstance(p, tuple) else p for p in group["params"]]
        if not all(isinstance(p, torch.Tensor) for p in params):
            return group, {}  # torch says what is wrong
        if any(map(is_sharded, params)):
            raise ValueError(_ALONE)
        check_params(params, "param_groups")
        check_disjoint([*self._copies, *params])
        devices = {p.device for p in (*self._copies, *params)}
        if len(devices) > 1 or any(device.type not in ("cuda", "cpu") for device in devices):
            raise ValueError(
                "all parameters must be on one CUDA device, or all on the CPU; got "
                f"{sorted(map(str, devices))}"
            )
        if self._stream is None and any(device.type == "cuda" for device in devices):
            self._stream = torch.cuda.Stream(*devices)  # type: ignore[no-untyped-call]
        copies = {param: _Copy(param, self._stream) for param in params}
        hosts = [
            (p[0], copies[p[1]].host) if isinstance(p, tuple) else copies[p].host
            for p in group["params"]
        ]
        return {**group, "params": hosts}, copies

    def _hook(self) -> None:
        """Copy gradients during the backward pass from now on."""
        self.remove()
        if self._in_backward:
            self._hooks = [
                param.register_post_accumulate_grad_hook(self._fetch_early)  # type: ignore[no-untyped-call]
                for param in self._copies
                if param.requires_grad
            ]

    def remove(self) -> None:
        """Copy nothing during the backward pass from now on: another optimizer takes over."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    # ------------------------------------------------------------------ step

    @_disable_dynamo
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """As :meth:`MeasuredOptimizer.step`; returns when the parameters are on their way back.

        Raises:
            ValueError: as there, or a parameter has been moved or cast since this was made, or
                ``GradScaler`` has scaled float16 gradients.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            try:
                self._step(None if closure is None else lambda: loss)
            finally:  # a policy may refuse to decide when the step has been done
                self._send(self._copies.values())
                self._show()
                self._forget()
        return loss

    def _step(self, closure: Any) -> None:
        self._say()
        found, scale = (getattr(self, name, None) for name in ("found_inf", "grad_scale"))
        if found is not None and bool(found):
            return  # GradScaler's business
        factor = None if scale is None else scale.double().reciprocal().float().cpu()
        has_changed = found is not None and scale is None  # GradScaler has unscaled them
        for index, copy in enumerate(self._copies.values()):
            copy.fetch_param(index)
            grad = copy.param.grad
            if grad is not None and (has_changed or not copy.has_come(grad)):
                check_grad(index, copy.param, grad)
                self._fetch(copy, grad)
            if factor is not None and grad is not None and grad.dtype == torch.float16:
                raise ValueError(
                    f"the gradient of parameter {index} is float16, which has no room for what "
                    "GradScaler takes out of it; keep parameters in float32 and use autocast, or "
                    "take bfloat16, which needs no GradScaler"
                )
        release, landed = self.optimizer._release, []
        for copy in self._arriving:
            if copy.param.grad is None:
                continue
            copy.land(factor)
            landed.append(copy)
            if release is not None:
                release.take(copy.host)
                if copy.host.grad is None:  # that was a bucket
                    self._send(landed)
                    landed = []
        self.optimizer.step(closure)

    @_disable_dynamo
    @torch.no_grad()
    def _fetch_early(self, param: torch.Tensor) -> None:
        """A gradient has been accumulated."""
        grad = param.grad
        assert grad is not None
        is_captured = self._stream is not None and torch.cuda.is_current_stream_capturing()
        if grad.layout is torch.strided and not is_captured:
            self._fetch(self._copies[param], grad)

    def _fetch(self, copy: _Copy, grad: torch.Tensor) -> None:
        copy.fetch_grad(grad)
        self._arriving.pop(copy, None)
        self._arriving[copy] = None

    def _send(self, copies: Iterable[_Copy]) -> None:
        """Begin to copy the parameters back that have been written to."""
        with _later(self._stream):
            for copy in copies:
                if copy.is_ahead:
                    copy.send()
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _after_sending(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            self._send(self._copies.values())
            return function(*arguments)

        return call

    def _forget(self) -> None:
        self._arriving.clear()
        for copy in self._copies.values():
            copy.forget()

    @_disable_dynamo
    def zero_grad(self, set_to_none: bool = True) -> None:
        """As :meth:`torch.optim.Optimizer.zero_grad`."""
        super().zero_grad(set_to_none)
        self._forget()

    def observe(self, train_loss: Any = None, eval_loss: Any = None) -> None:
        """As :meth:`LHOPT.observe`; waits for losses that are on a GPU.

        Raises:
            TypeError: there is no LHOPT here, or a loss is no number.
        """
        observe = getattr(self.optimizer, "observe", None)
        if observe is None:
            raise TypeError(
                f"{type(self.optimizer).__name__} has no policy that could look at losses; let "
                "build make an LHOPT, or leave observe() out"
            )
        observe(train_loss, eval_loss)

    # ------------------------------------------------------------------ groups, state, saving

    def _say(self) -> None:
        """Let the optimizer have the hyperparameters that are here."""
        for mine, its in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            its.update({name: value for name, value in mine.items() if name != "params"})

    def _show(self) -> None:
        """Show the optimizer's hyperparameters and state here."""
        for mine, its in zip(self.param_groups, self.optimizer.param_groups, strict=True):
            mine.update({name: value for name, value in its.items() if name != "params"})
        state = self.optimizer.state
        self.state.update(
            {p: state[copy.host] for p, copy in self._copies.items() if copy.host in state}
        )

    def state_dict(self) -> dict[str, Any]:
        """That of the optimizer, which one without this loads, and the other way round."""
        self._say()
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`MeasuredOptimizer.load_state_dict`."""
        self.optimizer.load_state_dict(state_dict)
        self._show()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a HostOffload belongs to its parameters and cannot be copied or pickled; make another "
            "one and load its state_dict()"
        )


class _Copy:
    """A parameter's copy in host memory, and what goes between the two.

    It goes through one stream, so that what begins later is done later; without a stream, where the
    parameter is in host memory itself, it is done at once.
    """

    def __init__(self, param: torch.Tensor, stream: torch.cuda.Stream | None) -> None:
        self.param, self._stream = param, stream
        self.host = torch.nn.Parameter(_host_like(param), requires_grad=param.requires_grad)
        self._kind = param.device, param.dtype, param.shape
        self._grad: torch.Tensor | None = None
        self._source: tuple[torch.Tensor, int] | None = None  # a gradient, and its version
        self._arrival: torch.cuda.Event | None = None
        self._is_stepped = False
        self._param_seen: tuple[int, int] | None = None
        self._host_version = 0
        with torch.no_grad():
            self.fetch_param(0)

    def fetch_param(self, index: int) -> None:
        """Copy the parameter where someone else has written to it, and wait for it."""
        param = self.param
        if (param.device, param.dtype, param.shape) != self._kind:
            raise ValueError(
                f"parameter {index} was {self._kind}, and is now on {param.device} with dtype "
                f"{param.dtype} and shape {tuple(param.shape)}; move and cast the model before you "
                "make its HostOffload"
            )
        self.host.requires_grad_(param.requires_grad)
        if (param.data_ptr(), param._version) != self._param_seen:
            with _later(self._stream):
                self.host.copy_(param)
            self._note()

    def has_come(self, grad: torch.Tensor) -> bool:
        """Whether ``grad`` has been fetched as it is now."""
        return (
            self._source is not None
            and self._source[0] is grad
            and self._source[1] == grad._version
        )

    def fetch_grad(self, grad: torch.Tensor) -> None:
        """Begin to copy a gradient."""
        if self._grad is None or (self._grad.dtype, self._grad.shape) != (grad.dtype, grad.shape):
            self._grad = _host_like(grad)
        with _later(self._stream):
            self._grad.copy_(grad, non_blocking=True)
        if self._stream is not None:
            grad.record_stream(self._stream)
            self._arrival = self._stream.record_event(self._arrival)
        self._source = grad, grad._version

    def land(self, factor: torch.Tensor | None) -> None:
        """Wait for the gradient and let the copy have it, multiplied by ``factor``.

        What the parameter got before that gradient has arrived then, too: the copy may be written.
        """
        if self._arrival is not None:
            self._arrival.synchronize()
        grad = self._grad
        assert grad is not None
        if factor is not None:
            grad.mul_(factor)
        if grad.dtype != self.host.dtype:
            self.host.grad_dtype = None
        self.host.grad = grad
        self._is_stepped = True

    @property
    def is_ahead(self) -> bool:
        """Whether the copy may have been written to since it was sent."""
        return self._is_stepped or self.host._version != self._host_version

    def send(self) -> None:
        """Copy it back, in the current stream, and do not wait for that."""
        self.param.copy_(self.host, non_blocking=True)
        self._is_stepped = False
        self._note()

    def forget(self) -> None:
        """Drop the gradient."""
        self.host.grad = self._source = None

    def _note(self) -> None:
        """Both are the same now, or will be."""
        self._param_seen = self.param.data_ptr(), self.param._version
        self._host_version = self.host._version


def _later(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    """Do what follows in ``stream``, after what the device has been told to do so far."""
    if stream is None:
        return nullcontext()
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    return torch.cuda.stream(stream)


def _host_like(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)


def _groups(params: ParamsT) -> list[dict[str, Any]]:
    """Param groups, each with a list of its parameters."""
    if isinstance(params, torch.Tensor):
        raise TypeError("params must be parameters or param groups in a list, got one tensor")
    entries: list[Any] = list(params)
    if not all(isinstance(entry, dict) for entry in entries):
        entries = [{"params": entries}]
    return [{**group, "params": listed(group["params"])} for group in entries]
