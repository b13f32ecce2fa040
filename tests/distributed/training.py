"""A small model that ranks train together, its checkpoints, and what can go wrong."""

from __future__ import annotations

import copy
import io
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
from distributed.launch import device
from distributed.runs import bits, one_of_many, whole
from policy.samples import random_policy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from lhopt_fused import CIAO, LHOPT, AdamW

STEPS, OUTER_STEPS = 12, 4


def make_model() -> torch.nn.Sequential:
    """The same on every rank; no dimension is a multiple of the number of ranks."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3), torch.nn.Linear(3, 1)
    )


def sharded(model: torch.nn.Sequential, ranks: int, **policy: Any) -> torch.nn.Sequential:
    """``model`` under FSDP2, on this rank's device."""
    model.to(device())
    mesh = init_device_mesh(device().type, (ranks,))
    for layer in (model[0], model[2], model[3]):
        fully_shard(layer, mesh=mesh, **policy)
    return fully_shard(model, mesh=mesh, **policy)


def make_optimizer(model: torch.nn.Module, **keywords: Any) -> LHOPT:
    keywords = {
        "policy": random_policy(0, registers=False),
        "inner_feature_frequency": 2,
        **keywords,
    }
    return LHOPT(model.parameters(), STEPS, outer_steps=OUTER_STEPS, **keywords)


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step)).to(device())


def train(model: torch.nn.Module, optimizer: LHOPT, first: int, last: int, share: slice) -> None:
    """Steps on a share of each batch."""
    for step in range(first, last):
        x = batch(step)[share].to(next(model.parameters()).dtype)
        loss = (model(x).squeeze(-1) - x.sum(-1)).square().mean()
        loss.backward()
        optimizer.observe(train_loss=loss.detach())
        optimizer.step()
        optimizer.zero_grad()


def fingerprint(value: Any) -> str:
    """The same for equal numbers and bits alone, whatever holds them."""
    if isinstance(value, torch.Tensor):
        return bits([whole(value)])
    if isinstance(value, bytes):  # equal numbers are not always packed into equal bytes
        return fingerprint(torch.load(io.BytesIO(value), weights_only=True))
    if isinstance(value, dict):
        return repr(sorted((str(key), fingerprint(held)) for key, held in value.items()))
    if isinstance(value, list | tuple):
        return repr([fingerprint(held) for held in value])
    return repr(value)


def reached(model: torch.nn.Module, optimizer: LHOPT) -> dict[str, Any]:
    """What a run has come to; ``"bits"`` are of all that it goes on from, policy included."""
    params = [whole(p) for p in model.parameters()]
    decided = [dict(step.hyperparameters) for step in optimizer.history]
    losses = [step.train_loss for step in optimizer.history]
    return {
        "params": params,
        "decided": decided,
        "losses": losses,
        "bits": bits(params) + fingerprint(optimizer.state_dict()),
    }


def decisions(rank: int, ranks: int, freezes: bool = False) -> dict[str, dict[str, Any]]:
    """Under DDP and FSDP2, with a share of the data for each rank, and alone with all of it.

    On GPUs also under FSDP2 with its shards in host memory. What each has reached; with
    ``freezes``, weight matrices are not trained.
    """
    share = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
    found = {}
    model: torch.nn.Module
    for name in ("ddp", "fsdp", "alone", *(["offloaded"] if device().type == "cuda" else [])):
        model = layers = make_model().to(device())
        for param in layers.parameters():
            param.requires_grad_(param.dim() == 1 or not freezes)
        if name == "ddp":
            model = torch.nn.parallel.DistributedDataParallel(layers)
        if name == "fsdp":
            model = sharded(layers, ranks)
        if name == "offloaded":
            model = sharded(layers, ranks, offload_policy=CPUOffloadPolicy())
        group = None if name == "alone" else "auto"
        with one_of_many(ranks):
            optimizer = make_optimizer(model, process_group=group)
            train(model, optimizer, 0, STEPS, slice(8) if name == "alone" else share)
        found[name] = {
            **reached(model, optimizer),
            "frozen": bits([whole(p) for p in model.parameters() if not p.requires_grad]),
            "have_state": [p.requires_grad for p in optimizer.state],
        }
    return found


def save(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """A whole checkpoint in ``folder``, or none."""
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    partial = folder.with_suffix(".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed while saving
    dist.barrier()
    checkpoints.save(state, checkpoint_id=partial)
    if dist.get_rank() == 0:
        partial.rename(folder)
    dist.barrier()


def load(model: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    state = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer),
    }
    checkpoints.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])


def low_precision_leg(
    ranks: int, begins: str | None, ends: str, first: int, last: int
) -> tuple[str, str, list[str]]:
    """As :func:`leg`, of bfloat16 parameters with codes of 8 bits and split masters.

    Nothing of these steps sums over elements, and rows are whole vectors, so that bits do not
    depend on the number of ranks.

    Returns:
        Bits that it begins with and reaches, and the dtypes of the state.
    """
    layers = (torch.nn.Linear(*shape, bias=False) for shape in ((128, 66), (64, 96)))
    model = torch.nn.Sequential(*layers).bfloat16()
    mesh = init_device_mesh(device().type, (ranks,))
    for parameter in (p for p in model.parameters() if first == 0):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    fully_shard(model.to(device()), mesh=mesh)
    optimizer = AdamW(model.parameters(), lr=1e-3, moments="int8", master_weights="split8")
    if begins is not None:
        load(model, optimizer, Path(begins))
    begun = _low_precision_bits(model, optimizer) if begins is not None else ""
    for step in range(first, last):
        for index, param in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + index)
            grad = torch.randn(param.shape, generator=generator).to(device(), torch.bfloat16)
            param.grad = distribute_tensor(grad, mesh, param.placements)  # type: ignore[attr-defined]
        optimizer.step()
    save(model, optimizer, Path(ends))
    state = optimizer.state[next(model.parameters())]
    kept = [str(value.dtype) for _, value in sorted(state.items()) if value.dim()]
    return begun, _low_precision_bits(model, optimizer), kept


def _low_precision_bits(model: torch.nn.Module, optimizer: AdamW) -> str:
    tensors = []
    for param in model.parameters():
        state = optimizer.state[param]
        tensors += [whole(param), *(whole(x) for _, x in sorted(state.items()) if x.dim())]
    return bits(tensors)


def leg(rank: int, ranks: int, begins: str | None, ends: str, first: int, last: int) -> Any:
    """From one checkpoint, if there is one, to another: what it begins with, what it reaches.

    Every rank sees all data, so that gradients do not depend on the number of ranks.
    """
    kept = low_precision_leg(ranks, begins and f"{begins}.kept", f"{ends}.kept", first, last)
    model = sharded(make_model(), ranks)
    optimizer = make_optimizer(model)
    if begins is not None:
        load(model, optimizer, Path(begins))
    begun = reached(model, optimizer) if begins is not None else {}
    train(model, optimizer, first, last, slice(8))
    save(model, optimizer, Path(ends))
    return begun, reached(model, optimizer), kept


def through_full_states(rank: int, ranks: int, kind: str, from_first: bool) -> list[dict[str, Any]]:
    """What a run has come to, and one that goes on with its whole state in the middle.

    Of parameters that are sharded, in bfloat16 with split masters or not, or of whole ones with
    restart registers (``kind``). With ``from_first``, rank 0 alone has the state.
    """

    def begun() -> tuple[torch.nn.Sequential, LHOPT]:
        if kind == "split16":
            model = sharded(make_model().bfloat16(), ranks)
            return model, make_optimizer(model, master_weights="split16")
        if kind == "sharded":
            model = sharded(make_model(), ranks)
            return model, make_optimizer(model)
        return with_registers(make_model())

    model, optimizer = begun()
    train(model, optimizer, 0, 2 * STEPS // 3, slice(8))
    whole_states = StateDictOptions(full_state_dict=True, cpu_offload=from_first)
    kept = copy.deepcopy(get_model_state_dict(model, options=whole_states))
    of_optimizer = get_optimizer_state_dict(model, optimizer, options=whole_states)
    of_optimizer = copy.deepcopy(of_optimizer)
    other, resumed = begun()
    loads = StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_first)
    set_model_state_dict(other, kept, options=loads)
    set_optimizer_state_dict(other, resumed, of_optimizer, options=loads)
    runs = (model, optimizer), (other, resumed)
    for run in runs:
        train(*run, 2 * STEPS // 3, STEPS, slice(8))
    return [reached(*run) for run in runs]


def with_registers(model: torch.nn.Sequential) -> tuple[torch.nn.Sequential, LHOPT]:
    """A run whose policy uses restart registers."""
    policy = random_policy(0, registers=True)
    return model, make_optimizer(model, policy=policy, sample=True, restart_registers=3)


def registers_saved(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """A run whose policy uses restart registers, saved with some in use, and gone on with."""
    model, optimizer = with_registers(make_model())
    train(model, optimizer, 0, 2 * STEPS // 3, slice(8))
    save(model, optimizer, Path(folder) / "saved")
    held = [not math.isnan(progress) for progress in optimizer.registers.progress]
    train(model, optimizer, 2 * STEPS // 3, STEPS, slice(8))
    other, resumed = with_registers(make_model())
    load(other, resumed, Path(folder) / "saved")
    train(other, resumed, 2 * STEPS // 3, STEPS, slice(8))
    return {
        "held": held,
        "used": [step.register for step in optimizer.history],
        "bits": [reached(model, optimizer)["bits"], reached(other, resumed)["bits"]],
    }


def disagreements(rank: int, ranks: int) -> dict[str, tuple[str, str]]:
    """By what is wrong on the last rank alone, the error that this rank gets."""
    is_odd = rank == ranks - 1
    found = {}

    def tries(name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            found[name] = (type(error).__name__, str(error))
        dist.barrier()

    def step(shapes: list[tuple[int, ...]], **keywords: Any) -> None:
        params = [torch.nn.Parameter(torch.ones(shape, device=device())) for shape in shapes]
        for param in params:
            param.grad = torch.ones_like(param)
        CIAO(params, **keywords).step()

    def decide(**keywords: Any) -> None:
        model = make_model().to(device())
        model(batch(0)).sum().backward()
        make_optimizer(model, **keywords).step()

    tries("shape", lambda: step([(2, 3) if is_odd else (2, 4)]))
    tries("number", lambda: step([(2, 3)] * (2 if is_odd else 1)))
    tries("options", lambda: step([(2, 3)], lamb_power=1 if is_odd else None))
    tries("lr", lambda: step([(2, 3)], lr=1e-3 if is_odd else 1e-2))
    tries("policy", lambda: decide(policy=random_policy(3 if is_odd else 4, registers=False)))
    tries("draws", lambda: decide(sample=True, seed=int(is_odd)))
    tries("presence", lambda: _missing_gradient(ranks, is_odd))
    return found


def _missing_gradient(ranks: int, is_odd: bool) -> None:
    mesh = init_device_mesh(device().type, (ranks,))
    ones = torch.ones(4, 3, device=device())
    params = [torch.nn.Parameter(distribute_tensor(ones, mesh, [Shard(0)])) for _ in range(2)]
    optimizer = CIAO(params)
    for step in range(2):
        for param in params:
            param.grad = torch.ones_like(param)
        if step == 1 and is_odd:
            params[1].grad = None
        optimizer.step()
    optimizer.statistics()  # where it is seen on a GPU


def refusals(rank: int, ranks: int) -> dict[str, tuple[str, str]]:
    """By what is asked for, the error."""
    mesh = init_device_mesh("cpu", (ranks,))
    found = {}

    def parameter(dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
        return torch.nn.Parameter(
            distribute_tensor(torch.ones(4, 3, dtype=dtype), mesh, [Shard(0)])
        )

    def tries(name: str, act: Callable[[], Any]) -> None:
        try:
            act()
        except Exception as error:
            found[name] = (type(error).__name__, str(error))

    def step(param: torch.Tensor, placements: list[Any] | None = None, **keywords: Any) -> None:
        optimizer = CIAO([param], **keywords)
        whole_grad = torch.ones(4, 3, dtype=param.dtype)
        param.grad = distribute_tensor(whole_grad, mesh, placements or [Shard(0)])
        optimizer.step()

    def blocks(tensor: torch.Tensor, placement: Any) -> None:
        """One step of a sharded tensor keeps what that of the whole one keeps."""
        grad = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0))
        kept = []
        for group in ("auto", None):
            param = torch.nn.Parameter(tensor.clone())
            param.grad = grad.clone()
            if group is not None:
                param = torch.nn.Parameter(distribute_tensor(tensor, mesh, [placement]))
                param.grad = distribute_tensor(grad, mesh, [placement])
            optimizer = CIAO([param], moments="int8", process_group=group)  # type: ignore[arg-type]
            optimizer.step()
            kept.append([whole(x) for x in optimizer.state[param].values() if x.dim()])
        assert all(map(torch.equal, *kept))

    waiting = DTensor.from_local(torch.ones(4, 3), mesh, [Partial()], run_check=False)
    tries("partial", lambda: CIAO([torch.nn.Parameter(waiting)]))
    tries("alone", lambda: step(parameter(), process_group=None))
    tries("signs", lambda: step(parameter(), keep_grad_signs=True))
    tries("stochastic", lambda: step(parameter(torch.bfloat16), rounding="stochastic"))
    tries("placements", lambda: step(parameter(), [Replicate()]))
    tries("columns", lambda: blocks(torch.ones(64, 192), Shard(1)))
    tries("middle", lambda: blocks(torch.ones(4, 128, 64), Shard(1)))
    blocks(torch.ones(64, 64 * ranks), Shard(1))
    blocks(torch.ones(5, 64, 64), Shard(0))
    tries(
        "registers",
        lambda: LHOPT([parameter()], 4, policy=random_policy(0), restart_registers=3),
    )
    return found


def one_dies(rank: int, ranks: int, how: str) -> str:
    """The last rank dies or sleeps in the middle; the error that the others get."""
    model = sharded(make_model(), ranks)
    optimizer = make_optimizer(model)
    train(model, optimizer, 0, 2, slice(8))
    if rank == ranks - 1 and how == "dies":
        os._exit(1)
    if rank == ranks - 1:
        time.sleep(10)
    for param in model.parameters():  # no collective of the model's own
        param.grad = torch.zeros_like(param)
    try:
        optimizer.step()
        optimizer.step()
    except RuntimeError as error:
        return type(error).__name__
    return ""
