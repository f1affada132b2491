"""Libraries that several threads import at once."""

from __future__ import annotations

import subprocess
import sys

THREADS = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
from dray.processes.imports import first_import, whole
ready, failures = threading.Barrier(6), []
def lean():
    ready.wait()
    with first_import("swapping", without=("zoo",)):
        import swapping
def ask():
    ready.wait()
    time.sleep(0.05)
    try:
        whole("swapping").answer
    except AttributeError as error:
        failures.append(str(error))
threads = [threading.Thread(target=lean), *(threading.Thread(target=ask) for _ in range(5))]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(failures))
"""
PACKAGE = """
import sys, time, types
time.sleep(0.3)
late = types.ModuleType(__name__)
late.answer = 42
late.__spec__ = __spec__
sys.modules[__name__] = late
"""
"""It exchanges itself at the end of its import, as transformers does."""


def test_no_thread_is_given_the_half_that_was_exchanged(tmp_path) -> None:
    """Two trials that began at once met the other's import of transformers, and one failed."""
    (tmp_path / "swapping.py").write_text(PACKAGE)
    done = subprocess.run(
        [sys.executable, "-c", THREADS, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"
    plain = THREADS.replace('whole("swapping").answer', "import swapping; swapping.answer")
    done = subprocess.run(
        [sys.executable, "-c", plain, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() != "0", "a plain import shows the mistake"
