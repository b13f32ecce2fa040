"""The chunk table: how the elements of many tensors become programs of one launch.

A chunk is up to ``CHUNK`` neighbouring elements of one tensor. A kernel walks it in tiles of
``[ROWS, VECTOR]`` elements in which a thread owns whole rows: ``VECTOR`` elements are its widest
access, and sums along a row stay inside the thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import triton
import triton.language as tl

from lhopt_fused.kernels.triton_tables import CHUNK_COLUMNS

__all__ = [
    "ChunkRows",
    "chunk_rows",
    "chunk_size",
    "data_pointer",
    "load_chunk",
    "stack4",
    "stack16",
    "tile",
    "where_set",
]

_MIN_CHUNK: Final = 4096
_MAX_CHUNK: Final = 32768
_MAX_CHUNKS: Final = 16384


def chunk_size(elements: int) -> int:
    """Elements per chunk: enough chunks to fill a GPU, few enough to add up in no time.

    The largest GPUs hold about 1,000 programs at once; 16,384 chunks are many even waves of them.
    Chunks of 32,768 elements and more let a straggler at the end cost more than they save.
    """
    size = _MIN_CHUNK
    while size < _MAX_CHUNK and size * _MAX_CHUNKS < elements:
        size *= 2
    return size


@dataclass(frozen=True)
class ChunkRows:
    """Chunks of some tensors, and where the partial sums of each of the T tensors go.

    ``aligned`` chunks begin at 16-byte boundaries and hold whole vectors; ``ragged`` ones are the
    rest: tensors that are not aligned, and the last elements of those whose size is no multiple.
    """

    aligned: dict[int, npt.NDArray[np.int64]]  # by tensor: [c, 4]
    ragged: dict[int, npt.NDArray[np.int64]]
    first_row: npt.NDArray[np.int64]  # [T + 1]: rows of tensor t are first_row[t:t+2]

    @property
    def rows(self) -> int:
        return int(self.first_row[-1])


def _split(tensor: int, begin: int, end: int, row: int, size: int) -> npt.NDArray[np.int64]:
    starts = np.arange(begin, end, size, dtype=np.int64)
    lengths = np.minimum(size, end - starts)
    rows = row + np.arange(len(starts), dtype=np.int64)
    return np.stack([np.full_like(starts, tensor), starts, lengths, rows], axis=1)


def chunk_rows(
    numels: Sequence[int],
    vectors: Sequence[int],
    is_aligned: Sequence[bool],
    include: Iterable[int],
    size: int,
) -> ChunkRows:
    """Cut the tensors in ``include`` into chunks of at most ``size`` elements.

    Args:
        numels: elements of each of the T tensors.
        vectors: elements per vector access of each tensor; divide ``size``.
        is_aligned: whether every pointer of the tensor is a multiple of 16 bytes.
    """
    aligned: dict[int, npt.NDArray[np.int64]] = {}
    ragged: dict[int, npt.NDArray[np.int64]] = {}
    counts = np.zeros(len(numels) + 1, dtype=np.int64)
    row = 0
    for tensor in include:
        first = row
        whole = numels[tensor] - numels[tensor] % vectors[tensor] if is_aligned[tensor] else 0
        for chunks, begin, end in ((aligned, 0, whole), (ragged, whole, numels[tensor])):
            if begin < end:
                chunks[tensor] = _split(tensor, begin, end, row, size)
                row += len(chunks[tensor])
        counts[tensor + 1] = row - first
    return ChunkRows(aligned, ragged, np.cumsum(counts))


@triton.jit
def load_chunk(chunks_ptr, index):
    """Tensor, first element, number of elements and row of partial sums of a chunk."""
    entry_ptr = chunks_ptr + index.to(tl.int64) * CHUNK_COLUMNS
    tensor = tl.load(entry_ptr)
    start = tl.load(entry_ptr + 1)
    length = tl.load(entry_ptr + 2).to(tl.int32)
    row = tl.load(entry_ptr + 3)
    return tensor, start, length, row


@triton.jit
def data_pointer(address, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element ``start`` of the tensor at ``address``.

    What the compiler knows about alignment is lost in a table of addresses; without this assertion
    every access would be scalar.
    """
    pointer = address.to(tl.pointer_type(DTYPE)) + start
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def tile(offset, length, ROWS: tl.constexpr, VECTOR: tl.constexpr, ALIGNED: tl.constexpr):
    """Element indices and mask ``[ROWS, VECTOR]`` of the tile at ``offset`` of a chunk.

    An aligned chunk holds whole rows, so that its mask is constant along them: the accesses stay
    vectors and carry a predicate.
    """
    first = offset + tl.arange(0, ROWS)[:, None] * VECTOR
    indices = first + tl.arange(0, VECTOR)[None, :]
    inside = indices < length
    if ALIGNED:
        inside = tl.broadcast_to(first < length, [ROWS, VECTOR])
    return indices, inside


@triton.jit
def where_set(mask, flag):
    """``mask`` where the scalar ``flag`` is not 0, else nothing.

    The flag becomes a block before it is compared: the interpreter cannot broadcast a scalar bool.
    """
    return mask & (tl.zeros(mask.shape, flag.dtype) + flag != 0)


@triton.jit
def stack4(x0, x1, x2, x3):
    """``[N]`` four times -> ``[N, 4]``; a thread keeps its rows, nothing moves."""
    pairs = tl.join(tl.join(x0, x2), tl.join(x1, x3))
    return tl.reshape(pairs, [x0.shape[0], 4])


@triton.jit
def stack16(x0, x1, x2, x3, x4, x5, x6, x7, x8, x9, x10, x11, x12, x13, x14, x15):
    """``[N]`` sixteen times -> ``[N, 16]``; a thread keeps its rows, nothing moves."""
    first = tl.join(stack4(x0, x4, x8, x12), stack4(x2, x6, x10, x14))  # [N, 4, 2]
    second = tl.join(stack4(x1, x5, x9, x13), stack4(x3, x7, x11, x15))
    return tl.reshape(tl.join(first, second), [x0.shape[0], 16])
