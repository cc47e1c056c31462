"""torch's CUDA caching allocator of 2023, by its rules (c10/cuda/CUDACachingAllocator.cpp), for sizes without memory.

Sizes are multiples of 512 bytes. The smallest free block that suffices is taken, and split where enough is left; blocks
up to 1 MiB are in segments of 2 MiB of their own. Without one, a segment is reserved: 20 MiB for less than 10 MiB, else
a multiple of 2 MiB. A freed block is joined with free neighbours of its segment.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

MIB = 2**20


@dataclass(eq=False)
class Block:
    """A part of a segment."""

    size: int
    small: bool
    place: tuple[int, int]  # segment, offset
    free: bool = False
    before: Block | None = None
    after: Block | None = None


class Allocator:
    """Reserves what allocations and frees need, and gives nothing back."""

    def __init__(self) -> None:
        self.reserved = self._segments = 0
        self._free: dict[bool, list[tuple[int, tuple[int, int], Block]]] = {True: [], False: []}
        self._live: dict[Hashable, Block] = {}

    def replay(self, events: Iterable[tuple[Hashable, int]]) -> None:
        """Apply (name, size) of allocations, and (name, 0) of frees."""
        for name, size in events:
            if size:
                self._live[name] = self._allocate(-(-size // 512) * 512)
            else:
                self._release(self._live.pop(name))

    def _allocate(self, size: int) -> Block:
        small = size <= MIB
        free = self._free[small]
        at = bisect_left(free, (size,))
        block = free.pop(at)[2] if at < len(free) else self._segment(size, small)
        left = block.size - size
        if left >= 512 if small else left > MIB:
            rest = Block(left, small, (block.place[0], block.place[1] + size), before=block, after=block.after)
            if rest.after:
                rest.after.before = rest
            block.size, block.after = size, rest
            self._keep(rest)
        block.free = False
        return block

    def _segment(self, size: int, small: bool) -> Block:
        whole = 2 * MIB if small else 20 * MIB if size < 10 * MIB else -(-size // (2 * MIB)) * 2 * MIB
        self.reserved += whole
        self._segments += 1
        return Block(whole, small, (self._segments, 0))

    def _release(self, block: Block) -> None:
        if block.before and block.before.free:
            self._take(block.before)
            block = self._join(block.before)
        if block.after and block.after.free:
            self._take(block.after)
            block = self._join(block)
        self._keep(block)

    def _join(self, block: Block) -> Block:
        """Add the block behind it to a block."""
        gone = block.after
        assert gone
        block.size, block.after = block.size + gone.size, gone.after
        if block.after:
            block.after.before = block
        return block

    def _keep(self, block: Block) -> None:
        block.free = True
        insort(self._free[block.small], (block.size, block.place, block))

    def _take(self, block: Block) -> None:
        free = self._free[block.small]
        del free[bisect_left(free, (block.size, block.place))]
