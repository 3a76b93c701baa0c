"""How many bytes a step holds at its peak, counted allocation by allocation.

`ru_maxrss` is too coarse for small shapes, `tracemalloc` does not see torch. torch's profiler reports every allocation
and release of the CPU allocator, temporaries inside an operation included. MKL's packing buffers are not torch's; they
are missing in every arm. `KINETO_LOG_LEVEL=9` silences the profiler's own lines.
"""

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def transient_bytes(step: Callable[[], object]) -> int:
    """Most bytes held at once during `step` beyond those held before it, on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    inner = profiler.profiler
    assert inner is not None
    assert inner.kineto_results is not None
    events = [event for event in inner.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def cuda_transient_bytes(step: Callable[[], object]) -> int:
    """The same on the current CUDA device, as its caching allocator counts (`max_memory_allocated`)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
