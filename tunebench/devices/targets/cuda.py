"""NVIDIA's GPUs, through CUDA."""

from tunebench.spec import TargetPreset

TARGETS = (
    TargetPreset(
        "cuda",
        "cuda",
        "this machine's NVIDIA GPU",
        (("max_threads_per_block", 1024), ("max_shared_memory_per_block", 49152), ("thread_warp_size", 32)),
        device="cuda",
    ),
)
