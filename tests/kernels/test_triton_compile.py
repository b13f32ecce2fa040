"""Every Triton kernel that a step can launch, compiled for GPUs that are not here.

The launches of whole plans are recorded instead of run, so that what is compiled is what ships.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lhopt_fused.kernels import triton_backend, triton_plan  # noqa: E402
from lhopt_fused.kernels.formats import BLOCK, MOMENT_DTYPES  # noqa: E402
from lhopt_fused.kernels.triton_launch import COMPILE_OPTIONS  # noqa: E402
from lhopt_fused.types import (  # noqa: E402
    GROUP_STATE,
    SCALARS,
    TENSOR_STATE,
    Clip,
    Denominator,
    Rounding,
    StepLayout,
    StepOptions,
    Trust,
    WeightDecay,
)

NVIDIA = (80, 90, 100)
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
REGISTERS = {
    # the most that a kernel may use: 128 threads a program, 65,536 registers a multiprocessor
    "moments_kernel": 96,  # 5 programs, 20 warps, 40 to 80 KiB of loads in flight
    "moments_kernel of 16-bit weights, with statistics": 128,  # 4 programs, 88 KiB
    "moments_kernel of moments in fewer bits": 112,  # 4 programs, 28 KiB
    "moments_kernel of moments in fewer bits, with statistics": 168,
    # 3 programs: what it waits for is arithmetic, some 130 instructions an element
    "apply_kernel": 64,
    "apply_kernel of moments in fewer bits": 80,
    "grad_norm_kernel": 64,
    "grad_sums_kernel": 128,
    "prepare_kernel": 128,
    "finalize_kernel": 128,
    "param_norm_kernel": 64,
    "group_features_kernel": 255,
    "add_features_kernel": 128,
}
BYTES_PER_ELEMENT = {
    # (kernel, what is kept): bytes read and written, by the width of an access
    ("grad_norm_kernel", "float32"): ({16: 4}, {}),
    ("moments_kernel", "float32"): ({16: 16}, {16: 12}),
    ("apply_kernel", "float32"): ({16: 12}, {16: 4}),
    ("grad_norm_kernel", "16 bits"): ({16: 2}, {}),
    ("moments_kernel", "16 bits"): ({16: 12}, {16: 10}),
    ("apply_kernel", "16 bits"): ({16: 10}, {16: 2}),
    ("grad_norm_kernel", "16 bits, float32 masters"): ({16: 2}, {}),
    ("moments_kernel", "16 bits, float32 masters"): ({16: 14}, {16: 14}),
    ("apply_kernel", "16 bits, float32 masters"): ({16: 12}, {16: 6}),
    # a thread takes 8 elements: 16 bytes of parameter and gradient, 8 of codes and corrections
    ("grad_norm_kernel", "int8 moments, 8-bit corrections"): ({16: 2}, {}),
    ("moments_kernel", "int8 moments, 8-bit corrections"): ({16: 4, 8: 3}, {16: 2, 8: 3}),
    ("apply_kernel", "int8 moments, 8-bit corrections"): ({16: 4, 8: 3}, {16: 2, 8: 3}),
    ("grad_norm_kernel", "bfloat16 moments, 16-bit corrections"): ({16: 2}, {}),
    ("moments_kernel", "bfloat16 moments, 16-bit corrections"): ({16: 10}, {16: 8}),
    ("apply_kernel", "bfloat16 moments, 16-bit corrections"): ({16: 10}, {16: 8}),
    # or 4 where there are signs: codes are single words
    ("grad_norm_kernel", "int8 moments, signs"): ({16: 4}, {}),
    ("moments_kernel", "int8 moments, signs"): ({16: 8}, {16: 4}),
    ("apply_kernel", "int8 moments, signs"): ({16: 8}, {16: 4}),
}
SCALES_PER_ROW = 2  # of the two moments, of 2 bytes each: every thread of a block reads them


class Recorded(NamedTuple):
    """One launch of a plan: what the compiler needs to know about it."""

    layout: str
    kernel: Any
    bound: tuple[Any, ...]
    last: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def is_aligned(self) -> bool:
        return bool(self.constants.get("ALIGNED", False))

    @property
    def registers(self) -> int:
        """The most that it may use, see :data:`REGISTERS`."""
        measures = self.constants.get("COLUMNS") == 16
        statistics = ", with statistics" if measures else ""
        if self.constants.get("MOMENT_DTYPE", tl.float32) != tl.float32:
            return REGISTERS[f"{self.name} of moments in fewer bits{statistics}"]
        weights = {self.constants.get(name) for name in ("PARAM_DTYPE", "BESIDE_DTYPE")}
        if self.name == "moments_kernel" and measures and weights & {tl.bfloat16, tl.float16}:
            return REGISTERS["moments_kernel of 16-bit weights, with statistics"]
        return REGISTERS[self.name]

    def source(self) -> ASTSource:
        """The kernel over these arguments; what is bound is 16-byte aligned, as torch allocates."""
        args = (*self.bound, *self.last)
        names = self.kernel.arg_names
        types = [POINTERS[a.dtype] if isinstance(a, torch.Tensor) else "i32" for a in args]
        signature = dict(zip(names, types, strict=False)) | dict.fromkeys(
            self.constants, "constexpr"
        )
        attributes = {
            (index,): [["tt.divisibility", 16]]
            for index, arg in enumerate(self.bound)
            if isinstance(arg, torch.Tensor)
        }
        return ASTSource(self.kernel, signature, self.constants, attributes)

    def compile(self, target: GPUTarget) -> Any:
        options = {"num_warps": self.num_warps, **COMPILE_OPTIONS}
        return triton.compile(self.source(), target=target, options=options)


LHOPT = StepOptions(Denominator.MAX, WeightDecay.IN_UPDATE, Clip.ROLLING_MAX, Trust.EXACT, True)
DELAYED = replace(LHOPT, trust=Trust.DELAYED)


class Case(NamedTuple):
    """What a layout is made of."""

    options: StepOptions
    dtype: torch.dtype = torch.float32  # of parameters and gradients
    signs: bool = False
    masks: bool = False
    rounding: Rounding = "nearest"
    masters: bool = False
    moments: torch.dtype = torch.float32
    correction: torch.dtype | None = None

    @property
    def kept(self) -> str:
        """See :data:`BYTES_PER_ELEMENT`."""
        if self.moments != torch.float32:
            name = str(self.moments).removeprefix("torch.")
            bits = None if self.correction is None else 8 * self.correction.itemsize
            return f"{name} moments, " + ("signs" if bits is None else f"{bits}-bit corrections")
        if self.dtype == torch.float32:
            return "float32"
        return "16 bits, float32 masters" if self.masters else "16 bits"


LAYOUTS: dict[str, Case] = {
    "adamw": Case(StepOptions(clip=Clip.NORM)),
    "lhopt": Case(LHOPT),
    "lhopt_delayed_bfloat16": Case(DELAYED, torch.bfloat16),
    "adamw_float16": Case(StepOptions(), torch.float16),
    "lamb_masks_signs": Case(StepOptions(trust=Trust.EXACT), signs=True, masks=True),
    "many": Case(StepOptions(trust=Trust.DELAYED)),
    "lhopt_stochastic_bfloat16": Case(LHOPT, torch.bfloat16, rounding="stochastic"),
    "lamb_stochastic_float16": Case(
        StepOptions(trust=Trust.EXACT), torch.float16, rounding="stochastic"
    ),
    "lhopt_master_bfloat16": Case(LHOPT, torch.bfloat16, masters=True),
    "adamw_int8_split8": Case(
        StepOptions(),
        torch.bfloat16,
        masks=True,
        moments=torch.int8,
        correction=torch.int8,
    ),
    "lhopt_int8_split8": Case(LHOPT, torch.bfloat16, moments=torch.int8, correction=torch.int8),
    "lamb_bfloat16_split16": Case(
        StepOptions(trust=Trust.EXACT),
        torch.bfloat16,
        masks=True,
        moments=torch.bfloat16,
        correction=torch.int16,
    ),
    "lhopt_delayed_int8_signs": Case(DELAYED, signs=True, moments=torch.int8),
    "lamb_master_float16": Case(StepOptions(trust=Trust.EXACT), torch.float16, masters=True),
}


def make_layout(name: str) -> StepLayout:
    case = LAYOUTS[name]
    options, dtype, moments = case.options, case.dtype, case.moments
    # aligned and ragged; or more tensors and more chunks of one than small tables are for
    sizes = (64 * 64, 7) if name != "many" else (2**20, *[8] * 20)
    if moments == torch.int8:
        sizes = (64 * 64, 64)
    params = [torch.zeros(size, dtype=dtype) for size in sizes]
    count = len(params)

    def like(kind: torch.dtype, share: int = 1) -> list[torch.Tensor | None]:
        return [torch.zeros(p.numel() // share, dtype=kind) for p in params]

    scales = like(torch.bfloat16, BLOCK) if moments == torch.int8 else None

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    return StepLayout(
        params=params,
        exp_avgs=[torch.zeros(p.shape, dtype=moments) for p in params],
        exp_avg_sqs=[
            torch.zeros(p.shape, dtype=MOMENT_DTYPES.get(moments, moments)) for p in params
        ],
        exp_avg_scales=scales,
        exp_avg_sq_scales=scales,
        grad_signs=[torch.zeros(512, dtype=torch.uint8)] * count if case.signs else None,
        group_of=[0] * count,
        is_vector=[False] * count,
        options=[options],
        run_of=[0],
        scalars=zeros(1, len(SCALARS)),
        group_state=zeros(1, len(GROUP_STATE)),
        tensor_state=zeros(count, len(TENSOR_STATE)),
        skipped_steps=torch.zeros(1, dtype=torch.int64),
        masks_nonfinite=case.masks,
        master_params=like(torch.float32) if case.masters else None,
        master_corrections=None if case.correction is None else like(case.correction),
        rounding=case.rounding,
    )


@cache
def launches() -> tuple[Recorded, ...]:
    """Everything that steps over :data:`LAYOUTS` launch, each kernel configuration once."""
    recorded: dict[tuple[Any, ...], Recorded] = {}
    current = ""

    def record(
        kernel: Any,
        programs: int,
        args: tuple[Any, ...],
        constants: dict[str, Any],
        *,
        example: tuple[Any, ...] = (),
        num_warps: int = 4,
    ) -> None:
        key = (kernel.__name__, *map(str, constants.values()))
        launch = Recorded(current, kernel, args, example, constants, num_warps)
        recorded.setdefault(key, launch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_plan, "Launch", record)
        patch.setattr(triton_backend, "Launch", record)
        patch.setattr(triton_backend, "check_layout", lambda layout: None)
        patch.setattr(triton_backend.torch.cuda, "device", lambda device: None)
        for name in LAYOUTS:
            current = name
            triton_backend.TritonBackend(make_layout(name))
    return tuple(recorded.values())


def describe(launch: Recorded) -> str:
    sizes = "-".join(f"{k.lower()}{v}" for k, v in launch.constants.items() if "DTYPE" not in k)
    return f"{launch.layout}-{launch.name.removesuffix('_kernel')}-{sizes}"


def resources(cubin: bytes) -> Counter[str]:
    """Registers, stack and local memory of a compiled kernel, as ``cuobjdump`` prints them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\b(REG|STACK|LOCAL):(\d+)", printed)
    assert {name for name, _ in found} == {"REG", "STACK", "LOCAL"}, printed
    return Counter({name: int(value) for name, value in found})


ACCESS = re.compile(r"\b(ld|st)\.global\S*?\.(?:v(\d)\.)?[bfus](\d+)\b")


def global_accesses(ptx: str) -> Iterator[tuple[str, int, int]]:
    """``("ld" or "st", words, bytes)`` of every access to global memory in a kernel."""
    for line in ptx.splitlines():
        if match := ACCESS.search(line):
            operation, width, bits = match.groups()
            yield operation, int(width or 1), int(width or 1) * int(bits) // 8


@pytest.mark.parametrize("launch", launches(), ids=describe)
def test_compiles_without_spills(launch: Recorded) -> None:
    for capability in NVIDIA:
        compiled = launch.compile(GPUTarget("cuda", capability, 32))
        used = resources(compiled.asm["cubin"])
        assert used["LOCAL"] == 0, f"sm_{capability} spills"
        assert used["STACK"] == 0, f"sm_{capability} spills"
        assert used["REG"] <= launch.registers, f"sm_{capability}: {used['REG']} registers"


PASSES = [launch for launch in launches() if "ALIGNED" in launch.constants]


@pytest.mark.parametrize("launch", [p for p in PASSES if p.is_aligned], ids=describe)
def test_aligned_passes_move_16_bytes_at_a_time(launch: Recorded) -> None:
    """128-bit accesses only, 64 bits of codes, and no byte more than the maths needs."""
    case = LAYOUTS[launch.layout]
    rows, vector = launch.constants["ROWS"], launch.constants["VECTOR"]
    per_thread = rows * vector // (32 * launch.num_warps)
    read, written = (dict(of) for of in BYTES_PER_ELEMENT[launch.name, case.kept])
    if launch.name == "grad_norm_kernel":
        read[16] *= 2  # the loop that runs, and the careful one that runs in its stead
    if launch.name == "apply_kernel" and case.masks and case.moments == torch.float32:
        read[16] += case.dtype.itemsize  # under a predicate that is false but for NaN or inf
    has_scales = case.moments == torch.int8 and launch.name != "grad_norm_kernel"
    scales = SCALES_PER_ROW * per_thread // vector if has_scales and not case.signs else 0
    for capability in NVIDIA:
        ptx = launch.compile(GPUTarget("cuda", capability, 32)).asm["ptx"]
        found = list(global_accesses(ptx))
        for operation, expected in (("ld", read), ("st", written)):
            for width, count in expected.items():
                wide = sum(op == operation and n > 1 and size == width for op, n, size in found)
                assert wide * width == count * per_thread, f"sm_{capability} {operation} {width}"
            if not case.signs:
                narrow = sum(op == operation and size == 2 for op, _, size in found)
                assert narrow == scales, f"sm_{capability} {operation}"
            assert not any(
                op == operation and n > 1 and size not in (*expected, 4) for op, n, size in found
            )


@pytest.mark.parametrize("launch", [p for p in PASSES if not p.is_aligned], ids=describe)
def test_ragged_passes_assume_no_alignment(launch: Recorded) -> None:
    """The twin of the test above: without the assertion there are no wide accesses to be found."""
    ptx = launch.compile(GPUTarget("cuda", 90, 32)).asm["ptx"]
    chunk_and_sums = Counter(size for _, _, size in global_accesses(ptx))
    assert chunk_and_sums[16] <= 1, "only a row of partial sums may be stored as a vector"


@pytest.mark.skipif(
    triton.__version__.startswith(("3.3", "3.4")), reason="Triton could not link for AMD by itself"
)
@pytest.mark.parametrize("launch", [p for p in PASSES if p.is_aligned], ids=describe)
def test_compiles_for_amd(launch: Recorded) -> None:
    compiled = launch.compile(GPUTarget("hip", "gfx942", 64))
    assert re.search(r"global_load_dwordx[24]", compiled.asm["amdgcn"])


def test_every_kernel_is_covered() -> None:
    """A kernel that no layout here launches would ship without having been compiled."""
    found = set()
    for source in Path(triton_plan.__file__).parent.glob("triton_*.py"):
        found |= set(re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.MULTILINE))
    assert {launch.name for launch in launches()} == found
    assert found == {name for name in REGISTERS if " " not in name}
