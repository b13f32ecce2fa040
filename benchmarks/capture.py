"""A step that captures itself in a CUDA graph and then replays it."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["CapturedStep"]


class CapturedStep:
    """Runs ``step`` a few times as it is, so that state and kernels exist, then captures it.

    Gradients must stay where they are; their values may change between calls.
    """

    WARM_UP = 2

    def __init__(self, step: Callable[[], object]) -> None:
        self._step = step
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self._calls += 1
        if self._calls <= self.WARM_UP:
            self._run_on_side_stream()
            return
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):  # records the step without running it
                self._step()
        self._graph.replay()

    def _run_on_side_stream(self) -> None:
        """Capturing happens on a side stream, so that warming up must, too."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
