"""A function in a thread of its own: its result, its error, the caller's modes, and interrupts of the caller."""

import subprocess
import sys

import pytest
import torch

from hf_swiglu.new_thread import in_new_thread

NEW_THREADS = """
import random, signal, time
from hf_swiglu.new_thread import in_new_thread
random.seed(0)
interrupted, armed = 0, False

def handler(*_):
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, handler)
for _ in range(4000):
    try:
        try:
            armed = True
            signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-4))
            in_new_thread(lambda: time.sleep(1e-4))
        finally:
            armed = False
    except KeyboardInterrupt:
        interrupted += 1
print(interrupted)
"""


@pytest.mark.slow
def test_an_interrupt_while_another_thread_runs_is_a_keyboard_interrupt():
    done = subprocess.run([sys.executable, "-c", NEW_THREADS], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000


def test_a_new_thread_raises_what_its_function_raises():
    with pytest.raises(ZeroDivisionError):
        in_new_thread(lambda: 1 / 0)
    assert in_new_thread(torch.is_grad_enabled)
    with torch.no_grad():
        assert in_new_thread(torch.is_grad_enabled)
