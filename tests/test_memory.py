"""Large freed blocks come back without page faults."""

import subprocess
import sys

import pytest

CODE = """
import ctypes, resource
from moe_mtl.memory import keep_freed_memory
if {keep} and not keep_freed_memory():
    raise SystemExit("not glibc")
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def faults():
    block = libc.malloc(ctypes.c_size_t(80_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    ctypes.memset(block, 1, 80_000_000)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    libc.free(block)
    return after - before
faults()
print(faults())
"""


def page_faults(keep: bool) -> int:
    done = subprocess.run([sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True)
    if "not glibc" in done.stderr:
        pytest.skip("the C allocator is not glibc's")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_freed_block_is_reused():
    given_back, kept = page_faults(False), page_faults(True)
    if given_back < 100:
        pytest.skip("this allocator keeps large blocks anyway")
    assert kept < given_back / 10
