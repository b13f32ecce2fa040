"""What two ranks do under FSDP2 in libraries that shard models themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from distributed.runs import bits, whole
from policy.samples import random_policy
from torch.distributed.fsdp import fully_shard

from lhopt_fused import LHOPT
from lhopt_fused.integrations import find_lhopt

STEPS = 12


def make_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Tanh(), torch.nn.Linear(9, 1))


def make_optimizer(model: torch.nn.Module, **keywords: Any) -> LHOPT:
    policy = random_policy(0, registers=False)
    return LHOPT(model.parameters(), STEPS, policy=policy, outer_steps=4, **keywords)


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    loss: torch.Tensor = (model(x).squeeze(-1) - x.sum(-1)).square().mean()
    return loss


def reached(model: torch.nn.Module, optimizer: LHOPT) -> dict[str, Any]:
    params = [whole(p) for p in model.parameters()]
    return {
        "params": params,
        "bits": bits(
            [*params, *(whole(optimizer.state[p]["exp_avg"]) for p in model.parameters())]
        ),
        "sharded": all(type(p.data).__name__ == "DTensor" for p in model.parameters()),
        "history": repr(optimizer.history),
    }


def alone() -> dict[str, Any]:
    """The run on one rank, whole."""
    model = make_model()
    optimizer = make_optimizer(model, process_group=None)
    for step in range(STEPS):
        loss = loss_of(model, step)
        loss.backward()
        optimizer.observe(train_loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    return reached(model, optimizer)


class Accelerated:
    """A model under Accelerate's FSDP2, and its LHOPT."""

    def __init__(self) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
        plugin.set_mixed_precision = lambda *args, **kwargs: None
        self.accelerator = Accelerator(cpu=True)
        # Accelerate shards on accelerators alone; here, it is told to on a CPU
        PartialState().distributed_type = DistributedType.FSDP
        AcceleratorState().fsdp_plugin = plugin
        model = make_model()
        self.model, self.optimizer = self.accelerator.prepare(model, make_optimizer(model))

    @property
    def lhopt(self) -> LHOPT:
        return find_lhopt(self.optimizer)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            loss = loss_of(self.model, step)
            self.accelerator.backward(loss)
            self.lhopt.observe(train_loss=loss.detach())
            self.optimizer.step()
            self.optimizer.zero_grad()


def accelerated(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """A run under Accelerate, and one that goes on from its checkpoint."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost"}
    os.environ |= {"MASTER_PORT": "0", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    run = Accelerated()
    run.train(0, 5)
    run.accelerator.save_state(folder)
    run.train(5, STEPS)
    resumed = Accelerated()
    resumed.accelerator.load_state(folder)
    resumed.train(5, STEPS)
    return {
        "whole": reached(run.model, run.lhopt),
        "resumed": reached(resumed.model, resumed.lhopt),
        "alone": alone() if rank == 0 else None,
    }


def sharded_line() -> Any:
    """A Lightning module that shards itself, with LHOPT."""
    from lightning.pytorch import LightningModule

    class Line(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model()

        def configure_model(self) -> None:
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.model[0], self.model[2], self.model):
                fully_shard(layer, mesh=mesh)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            return loss_of(self.model, self.trainer.global_step)

        def configure_optimizers(self) -> LHOPT:
            return make_optimizer(self.model)

    return Line()


def fitted(ranks: int, folder: str, checkpoint: Path | None = None) -> dict[str, Any]:
    """A run of two epochs under Lightning's strategy for FSDP2, saved after each."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import ModelParallelStrategy
    from torch.utils.data import DataLoader

    from lhopt_fused.integrations.lightning import LHOPTCallback

    keep = ModelCheckpoint(folder, filename="{step}", save_top_k=-1, save_on_train_epoch_end=True)
    module = sharded_line()
    trainer = Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=ModelParallelStrategy(process_group_backend="gloo"),
        max_steps=STEPS,
        callbacks=[LHOPTCallback(), keep],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(torch.arange(STEPS // 2)), ckpt_path=checkpoint)
    return reached(module.model, find_lhopt(trainer.optimizers[0]))


def lightning(rank: int, ranks: int, folder: str) -> dict[str, Any]:
    """A run under Lightning, and one that goes on from its checkpoint."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    os.environ |= {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "0"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    whole_run = fitted(ranks, f"{folder}/whole")
    saved = Path(folder) / "whole" / f"step={STEPS // 2}.ckpt"
    return {
        "whole": whole_run,
        "resumed": fitted(ranks, f"{folder}/resumed", saved),
        "alone": alone() if rank == 0 else None,
    }
