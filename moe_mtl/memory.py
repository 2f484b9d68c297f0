"""The C allocator's habits, which decide what a training step on a CPU pays for fresh memory."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # numbers of mallopt's parameters in malloc.h


def keep_freed_memory() -> bool:
    """Lets the process keep large freed blocks for its next step instead of handing them back to the system.

    glibc returns every block over 32 MB at once, so the gradients of a bank of experts are paged in anew in every step.
    Torch asks for aligned blocks, of which only a part is found again, so the page faults fall but do not vanish. For
    programs that train or measure; a library user's process is left alone unless it asks.

    Returns:
        Whether the allocator took the setting; False where it is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
