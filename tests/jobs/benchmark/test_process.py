"""The process of a row, with a stand-in for the row."""

import os
import signal
import subprocess
import sys
import time

import pytest

# Starts a row that never ends, and prints the number of its process.
PARENT = """
import multiprocessing.context
import sys
import threading
import time
import types

sys.modules["compress.jobs.benchmark.row"] = row = types.ModuleType("row")
row.measure = lambda task: time.sleep(600)
multiprocessing.context.ForkServerContext.set_forkserver_preload = lambda *ignored: None

from compress.jobs.benchmark.process import measure_apart


def tell():
    while not (children := multiprocessing.active_children()):
        time.sleep(0.02)
    print(children[0].pid, flush=True)


if __name__ == "__main__":
    threading.Thread(target=tell, daemon=True).start()
    measure_apart(None)
"""


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM])
def test_a_row_ends_with_the_process_that_asked_for_it(tmp_path, ended_by):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as parent:
        row = int(parent.stdout.readline())
        time.sleep(0.5)
        assert lives(row)
        parent.send_signal(ended_by)
        parent.wait(10)
        deadline = time.monotonic() + 10
        while lives(row) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not lives(row)
