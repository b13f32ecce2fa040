"""Gradient release: gradients are stepped and freed while the backward pass goes on."""

from __future__ import annotations

from typing import Any

import torch

from lhopt_fused.kernels.gradients import Grads
from lhopt_fused.optimizer import MeasuredOptimizer
from lhopt_fused.ranks import is_sharded
from lhopt_fused.types import Clip

__all__ = ["GradientRelease"]


class GradientRelease:
    """Lets an optimizer step parameters as soon as their gradients are there, and free these.

    Gradients never exist all at once: they are gathered in buckets, each of which is one fused step
    over its tensors. ``optimizer.step()`` after the backward pass steps what is left, completes the
    statistics and lets a policy decide; every element, statistic and decision is that of the
    ordinary step::

        optimizer = AdamW(model.parameters(), nonfinite="mask")
        GradientRelease(optimizer)
        for batch in batches:
            model(batch).backward()
            optimizer.step()

    Whatever needs all gradients before the first is stepped is refused: clipping by a norm, leaving
    out whole steps (``nonfinite="skip"`` and ``"raise"``), several backward passes a step,
    ``GradScaler``, and ranks, which average gradients after they have been accumulated.

    Args:
        optimizer: an :class:`AdamW`, :class:`CIAO` or :class:`LHOPT`.
        bucket_bytes: bytes of gradients to gather before they are stepped, >= 1: the larger, the
            fewer calls. What is held is less than this and one more gradient.

    Raises:
        ValueError: the settings do not allow it, or ``bucket_bytes`` is no such number.
        TypeError: another optimizer.
    """

    def __init__(self, optimizer: MeasuredOptimizer, bucket_bytes: int = 2**25) -> None:
        if not isinstance(optimizer, MeasuredOptimizer):
            raise TypeError(
                "gradient release is for the optimizers of lhopt_fused, got "
                f"{type(optimizer).__name__}"
            )
        if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be a number of bytes >= 1, got {bucket_bytes!r}")
        self._optimizer = optimizer
        self._bucket_bytes = bucket_bytes
        self._is_open = False
        self._bucket: list[torch.Tensor] = []
        self._held = 0
        self._stepped: set[int] = set()
        self._statistics: torch.Tensor | None = None
        optimizer._read_groups()
        self._check_settings()
        self._params = [p for p in optimizer._all_params() if p.requires_grad]
        self._hooks = [
            p.register_post_accumulate_grad_hook(self.take)  # type: ignore[no-untyped-call]
            for p in self._params
        ]
        optimizer._release = self
        # so that torch's GradScaler calls step(), which can say what is wrong
        optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Take the ordinary step again from now on."""
        for hook in self._hooks:
            hook.remove()
        self._optimizer._release = None
        del self._optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]

    def _check_settings(self) -> None:
        optimizer = self._optimizer
        if any(options.clip is not Clip.NONE for options in optimizer._group_options):
            raise ValueError(
                "clipping by the norm of all gradients needs all of them at once, which gradient "
                "release never has: set group_clip_grad_norm and group_clip_grad_z_score to None"
            )
        if (nonfinite := optimizer._settings["nonfinite"]) != "mask":
            raise ValueError(
                f"nonfinite={nonfinite!r} looks at all gradients before the step, which gradient "
                'release never has at once; pass nonfinite="mask"'
            )
        if any(map(is_sharded, optimizer._all_params())) or optimizer._met_ranks() is not None:
            raise ValueError(
                "ranks average their gradients after they have been accumulated, so that they "
                "cannot be stepped at that moment; use gradient release on a single rank "
                "(process_group=None)"
            )

    # ------------------------------------------------------------------ during the backward pass

    @torch.no_grad()
    def take(self, param: torch.Tensor) -> None:
        """A gradient has been accumulated: step it with its bucket, and free it then."""
        if id(param) in self._stepped:
            raise RuntimeError(
                f"a parameter of shape {tuple(param.shape)} got a second gradient before step(): "
                "it has been stepped with the first. With gradient release, call step() after "
                "every backward pass, and accumulate no gradients"
            )
        if not self._is_open:
            self._open()
        assert param.grad is not None
        self._stepped.add(id(param))
        self._bucket.append(param)
        self._held += param.grad.nbytes
        if self._held >= self._bucket_bytes:
            self._step_bucket()

    def _open(self) -> None:
        """Begin a step: bind all parameters, so that no bucket changes what is bound."""
        optimizer = self._optimizer
        has_changed = optimizer._read_groups()
        self._check_settings()
        hooked = set(map(id, self._params))
        if any(p.requires_grad and id(p) not in hooked for p in optimizer._all_params()):
            raise ValueError(
                "the optimizer has trainable parameters that it had not when its gradients were "
                "released; remove() this GradientRelease and make another one"
            )
        if optimizer._run is None or any(p not in optimizer.state for p in self._params):
            optimizer._bind(self._params)
        run = optimizer._run
        assert run is not None
        run.is_new |= has_changed
        self._skipped = run.layout.skipped_steps.clone()
        if optimizer._measures_now():
            self._statistics = run.features.next_statistics().zero_()
        self._is_open = True

    def _step_bucket(self) -> None:
        self._optimizer._advance(self._step_gradients)
        for param in self._bucket:
            param.grad = None
        self._bucket, self._held = [], 0

    def _step_gradients(self, run: Any, grads: Grads) -> None:
        """Step the tensors that have a gradient now, and keep their statistics."""
        if self._statistics is None:
            run.backend.step(grads)
            return
        of_bucket = torch.empty_like(self._statistics)
        run.backend.step(grads, of_bucket)
        self._statistics += of_bucket

    # ------------------------------------------------------------------ after it

    def finish(self) -> Any:
        """Step the last bucket and complete the statistics; what the optimizer has bound.

        Raises:
            RuntimeError: the gradients were scaled by a ``GradScaler``.
        """
        optimizer = self._optimizer
        if getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "GradScaler scales gradients that gradient release has stepped before they could "
                "be unscaled; parameters are spoilt. Use one of the two, and begin again"
            )
        if not self._is_open:
            if optimizer._run is None:
                return None
            self._open()
        if self._bucket or not self._stepped:
            self._step_bucket()
        run = optimizer._run
        assert run is not None
        if self._statistics is not None:
            run.features.recorded()
            run.last_statistics = self._statistics
        # a step counts once, however many of its buckets hold something that is not finite
        run.layout.skipped_steps.copy_(run.layout.skipped_steps.minimum(self._skipped + 1))
        self._is_open, self._statistics = False, None
        self._stepped.clear()
        return run
