"""A file layer that fails: the n-th operation on files below a folder raises an error, is interrupted, or kills."""

import errno
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager

_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "os.truncate")
_now = None
"""The `Faults` in force."""


class Faults:
    """Counts file operations below `root`; from number `n` on (or at it alone) each one fails."""

    def __init__(self, root, n, fail, persistent=False):
        self.root, self.n, self.fail, self.persistent, self.count = str(root), n, fail, persistent, 0

    def operation(self, path):
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path).startswith(self.root):
            return
        self.count += 1
        if self.count == self.n + 1 or (self.persistent and self.count > self.n):
            self.fail()


def _audit(event, arguments):
    if _now is not None and event in _EVENTS and arguments:
        _now.operation(arguments[0])


sys.addaudithook(_audit)


@contextmanager
def failing(root, n, fail, persistent=False):
    """Fail operation `n` on files below `root`: opening, renaming, removing, flushing, writing tensors."""
    global _now
    import safetensors.torch
    import torch

    faults = Faults(root, n, fail, persistent)
    real = os.fsync, safetensors.torch.serialize_file, torch.save

    def fsync(handle):
        faults.operation(root)
        return real[0](handle)

    def serialize_file(tensors, path, *rest, **options):
        faults.operation(path)
        return real[1](tensors, path, *rest, **options)

    def save(content, path, *rest, **options):
        faults.operation(path)
        return real[2](content, path, *rest, **options)

    os.fsync, safetensors.torch.serialize_file, torch.save = fsync, serialize_file, save
    _now = faults
    try:
        yield faults
    finally:
        _now = None
        os.fsync, safetensors.torch.serialize_file, torch.save = real


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt():
    raise KeyboardInterrupt


def kill():
    os._exit(9)


def killed_at(root, n, call):
    """Call in a forked process that dies at operation `n`; False if it came to its end."""
    pid = _fork(lambda: _killed_at(root, n, call))
    return _was_killed(pid, 9, f"operation {n}")


def _killed_at(root, n, call):
    with failing(root, n, kill):
        call()


def killed_after(seconds, call):
    """Call in a forked process that is killed after so long; False if it came to its end before."""
    pid, end = _fork(call), time.monotonic() + seconds
    while time.monotonic() < end and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(min(0.001, max(0.0, end - time.monotonic())))
    os.kill(pid, signal.SIGKILL)  # of one that has ended nothing comes
    return _was_killed(pid, -signal.SIGKILL, f"{seconds:.4f} s")


def _fork(call):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            call()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def _was_killed(pid, expected, when):
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, expected), f"{when}: the process ended with status {status}; its traceback is above"
    return status == expected
