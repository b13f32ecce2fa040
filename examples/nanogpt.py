"""A language model in the manner of nanoGPT, with LHOPT in the place of AdamW and its schedule.

One process, or several that average gradients (DDP); gradient accumulation, a compiled model,
decay for matrices alone, and checkpoints from which a run goes on to the bit::

    python examples/nanogpt.py --steps 500 --out run
    torchrun --nproc-per-node 2 examples/nanogpt.py --steps 500 --out run
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from lhopt_fused import LHOPT
from lhopt_fused.demo.model import GPT, GPTConfig
from lhopt_fused.demo.text import Text, read_files, read_topics


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--text", type=Path, nargs="*", help="files; else Python's own help")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8, help="windows of each process at a time")
    parser.add_argument("--accumulate", type=int, default=2, help="backward passes a step")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--policy", default="default")
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--stop-after", type=int, help="end after this step, to go on later")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args(arguments)


def param_groups(model: torch.nn.Module) -> list[dict[str, object]]:
    """Weight decay for matrices and embeddings, none for biases and norms."""
    params = list(model.parameters())
    return [
        {"params": [p for p in params if p.dim() >= 2]},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]


def train(args: argparse.Namespace, rank: int, ranks: int, device: torch.device) -> float:
    """Train to the end, or go on from the last checkpoint; the eval loss in nats per byte."""
    config = GPTConfig(context=args.context, width=args.width, layers=args.layers)
    text = Text.split(read_files(args.text) if args.text else read_topics(), 0.1, args.context)
    windows = text.eval_windows(args.context, 64).to(device)
    model = GPT(config).to(device)
    optimizer = LHOPT(
        param_groups(model), total_steps=args.steps, policy=args.policy, inner_feature_frequency=4
    )
    checkpoint, first = args.out / "checkpoint.pt", 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    wrapped = DistributedDataParallel(model) if ranks > 1 else model
    forward = torch.compile(wrapped) if args.compile else wrapped

    for step in range(first, args.stop_after or args.steps):
        # batches follow from the step alone, so that a run that goes on sees the same
        generator = torch.Generator().manual_seed(step * ranks + rank)
        for turn in range(args.accumulate):
            batch = text.batch(args.batch, args.context, generator).to(device)
            averages = ranks == 1 or turn == args.accumulate - 1
            with contextlib.nullcontext() if averages else wrapped.no_sync():
                logits = forward(batch[:, :-1])
                loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
                (loss / args.accumulate).backward()
            optimizer.observe(train_loss=loss.detach())  # the policy sees the mean over all ranks
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(checkpoint, model, optimizer, step + 1, rank)
            if rank == 0:
                rate = optimizer.param_groups[0]["lr"]
                print(f"step {step + 1}: loss {loss.item():.4f}, learning rate {rate:.2e}")
    with torch.no_grad():
        return float(model.loss(windows))


def save(path: Path, model: torch.nn.Module, optimizer: LHOPT, step: int, rank: int) -> None:
    """A whole checkpoint or none; every rank calls it, and one of them writes."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    if rank == 0:
        torch.save(state, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    has_gpu = torch.cuda.is_available()
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu else None
    if ranks > 1:
        dist.init_process_group("nccl" if has_gpu else "gloo")
    loss = train(args, rank, ranks, device or torch.device("cpu"))
    if rank == 0:
        print(f"eval loss {loss!r} nats per byte")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
