"""After ``cluster`` nothing is left of it, however it ended: as root, on the machine itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from processes import family

CLUSTER = Path(__file__).resolve().parent / "cluster"
DAEMONS = {"munged", "slurmctld", "slurmd", "sshd"}
FOLDERS = ("/etc", "/etc/ssh", "/mnt", "/usr/sbin", "/var/lib")
# A signal for it, its code, the daemons that were there.
ENDINGS = {
    "the command fails": (None, 3, DAEMONS),
    "a host does not start": (None, 1, {"munged", "slurmctld"}),
    "SIGINT, as from Ctrl-C": (signal.SIGINT, 130, DAEMONS),
    "SIGKILL": (signal.SIGKILL, -signal.SIGKILL, DAEMONS),
}

pytestmark = pytest.mark.timeout(300)


def namespaces(pid):
    """The namespaces of a process that are not this one's."""
    links = set()
    with suppress(OSError):  # it has ended
        links = {os.readlink(entry) for entry in Path(f"/proc/{pid}/ns").iterdir()}
    return links - {os.readlink(entry) for entry in Path("/proc/self/ns").iterdir()}


def machine():
    """What the cluster must not change: mounts, interfaces, users, packages."""
    mounts = Path("/proc/self/mountinfo").read_text()
    return {
        "mounts": sorted(line.split()[4] for line in mounts.splitlines()),
        "interfaces": sorted(entry.name for entry in Path("/sys/class/net").iterdir()),
        "names": sorted(str(entry) for folder in FOLDERS for entry in Path(folder).glob("*")),
        "users": Path("/etc/passwd").read_text(),
        "hosts": Path("/etc/hosts").read_text(),
    }


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left(ending, tmp_path):
    number, code, daemons = ENDINGS[ending]
    before = machine()
    environment = dict(os.environ)
    if ending == "a host does not start":
        environment["BASH_FUNC_slurmd%%"] = "() { return 1; }"
    command = "echo; sleep 1000" if number else "echo; sleep 1; exit 3"
    ready = tmp_path / "ready"
    with ready.open("w") as out, subprocess.Popen(
        [CLUSTER, "sh", "-c", command],
        env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # ignored in background
    ) as process:  # fmt: skip
        members, spaces, programs = set(), set(), set()
        while process.poll() is None:
            for pid in family(process.pid):
                with suppress(OSError):
                    programs.add(Path(f"/proc/{pid}/comm").read_text().strip())
                members.add(pid)
                spaces |= namespaces(pid)
            if number and ready.read_text():
                break
            time.sleep(0.1)
        if number == signal.SIGKILL:
            process.kill()
        elif number:
            os.killpg(process.pid, number)
        try:
            assert process.wait(30) == code, ready.read_text()
        finally:
            process.kill()
    assert programs >= daemons, programs  # so something was there
    time.sleep(1)
    left = [pid for pid in map(int, filter(str.isdecimal, os.listdir("/proc")))
            if namespaces(pid) & spaces]  # fmt: skip
    assert not left
    assert not [pid for pid in members if Path(f"/proc/{pid}").exists() and namespaces(pid)]
    assert machine() == before
