"""What ranks do in tests: the same gradients for pieces as for whole tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import CIAO_OPTIONS, make_params, set_grads
from distributed.launch import device
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from lhopt_fused import CIAO, AdamW
from lhopt_fused.ranks import Ranks, is_sharded

STEPS = 9
FUSED = {"cpu": "cpu", "cuda": "triton"}
CASES = {device: [(backend, name) for name in CIAO_OPTIONS] for device, backend in FUSED.items()}
CASES["cpu"] += [("reference", "lhopt"), ("reference", "lhopt_delayed")]

SHAPES = ((8, 5), (5,), (3, 4, 3), (1,), (), (1, 3), (33, 17), (2, 6))
"""Of parameters: some have fewer rows than there are ranks, so that pieces are empty."""


FEW_BITS_SHAPES = ((33, 128), (3, 32, 64), (1, 64))
"""The first two take blocks."""


def sharded_by_rows(ranks: int) -> list[Any]:
    """As FSDP2 does: everything along its first dimension; a scalar is copied."""
    mesh = init_device_mesh(device().type, (ranks,))
    return [(mesh, (Shard(0),) if shape else (Replicate(),)) for shape in SHAPES]


def sharded_in_many_ways(ranks: int) -> list[Any]:
    """A tensor-parallel mesh, parts of it, copies, plain tensors: one of each."""
    mesh = init_device_mesh(device().type, (ranks // 2, 2), mesh_dim_names=("data", "model"))
    data = mesh["data"]
    return [
        (mesh, (Shard(0), Shard(1))),
        (data, (Shard(0),)),
        (mesh, (Replicate(), Shard(1))),
        None,
        None,
        (mesh, (Shard(1), Replicate())),
        (mesh, (Shard(0), Shard(0))),
        (mesh, (Replicate(), Replicate())),
    ]


def place(tensor: torch.Tensor, how: tuple[DeviceMesh, Sequence[Placement]] | None) -> torch.Tensor:
    """A copy of ``tensor``, the same on every rank, laid out as said, without a message."""
    copied = tensor.clone()
    return copied if how is None else distribute_tensor(copied, *how, src_data_rank=None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the whole tensor, on the CPU of every rank."""
    held = tensor.detach()
    if not isinstance(held, DTensor):
        return held.to("cpu", copy=True)
    on_device = DTensor.from_local(  # where its mesh is; pieces may be kept in host memory
        held.to_local().to(device()),
        held.device_mesh,
        held.placements,
        run_check=False,
        shape=held.shape,
        stride=held.stride(),
    )
    return on_device.full_tensor().cpu()


def uses_exact_trust(options: str) -> bool:
    """Whether trust ratios wait for the norms of their own step."""
    keywords = CIAO_OPTIONS[options]
    return "lamb_power" in keywords and keywords.get("trust") != "delayed"


@contextmanager
def one_of_many(ranks: int) -> Iterator[None]:
    """Let a rank that is on its own step pieces, and send messages, as one of several does."""
    with pytest.MonkeyPatch.context() as patch:
        if ranks == 1:
            patch.setattr("lhopt_fused.optimizer.is_piece", is_sharded)
            patch.setattr(
                "lhopt_fused.optimizer.ranks_of",
                lambda params, group: None if group is None else Ranks(dist.group.WORLD),
            )
        yield


class Twins:
    """A model in pieces, and the same one whole, which takes the same steps on its own."""

    def __init__(self, layout: list[Any], options: dict[str, Any], **keywords: Any) -> None:
        self.layout = layout
        self.single = make_params(shapes=SHAPES, device=device().type)
        self.sharded = [
            torch.nn.Parameter(place(p.detach(), how))
            for p, how in zip(self.single, layout, strict=True)
        ]
        self.alone = CIAO(self.groups(self.single), **options, **keywords, process_group=None)
        self.optimizer = CIAO(self.groups(self.sharded), **options, **keywords)

    @staticmethod
    def groups(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[::2]}, {"params": params[1::2], "lr": 3e-3}]

    def set_grads(self, step: int) -> None:
        set_grads(self.single, step)
        for p, q, how in zip(self.single, self.sharded, self.layout, strict=True):
            q.grad = None if p.grad is None else place(p.grad, how)

    def step(self, step: int) -> None:
        self.set_grads(step)
        self.alone.step()
        self.optimizer.step()

    def messages(self, step: int) -> int:
        """Take a step, and count the messages of the sharded one."""
        self.set_grads(step)
        self.alone.step()
        with CommDebugMode() as messages:
            self.optimizer.step()
        return int(messages.get_total_counts())


def trajectory(
    rank: int,
    ranks: int,
    layout: Callable[[int], list[Any]],
    name: str,
    steps: int = STEPS,
    **keywords: Any,
) -> dict[str, Any]:
    """Both runs of so many steps; what each has reached, pieces first."""
    twins = Twins(layout(ranks), CIAO_OPTIONS[name], **keywords)
    for step in range(steps - 2):
        twins.step(step)
    messages = [twins.messages(step) for step in range(steps - 2, steps)]
    both = twins.optimizer, twins.alone
    statistics = [{k: v.to("cpu", copy=True) for k, v in o.statistics().items()} for o in both]
    reached = [whole(p) for p in twins.sharded], [whole(p) for p in twins.single]
    moments = [
        [whole(o.state[p]["exp_avg"]) for p in params]
        for o, params in zip(both, (twins.sharded, twins.single), strict=True)
    ]
    norms = [
        [float(o.state[p]["param_norm"]) for p in params]
        for o, params in zip(both, (twins.sharded, twins.single), strict=True)
    ]
    return {
        "messages": messages,
        "params": reached,
        "moments": moments,
        "norms": norms,
        "statistics": statistics,
        "features": [o.pop_inner_features(extra=True) for o in both],
        "bits": bits([*reached[0], *moments[0]]),
    }


def bits(tensors: Sequence[torch.Tensor]) -> str:
    """The same for equal bits alone."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def triton_trajectory(rank: int, ranks: int, name: str, nonfinite: str) -> dict[str, Any]:
    """A few steps in Triton's interpreter, which is slow."""
    keywords = {"backend": "triton", "nonfinite": nonfinite, "steps": 3}
    return trajectory(rank, ranks, sharded_by_rows, name, **keywords)


def few_bits(rank: int, ranks: int, keywords: dict[str, Any]) -> str:
    """Bits that a few steps of bfloat16 parameters, cut into rows of whole blocks, come to.

    Nothing of these steps sums over elements, so that they do not depend on the number of ranks.
    """
    mesh = init_device_mesh("cpu", (ranks,))
    wholes = make_params(torch.bfloat16, FEW_BITS_SHAPES)
    params = [torch.nn.Parameter(place(p.detach(), (mesh, [Shard(0)]))) for p in wholes]
    optimizer = AdamW(params, **keywords)
    for step in range(3):
        set_grads(wholes, step)
        for param, given in zip(params, wholes, strict=True):
            param.grad = None if given.grad is None else place(given.grad, (mesh, [Shard(0)]))
        optimizer.step()
    kept = [x for p in params for _, x in sorted(optimizer.state[p].items()) if x.dim()]
    return bits([whole(x.detach().float()) for x in (*params, *kept)])  # no int16 goes over gloo


def trajectories(rank: int, ranks: int) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Of every layout, backend and choice of options; a few of them twice."""
    layouts = [sharded_by_rows] + ([sharded_in_many_ways] if ranks == 4 else [])
    with one_of_many(ranks):
        return {
            (layout.__name__, *key): outcome
            for layout in layouts
            for key, outcome in _trajectories(rank, ranks, layout).items()
        }


def _trajectories(
    rank: int, ranks: int, layout: Callable[[int], list[Any]]
) -> dict[tuple[str, str], dict[str, Any]]:
    kind = device().type
    found = {
        (backend, name): trajectory(rank, ranks, layout, name, backend=backend)
        for backend, name in CASES[kind]
    }
    found["again", "lhopt"] = trajectory(rank, ranks, layout, "lhopt", backend=FUSED[kind])
    with pytest.MonkeyPatch.context() as patch:  # copies count each, or none
        patch.setattr("lhopt_fused.optimizer.counts_here", lambda param, group: ranks > 1)
        wrong = trajectory(rank, ranks, layout, "lhopt", backend=FUSED[kind])
    found["wrong", "lhopt"] = wrong
    return found
