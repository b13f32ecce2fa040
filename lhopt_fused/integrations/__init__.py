"""LHOPT inside other training loops: Hugging Face's Trainer, Lightning, Accelerate.

``integrations.huggingface`` and ``integrations.lightning`` need their library (extras
``lhopt-fused[huggingface]`` and ``[lightning]``); what is here needs none. Accelerate works as it
is, :func:`find_lhopt` gives the optimizer that it wraps::

    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    lhopt = find_lhopt(optimizer)
    ...
    lhopt.observe(train_loss=loss)
    optimizer.step()
"""

from lhopt_fused.integrations.common import PolicyLR, find_lhopt

__all__ = ["PolicyLR", "find_lhopt"]
