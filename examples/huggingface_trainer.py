"""Hugging Face's Trainer with LHOPT: a GPT-2 from scratch, over the bytes of a text.

::

    pip install 'lhopt-fused[huggingface]'
    python examples/huggingface_trainer.py --steps 500 --out run
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from lhopt_fused import LHOPT
from lhopt_fused.demo.text import Text, read_topics
from lhopt_fused.integrations.huggingface import LHOPTCallback, PolicyLR


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--policy", default="default")
    return parser.parse_args(arguments)


def rows(windows: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """``windows`` as the Trainer takes examples; GPT-2 shifts labels itself."""
    return [{"input_ids": window, "labels": window} for window in windows.long()]


def main(arguments: list[str] | None = None) -> Trainer:
    args = parse(arguments)
    text = Text.split(read_topics(), 0.1, args.context)
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=args.context + 1,
            n_embd=args.width,
            n_layer=args.layers,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    optimizer = LHOPT(model.parameters(), total_steps=args.steps, policy=args.policy)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            max_grad_norm=0.0,  # LHOPT clips by itself
            logging_steps=10,
            eval_strategy="steps",
            eval_steps=max(1, args.steps // 4),
            save_steps=max(1, args.steps // 2),
            report_to=[],
        ),
        train_dataset=rows(text.batch(256, args.context, generator)),
        eval_dataset=rows(text.eval_windows(args.context, 16)),
        optimizers=(optimizer, PolicyLR(optimizer)),
        callbacks=[LHOPTCallback()],
    )
    trainer.train()
    print(f"eval loss {trainer.evaluate()['eval_loss']:.4f} nats per byte")
    return trainer


if __name__ == "__main__":
    main()
