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

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lhopt_fused.kernels import triton_backend, triton_plan  # noqa: E402
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
    "moments_kernel of masters, or at random, with statistics": 128,  # 4 programs, 88 KiB
    "apply_kernel": 64,
    "grad_norm_kernel": 64,
    "grad_sums_kernel": 128,
    "prepare_kernel": 128,
    "finalize_kernel": 128,
    "param_norm_kernel": 64,
    "group_features_kernel": 255,
    "add_features_kernel": 128,
}
BYTES_PER_ELEMENT = {
    # (kernel, bytes of what is stepped, of a gradient, of a master's copy): read and written
    ("grad_norm_kernel", 4, 4, 0): (4, 0),
    ("moments_kernel", 4, 4, 0): (16, 12),
    ("apply_kernel", 4, 4, 0): (12, 4),
    ("grad_norm_kernel", 2, 2, 0): (2, 0),
    ("moments_kernel", 2, 2, 0): (12, 10),
    ("apply_kernel", 2, 2, 0): (10, 2),
    ("grad_norm_kernel", 4, 2, 2): (2, 0),
    ("moments_kernel", 4, 2, 2): (14, 14),
    ("apply_kernel", 4, 2, 2): (12, 6),
}


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
        needs = self.constants.get("STOCHASTIC") or self.constants.get("COPY_DTYPE") is not None
        if self.name == "moments_kernel" and needs and self.constants["COLUMNS"] == 16:
            return REGISTERS["moments_kernel of masters, or at random, with statistics"]
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

    @property
    def itemsizes(self) -> tuple[int, int, int]:
        """Bytes of what is stepped, of a gradient, and of a master's copy."""
        return (4, 2, 2) if self.masters else (self.dtype.itemsize, self.dtype.itemsize, 0)


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
    "lamb_master_float16": Case(StepOptions(trust=Trust.EXACT), torch.float16, masters=True),
}


def make_layout(name: str) -> StepLayout:
    options, dtype, signs, masks, rounding, masters = LAYOUTS[name]
    # aligned and ragged; or more tensors and more chunks of one than small tables are for
    sizes = (64 * 64, 7) if name != "many" else (2**20, *[8] * 20)
    params = [torch.zeros(size, dtype=dtype) for size in sizes]
    count = len(params)
    state = [torch.zeros(p.shape) for p in params]

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    return StepLayout(
        params=params,
        exp_avgs=state,
        exp_avg_sqs=state,
        grad_signs=[torch.zeros(512, dtype=torch.uint8)] * count if signs else None,
        group_of=[0] * count,
        is_vector=[False] * count,
        options=[options],
        run_of=[0],
        scalars=zeros(1, len(SCALARS)),
        group_state=zeros(1, len(GROUP_STATE)),
        tensor_state=zeros(count, len(TENSOR_STATE)),
        skipped_steps=torch.zeros(1, dtype=torch.int64),
        masks_nonfinite=masks,
        master_params=list(state) if masters else None,
        rounding=rounding,
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


def global_accesses(ptx: str) -> Iterator[tuple[str, int]]:
    """``("ld" or "st", bytes)`` of every access to global memory in a kernel."""
    for line in ptx.splitlines():
        if match := ACCESS.search(line):
            operation, width, bits = match.groups()
            yield operation, int(width or 1) * int(bits) // 8


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
    """128-bit accesses only, and no byte more than the maths needs."""
    case = LAYOUTS[launch.layout]
    param, grad, copy = case.itemsizes
    tile = launch.constants["ROWS"] * launch.constants["VECTOR"]
    per_thread = tile // (32 * launch.num_warps)
    read, written = BYTES_PER_ELEMENT[launch.name, param, grad, copy]
    if launch.name == "grad_norm_kernel":
        read *= 2  # the loop that runs, and the careful one that runs in its stead
    if launch.name == "apply_kernel" and case.masks:
        read += grad  # under a predicate that is false but for tensors with NaN or inf
    for capability in NVIDIA:
        ptx = launch.compile(GPUTarget("cuda", capability, 32)).asm["ptx"]
        wide = Counter(op for op, size in global_accesses(ptx) if size == 16)
        assert wide["ld"] * 16 == read * per_thread, f"sm_{capability}"
        assert wide["st"] * 16 == written * per_thread, f"sm_{capability}"


@pytest.mark.parametrize("launch", [p for p in PASSES if not p.is_aligned], ids=describe)
def test_ragged_passes_assume_no_alignment(launch: Recorded) -> None:
    """The twin of the test above: without the assertion there are no wide accesses to be found."""
    ptx = launch.compile(GPUTarget("cuda", 90, 32)).asm["ptx"]
    chunk_and_sums = Counter(size for _, size in global_accesses(ptx))
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
