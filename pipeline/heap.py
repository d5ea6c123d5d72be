"""The C library's heap in processes that run a model on CPUs: memory that torch frees stays with the process.

In:   nothing.
Out:  settings of glibc's malloc, for this process or for one to be started.
Cost: freed memory is used again and not given back before the process ends.
Errors: none; another C library stays as it is.

torch has no cache for CPU memory: glibc gives large activations back after each layer, and takes the same pages anew
in the next one. That was 15 to 45 per cent of an encoder's time (infra/LOG.md).
"""

from __future__ import annotations

import ctypes

# One arena: those of other threads are made of 64 MiB, which hold no large activation and are unmapped when empty.
HEAP_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1"}
"""For a process that is about to start."""
_PARAMETERS = {-8: 1, -4: 0, -1: -1}  # the same by the numbers of malloc.h


def keep_freed_memory() -> None:
    """Set this process's heap; to be called before there are threads, which else have arenas already."""
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in _PARAMETERS.items():
            library.mallopt(parameter, value)
