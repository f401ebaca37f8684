"""Saves where the file system, its mounts or the permissions refuse something."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest

import cupybn

SUFFIXES = [".npz"]
try:
    import safetensors  # noqa: F401

    SUFFIXES.append(".safetensors")
except ImportError:
    pass
both = pytest.mark.parametrize("suffix", SUFFIXES)
OLD, NEW = {"x": np.zeros(3)}, {"x": np.ones(3)}


def holds(path, state):
    loaded = cupybn.load(path)
    return list(loaded) == list(state) and all((loaded[k] == v).all() for k, v in state.items())


def refusing(monkeypatch, name, number, when=lambda *args: True):
    """Lets a function of ``os`` fail with this error."""
    real = getattr(os, name)

    def refused(*args, **options):
        if when(*args):
            raise OSError(number, os.strerror(number), *map(str, args[:1]))
        return real(*args, **options)

    monkeypatch.setattr(os, name, refused)


def is_folder(descriptor):
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@both
@pytest.mark.parametrize("old", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP, errno.EACCES, errno.EIO])
def test_a_folder_that_cannot_be_flushed(number, old, suffix, tmp_path, monkeypatch):
    path = tmp_path / f"x{suffix}"
    if old:
        cupybn.save(OLD, path)
    refusing(monkeypatch, "fsync", number, is_folder)
    cupybn.save(NEW, path)
    assert holds(path, NEW)
    assert os.listdir(tmp_path) == [path.name]


@both
@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666])
def test_a_mode_that_cannot_be_set(mode, number, suffix, tmp_path, monkeypatch):
    """No wider than it was; and the same where a new file may have it."""
    path = tmp_path / f"x{suffix}"
    cupybn.save(OLD, path)
    path.chmod(mode)
    for name in ("chmod", "fchmod"):
        refusing(monkeypatch, name, number)
    before = os.umask(0o022)
    try:
        cupybn.save(NEW, path)
    finally:
        os.umask(before)
    assert holds(path, NEW)
    assert stat.S_IMODE(path.stat().st_mode) == mode & ~0o022


def test_a_private_file_is_private_while_it_is_written(tmp_path, monkeypatch):
    path, modes = tmp_path / "x.npz", []
    cupybn.save(OLD, path)
    path.chmod(0o600)
    write = cupybn.checkpoint.npz.write

    def spy(file, content):
        modes.append(stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        write(file, content)

    monkeypatch.setattr(cupybn.checkpoint.npz, "write", spy)
    cupybn.save(NEW, path)
    assert modes == [0o600]


@both
@pytest.mark.parametrize("sizes", [(3, 5000), (5000, 3), (0, 0)], ids=str)
def test_a_rename_over_a_mounted_file(sizes, suffix, tmp_path, monkeypatch):
    """It is written into that file, which keeps its mode and whoever has it open."""
    path = tmp_path / f"x{suffix}"
    old, new = ({"x": np.full(size, 7.0)} for size in sizes)
    cupybn.save(old, path)
    path.chmod(0o600)
    before = path.stat()
    refusing(monkeypatch, "replace", errno.EBUSY)
    cupybn.save(new, path)
    assert holds(path, new)
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mode == before.st_mode
    assert os.listdir(tmp_path) == [path.name]


@both
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EFBIG, errno.EOPNOTSUPP])
def test_a_mounted_file_without_room_for_the_new_one(number, suffix, tmp_path, monkeypatch):
    path = tmp_path / f"x{suffix}"
    cupybn.save(OLD, path)
    refusing(monkeypatch, "replace", errno.EBUSY)

    def filled_in_part(descriptor, offset, size):
        os.truncate(descriptor, size - 1)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", filled_in_part)
    with pytest.raises(OSError, match=os.strerror(number)) as raised:
        cupybn.save({"x": np.ones(5000)}, path)
    assert (raised.value.errno, raised.value.filename) == (number, str(path))
    assert holds(path, OLD)
    assert os.listdir(tmp_path) == [path.name]


@both
def test_a_mounted_file_that_is_lost_half_way(suffix, tmp_path, monkeypatch):
    """The new content is whole, under the name in the error."""
    path = tmp_path / f"x{suffix}"
    cupybn.save(OLD, path)
    refusing(monkeypatch, "replace", errno.EBUSY)
    refusing(monkeypatch, "fsync", errno.EIO, lambda d: os.fstat(d).st_ino == path.stat().st_ino)
    with pytest.raises(OSError, match="what was to be saved is in") as raised:
        cupybn.save(NEW, path)
    assert (raised.value.errno, raised.value.filename) == (errno.EIO, str(path))
    monkeypatch.undo()
    [kept] = [name for name in os.listdir(tmp_path) if name != path.name]
    assert f"is in {tmp_path / kept}: " in str(raised.value)
    os.rename(tmp_path / kept, path)
    assert holds(path, NEW)


def test_another_error_of_a_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    cupybn.save(OLD, path)
    refusing(monkeypatch, "replace", errno.EPERM)
    with pytest.raises(PermissionError) as raised:
        cupybn.save(NEW, path)
    assert raised.value.filename == str(path)
    assert raised.value.filename2 is None
    assert holds(path, OLD)
    assert os.listdir(tmp_path) == [path.name]


CHILD = """
import os, sys, numpy as np, cupybn
path = sys.argv[1]
if len(sys.argv) > 2 and os.geteuid() == 0:
    os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
try:
    cupybn.save({"x": np.ones(3)}, path)
    print("saved")
except OSError as error:
    print(type(error).__name__, error.filename == path, error)
"""


def save_in_child(path, *arguments, before=()):
    command = [*before, sys.executable, "-c", CHILD, str(path), *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def mounting(what):
    """A command that runs another one under a mount of its own; skips where there is none."""
    mount = ["unshare", "-rm", "sh", "-ec", f'{what}\nexec "$@"', "-"]
    if not shutil.which("unshare") or subprocess.run([*mount, "true"]).returncode:
        pytest.skip("nothing can be mounted here")
    return mount


def test_a_file_that_is_mounted(tmp_path):
    """A real mount, as of a container that is given a single file."""
    path, outside = tmp_path / "x.npz", tmp_path / "outside.npz"
    for file in (path, outside):
        cupybn.save(OLD, file)
    before = outside.stat().st_ino
    assert save_in_child(path, before=mounting(f"mount --bind '{outside}' '{path}'")) == "saved"
    assert holds(outside, NEW)
    assert outside.stat().st_ino == before
    assert holds(path, OLD)  # below the mount
    assert sorted(os.listdir(tmp_path)) == ["outside.npz", "x.npz"]


def test_a_file_that_is_mounted_from_a_disk_that_is_full(tmp_path):
    path, disk = tmp_path / "x.npz", tmp_path / "disk"
    np.savez(path)  # smaller than what is saved
    disk.mkdir()
    mount = mounting(f"""
        mount -t tmpfs -o size=8k tmpfs '{disk}'
        cp '{path}' '{disk}/x.npz'
        head -c 100k /dev/zero >'{disk}/rest' 2>/dev/null || true
        mount --bind '{disk}/x.npz' '{path}'""")
    script = 'cp "$1" "$1.before"; "$2" -c "$3" "$1"; cmp "$1" "$1.before"'
    command = [*mount, "sh", "-c", script, "-", path, sys.executable, CHILD.replace("3)", "999)")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert process.returncode == 0, process.stdout + process.stderr  # the old file is whole
    assert process.stdout.startswith("OSError True [Errno 28] No space left on device")
    assert sorted(os.listdir(tmp_path)) == ["disk", "x.npz", "x.npz.before"]


@pytest.fixture
def open_folder(tmp_path):
    """A folder that every user can reach."""
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    tmp_path.chmod(0o777)
    return tmp_path


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no users here")
def test_a_folder_that_can_be_written_and_not_read(open_folder):
    """A drop box, mode 0300, by a user whom it keeps out."""
    box, nobody = open_folder / "box", 65534 if os.geteuid() == 0 else os.geteuid()
    box.mkdir()
    if os.geteuid() == 0:
        os.chown(box, nobody, nobody)
    box.chmod(0o300)
    assert save_in_child(box / "x.npz", nobody) == "saved"
    box.chmod(0o700)
    assert holds(box / "x.npz", NEW)
    assert os.listdir(box) == ["x.npz"]


def read_only(path, mode):
    cupybn.save(OLD, path)
    path.chmod(mode)


@both
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "by a link"])
def test_a_read_only_file_is_not_replaced(linked, suffix, tmp_path):
    """Not by root either, who could write to it."""
    path = target = tmp_path / f"x{suffix}"
    read_only(target, 0o444)
    if linked:
        path = tmp_path / f"link{suffix}"
        path.symlink_to(target)
    with pytest.raises(PermissionError, match="read-only") as raised:
        cupybn.save(NEW, path)
    assert raised.value.filename == str(path)
    assert holds(target, OLD)
    assert stat.S_IMODE(target.stat().st_mode) == 0o444
    target.chmod(0o644)
    cupybn.save(NEW, path)
    assert holds(target, NEW)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs another user")
def test_a_file_of_somebody_else_is_not_replaced(open_folder):
    path = open_folder / "x.npz"
    read_only(path, 0o644)
    assert save_in_child(path, 65534).startswith("PermissionError True")
    assert holds(path, OLD)
    assert os.listdir(open_folder) == ["x.npz"]


@both
def test_errors_name_the_path_that_was_given(suffix, tmp_path, monkeypatch):
    """Neither the temporary file nor where a symbolic link leads."""
    monkeypatch.chdir(tmp_path)
    os.symlink("nowhere/x", "dangling" + suffix)
    os.symlink("loop" + suffix, "loop" + suffix)
    (tmp_path / "file").write_text("")
    os.mkdir("folder" + suffix)
    for name, kind in (
        ("no folder/x", FileNotFoundError),
        ("dangling", FileNotFoundError),
        ("loop", OSError),
        ("file/x", NotADirectoryError),
        ("folder", OSError),
    ):
        with pytest.raises(kind) as raised:
            cupybn.save(NEW, name + suffix)
        assert raised.value.filename == name + suffix
        assert str(raised.value).endswith(f": {name + suffix!r}")
    assert os.path.islink("loop" + suffix)


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    cupybn.save(OLD, path)
    resource = pytest.importorskip("resource")
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            cupybn.save({"x": np.ones(10_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(path)
    assert holds(path, OLD)
    assert os.listdir(tmp_path) == ["x.npz"]


@both
def test_paths_as_bytes(suffix, tmp_path):
    path = os.fsencode(tmp_path / f"ü{suffix}")
    cupybn.save(NEW, path)
    assert holds(path, NEW)
    assert holds(os.fsdecode(path), NEW)
    with pytest.raises(cupybn.CheckpointError, match=r"^x\.pt: the name must end in"):
        cupybn.save(NEW, b"x.pt")
    with pytest.raises(OSError, match="No such file") as raised:
        cupybn.save(NEW, b"no folder/x.npz")
    assert raised.value.filename == "no folder/x.npz"
    odd = os.fsencode(tmp_path) + b"/\xff" + suffix.encode()  # no UTF-8
    try:
        cupybn.save(NEW, odd)
    except OSError as error:  # of a system whose names are text
        assert error.errno == errno.EILSEQ
    else:
        assert holds(odd, NEW)
