"""Raise KeyboardInterrupt at the n-th event of a call: a line, the way into or out of a function, a bytecode."""

import random
import signal
import sys
import threading
from pathlib import Path

import saewb

PACKAGE = Path(saewb.__file__).parent


def interrupted_at(n, call, parts, opcodes=False):
    """Call with an interrupt at event `n` inside of these files of saewb; False once there are fewer events."""
    files = {str(path) for part in parts for path in [PACKAGE / part, *(PACKAGE / part).glob("*.py")]}
    left = n

    def trace(frame, event, argument):
        nonlocal left
        if frame.f_code.co_filename not in files:
            return None
        frame.f_trace_opcodes = opcodes
        left -= event != "exception"
        if left < 0:
            sys.settrace(None)
            frame.f_trace = None
            raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return left < 0  # the interrupt was caught: a call that stops and returns what it has so far


def signals(call, tries, longest, seed=0):
    """Call `tries` times with a real signal at a random moment of up to `longest` seconds; yields after each."""
    rng = random.Random(seed)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(tries):
            was_interrupted = False
            try:
                try:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, longest))
                    call()
                finally:
                    signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                was_interrupted = True
            except ValueError as error:  # what torch makes of an interrupt while it reads a storage
                if "object type 'torch.storage.UntypedStorage'" not in str(error):
                    raise
                was_interrupted = True
            yield was_interrupted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def other_thread_can_take(lock, timeout=5.0):
    """Whether another thread gets the lock."""
    taken = []

    def take():
        if lock.acquire(timeout=timeout):
            taken.append(True)
            lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return bool(taken)
