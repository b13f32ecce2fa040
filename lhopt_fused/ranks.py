"""The ranks that train one model together: what they sum, and that they say the same."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal, TypeAlias

import torch
import torch.distributed as dist

from lhopt_fused.types import RanksDisagreeError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["RankGroup", "Ranks", "is_sharded", "local_tensor", "ranks_of"]

RankGroup: TypeAlias = "ProcessGroup | Literal['auto'] | None"
"""Which ranks train one model: a process group, those found by :func:`ranks_of`, or just this."""

_DIGEST_BYTES: Final = 8


class Ranks:
    """A process group, and the few small messages of an optimizer.

    Every method is a collective: all ranks call it, in the same order.

    Attributes:
        group: the process group.
        size: the number of ranks, 2 or more.
        rank: this one, from 0 on.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.size, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self._config = str(dist.get_backend_config(group))

    def sum(self, table: torch.Tensor) -> None:
        """Replace ``table`` by its sum over the ranks, bit for bit the same on each of them."""
        sent = self._sendable(table)
        dist.all_reduce(sent, group=self.group)
        if sent is not table:
            table.copy_(sent)

    def copy_from_first(self, table: torch.Tensor) -> None:
        """Replace ``table`` by that of rank 0."""
        sent = self._sendable(table)
        dist.broadcast(sent, group=self.group, group_src=0)
        if sent is not table:
            table.copy_(sent)

    def check_agreement(self, said: Mapping[str, Any]) -> None:
        """See that every rank says the same.

        Args:
            said: by topic, whatever has a ``repr``; every rank has the same topics.

        Raises:
            RanksDisagreeError: on every rank, with the topics and ranks; what rank 0 and the first
                other one say is quoted.
        """
        texts = [repr(value) for value in said.values()]
        mine = torch.tensor([_digest(text) for text in texts], dtype=torch.int64)
        sent = self._sendable(mine)
        gathered = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(gathered, sent, group=self.group)
        digests = torch.stack(gathered).cpu()  # [ranks, topics]
        unlike = (digests != digests[0]).nonzero().tolist()
        if not unlike:
            return
        other, topic = min(unlike, key=lambda place: (place[1], place[0]))
        quoted: list[Any] = [None] * self.size
        dist.all_gather_object(quoted, texts[topic], group=self.group)
        raise RanksDisagreeError(
            f"ranks disagree on {', '.join(sorted({list(said)[t] for _, t in unlike}))}: ranks "
            f"{sorted({r for r, _ in unlike})} differ from rank 0. {_difference(quoted, other)} "
            "Every rank must build the same optimizer over the same parameters"
        )

    def _sendable(self, table: torch.Tensor) -> torch.Tensor:
        """``table`` where the group can send it from; pieces in host memory may belong to a GPU."""
        if f"{table.device.type}:" in self._config:
            return table.contiguous()
        return table.to(torch.device("cuda", torch.cuda.current_device()))


def _digest(text: str) -> int:
    found = hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]
    return int.from_bytes(found, "little", signed=True)


def _difference(texts: Sequence[str], other: int) -> str:
    """Where the texts of rank 0 and another one part, with a little around it."""
    first, second = texts[0], texts[other]
    pairs = enumerate(zip(first, second, strict=False))
    start = next((i for i, (x, y) in pairs if x != y), min(len(first), len(second)))
    shown = [text[max(0, start - 60) : start + 60] for text in (first, second)]
    return f"Rank 0 says ...{shown[0]}..., rank {other} ...{shown[1]}..."


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return _is_dtensor(type(tensor))


@functools.cache
def _is_dtensor(kind: type) -> bool:
    if kind.__name__ != "DTensor":  # so that nothing is imported for the others
        return False
    from torch.distributed.tensor import DTensor

    return issubclass(kind, DTensor)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The piece of a DTensor that this rank has, without a copy; other tensors as they are."""
    if not is_sharded(tensor):
        return tensor
    if torch.is_grad_enabled():
        with torch.no_grad():
            return local_tensor(tensor)
    local: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    wait = getattr(local, "wait", None)  # of a piece that is still on its way
    return local if wait is None else wait()


def ranks_of(params: Sequence[torch.Tensor], process_group: RankGroup) -> Ranks | None:
    """The ranks that hold pieces or copies of ``params``; None where there is only this one.

    With ``"auto"``, these are the ranks of the parameters' meshes: of the smallest mesh that holds
    the others, or else all; and all where no parameter has a mesh.

    Raises:
        ValueError: ``process_group`` is None or does not hold a parameter's mesh.
    """
    meshes = {p.device_mesh for p in params if is_sharded(p)}  # type: ignore[attr-defined]
    if process_group is None:
        if any(mesh.size() > 1 for mesh in meshes):
            raise ValueError(
                "process_group=None means that this rank is on its own, but parameters are "
                "sharded over several; leave it out"
            )
        return None
    if not dist.is_available() or not dist.is_initialized():
        return None
    group = _group_of(meshes) if isinstance(process_group, str) else process_group
    held = set(dist.get_process_group_ranks(group))
    for mesh in meshes:
        if not held.issuperset(mesh.mesh.flatten().tolist()):
            raise ValueError(
                f"process_group has the ranks {sorted(held)}, but a parameter is on {mesh}; pass "
                "a group of all ranks that hold a piece of a parameter"
            )
    return Ranks(group) if len(held) > 1 else None


def _group_of(meshes: set[Any]) -> ProcessGroup:
    """The process group of the smallest mesh that holds the others, or of all ranks."""
    ranks = {tuple(sorted(mesh.mesh.flatten().tolist())): mesh for mesh in meshes}
    everyone = tuple(range(dist.get_world_size()))
    widest = max(ranks, key=len, default=everyone)
    if widest == everyone or any(not set(held) <= set(widest) for held in ranks):
        return dist.group.WORLD  # type: ignore[return-value]
    if ranks[widest].ndim == 1:
        return ranks[widest].get_group()  # type: ignore[no-any-return]
    return _new_group(widest, dist.group.WORLD)


@functools.cache
def _new_group(ranks: tuple[int, ...], _world: ProcessGroup) -> ProcessGroup:
    """A group of these ranks, made once for each world."""
    return dist.new_group(list(ranks), use_local_synchronization=True)  # type: ignore[no-any-return]
