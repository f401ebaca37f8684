"""Saves killed at random moments: the file is the old one or the new one, every time.

As a script with the argument "serve", this file saves in processes of its own, and kills them;
without arguments it prints the figures of docs/checkpoints.md, in the folder it is started in.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import rank_environment

import cupybn

KILLS = 50
VALUES = 2_000_000  # 16 MB


def serve():
    """For each line "VERSION DELAY PATH", a process that saves; answers with its seconds.

    It is killed after the delay, if it still runs; not at all if the delay is "none".
    """
    state = cupybn.StateDict({"a": np.empty(VALUES), "version": np.array(0)})
    for line in sys.stdin:
        version, delay, path = line.split()
        state["a"][:] = state["version"][()] = int(version)
        begin = time.perf_counter()
        pid = os.fork()
        if pid == 0:
            cupybn.save(state, path)
            os._exit(0)
        if delay != "none":
            time.sleep(float(delay))
            os.kill(pid, signal.SIGKILL)  # a process that has ended keeps its pid until the wait
        os.waitpid(pid, 0)
        print(time.perf_counter() - begin, flush=True)


class Server:
    """The process that saves on demand."""

    def __init__(self, path):
        self.path = path
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve"], env=rank_environment(), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def save(self, version, delay="none"):
        """How many seconds it took; killed after so many if a delay is given."""
        self.process.stdin.write(f"{version} {delay} {self.path}\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def version_in(path):
    """The version of the file; all of its arrays must be of that version."""
    state = cupybn.load(path)
    version = int(state["version"])
    assert (state["a"] == version).all()
    return version


def kill_many(path):
    """(seconds of a whole save, where the kills landed: a Counter)."""
    server = Server(path)
    try:
        typical = statistics.median([server.save(version) for version in range(5)])
        landed = Counter()
        chance = random.Random(0)
        old = version_in(path)
        for version in range(5, 5 + KILLS):
            server.save(version, delay=chance.uniform(0, 1.1 * typical))
            found = version_in(path)
            assert found in (old, version)
            left = [name for name in path.parent.iterdir() if name != path]
            assert len(left) <= 1
            if found == version:
                landed["after the new file was in place"] += 1
                assert not left
            elif not left:
                landed["before the temporary file was there"] += 1
            else:
                size = left[0].stat().st_size
                whole = size == path.stat().st_size
                landed[
                    "with the temporary file written, before it was in place"
                    if whole
                    else "with the temporary file written in part"
                    if size
                    else "with the temporary file still empty"
                ] += 1
                assert left[0].name.startswith(".cupybn-")
                left[0].unlink()
            old = found
    finally:
        server.close()
    assert landed.total() == KILLS
    return typical, landed


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_fifty_saves_killed_at_random_moments_leave_the_old_file_or_the_new(suffix, tmp_path):
    pytest.importorskip("safetensors", reason="the extra safetensors is not installed")
    _, landed = kill_many(tmp_path / f"x{suffix}")
    in_the_middle = [place for place in landed if place.startswith("with the temporary")]
    assert sum(landed[place] for place in in_the_middle) >= 5, landed


def main():
    for suffix in (".npz", ".safetensors"):
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            seconds, landed = kill_many(Path(folder) / f"x{suffix}")
        print(f"{suffix}: {8 * VALUES / 1e6:.0f} MB, a whole save takes {1000 * seconds:.0f} ms;")
        print(f"  {landed.total()} of {KILLS} files complete, the old one or the new one; killed")
        for place, count in landed.most_common():
            print(f"  {count:3} {place}")


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main()
