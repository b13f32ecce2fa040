"""Sets of parameter tensors that the step is timed on."""

from __future__ import annotations

from typing import Final

from benchmarks.registry import Shape, Workload

__all__ = ["WORKLOADS", "gpt2_shapes"]


def gpt2_shapes(layers: int, width: int, vocabulary: int, context: int) -> list[Shape]:
    """Parameter shapes of a GPT-2 model, in its own order (the output shares the embedding)."""
    layer: list[Shape] = [
        *[(width,), (width,)],  # ln_1
        *[(width, 3 * width), (3 * width,)],  # attn.c_attn
        *[(width, width), (width,)],  # attn.c_proj
        *[(width,), (width,)],  # ln_2
        *[(width, 4 * width), (4 * width,)],  # mlp.c_fc
        *[(4 * width, width), (width,)],  # mlp.c_proj
    ]
    return [(vocabulary, width), (context, width), *(layer * layers), (width,), (width,)]


def _small(count: int, *devices: str) -> Workload:
    """Tensors so small that what counts is the time to issue a step."""
    return Workload(
        f"small-{count}",
        f"{count:,} tensors of 1,000",
        shapes=dict.fromkeys(devices, [(25, 40)] * count),
        quick_shapes=[(25, 40)] * (count // 20 + 1),
        gate_shapes=[(25, 40)] * min(count, 40),
        # as many as statistics are kept before features are finished; on CPUs, the first few also
        # feel the threads that the contestant before has left running
        steps_per_sample={"cpu": 64, "cuda": 16},
        lead_steps=1,
    )


WORKLOADS: Final = (
    Workload(
        "one-large",
        "one tensor",
        # a matrix, so that trust ratios apply to it
        shapes={"cpu": [(8192, 8192)], "cuda": [(32768, 32768)]},
        quick_shapes=[(256, 256)],
        gate_shapes=[(547, 549)],
    ),
    Workload(
        "gpt2-small",
        "GPT-2 small",
        shapes=dict.fromkeys(("cpu", "cuda"), gpt2_shapes(12, 768, 50257, 1024)),
        quick_shapes=gpt2_shapes(2, 64, 512, 32),
        gate_shapes=gpt2_shapes(3, 49, 1031, 65),
    ),
    Workload(
        "gpt2-xl",
        "GPT-2 XL",
        shapes={"cuda": gpt2_shapes(48, 1600, 50257, 1024)},
        quick_shapes=gpt2_shapes(4, 80, 512, 32),
        gate_shapes=gpt2_shapes(5, 49, 1031, 65),
    ),
    _small(400, "cpu", "cuda"),
    _small(10, "cuda"),
    _small(1000, "cuda"),
)
