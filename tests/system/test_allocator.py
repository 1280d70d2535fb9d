import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from compress.system.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(16):  # until the heap has its size
    torch.ones(2**24)
before = faults()
for _ in range(16):
    torch.ones(2**24)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    def faults(how):
        bare = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, env=bare)
        return int(done.stdout)

    assert faults("keep") < faults("leave") / 10


def test_other_c_libraries_are_left_alone(monkeypatch):
    from compress.system import allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert allocator.keep_freed_memory() is False
