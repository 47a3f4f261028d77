"""Subjects for worker processes: they sleep, fail, die or hang on demand."""

import os
import signal
import sys
import time

from benchmarks.harness.errors import HarnessInputError
from benchmarks.harness.subject import Stages


class Sleeper:
    """A lane and its subject: each query sleeps for `seconds`, then does what `when` says at query number `at`."""

    def __init__(self, seconds=0.001, size=3, at=None, then=None):
        self.size = size
        self.seconds = seconds
        self.at = at
        self.then = then
        self.queries = 0
        self.seen = []

    def query(self, index):
        self.queries += 1
        self.seen.append(index)
        if self.queries == self.at:
            MISHAPS[self.then]()
        time.sleep(self.seconds)

    def stages(self, index):
        begin = time.perf_counter_ns()
        self.query(index)
        done = time.perf_counter_ns()
        return Stages(begin, begin, done)

    def prepare(self):
        pass

    def lane(self):
        return self

    def description(self):
        return {
            "runtime": "sleeper",
            "version": "1",
            "device": "cpu",
            "pid": os.getpid(),
            "torch": "torch" in sys.modules,
        }

    def close(self):
        pass


def _die():
    sys.stderr.write("first line\nlibdevice: out of luck\n")
    sys.stderr.flush()
    os.kill(os.getpid(), signal.SIGSEGV)


def _raise():
    raise OSError("device lost")


def _exit():
    os._exit(3)


MISHAPS = {"die": _die, "raise": _raise, "exit": _exit, "hang": lambda: time.sleep(60)}


def open_sleeper(**arguments):
    time.sleep(0.02)
    return Sleeper(**arguments)


def refuse():
    raise HarnessInputError("The file is made for another device: build it again.")


def add(a, b):
    return a + b
