"""Packing: which rows share a sequence of at most `max_length` tokens, each still a document of its own.

Best-fit decreasing over the whole data set: it wastes 0.001-0.2 % at 4,096 tokens. (TRL's `pack_dataset` packs within
map batches and takes token columns only; here the lengths are enough, and each row's line number must stay known.)
"""

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Bins of indices into `lengths` (tokens, each at most `capacity`), every index once; the same for the same input.

    The longest row first, each into the fullest bin that still has room for it.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []  # the distinct free sizes of open bins, ascending
    open_bins: defaultdict[int, deque[list[int]]] = defaultdict(deque)  # free size -> bins, oldest first
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"row {index} has {length} tokens, more than a sequence of {capacity}")
        position = bisect_left(rooms, length)
        if position < len(rooms):
            room = rooms[position]
            chosen = open_bins[room].popleft()
            if not open_bins[room]:
                del rooms[position]
        else:
            room, chosen = capacity, []
            bins.append(chosen)
        chosen.append(index)
        if room - length > 0:
            if not open_bins[room - length]:
                insort(rooms, room - length)
            open_bins[room - length].append(chosen)
    return bins
