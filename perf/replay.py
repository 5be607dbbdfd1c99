"""How long a captured CUDA graph takes. Used by the benchmarks that measure kernels in graphs."""

import torch


def median_milliseconds(graph: torch.cuda.CUDAGraph, repeat: int, warm: int = 1) -> float:
    """Median time of `repeat` replays after `warm` others."""
    for _ in range(warm):
        graph.replay()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[repeat // 2]
