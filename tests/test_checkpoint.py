"""Files: everything comes back exactly, and what cannot be so is refused before any harm."""

from __future__ import annotations

import errno
import os
import stat
import sys
import types
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
from conftest import BFLOAT16
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

import cupybn
from cupybn import CheckpointError, StateDict
from cupybn.checkpoint import content, npz

SUFFIXES = [".npz", ".safetensors"]
BIG_ENDIAN = [np.dtype(name) for name in (">f2", ">f4", ">f8", ">i2", ">i4", ">i8", ">u4")]
PLAIN = [np.dtype(name) for name in "?bBhHiIqQefd"]

both = pytest.mark.parametrize("suffix", SUFFIXES)


@pytest.fixture(autouse=True)
def safetensors():
    pytest.importorskip("safetensors", reason="the extra safetensors is not installed")


def assert_same(loaded, state):
    assert list(loaded) == list(state)
    for name, array in state.items():
        assert type(loaded[name]) is np.ndarray
        assert loaded[name].dtype == array.dtype, name
        assert loaded[name].dtype.byteorder == array.dtype.byteorder, name
        assert loaded[name].shape == array.shape, name
        assert loaded[name].tobytes() == array.tobytes(), name
        assert loaded[name].flags.writeable


def round_trip(state, path):
    cupybn.save(state, path)
    return cupybn.load(path)


def nasty_state():
    rng = np.random.default_rng(0)
    block = rng.standard_normal((4, 6, 2))
    state = StateDict(metadata={"": {"version": 1}, "a.bn": {"version": 2, "note": "ü"}})
    for dtype in [*PLAIN, *BIG_ENDIAN, *BFLOAT16]:
        state[f"full.{dtype.str}.{dtype.name}"] = (10 * block).astype(dtype)
        state[f"scalar.{dtype.str}.{dtype.name}"] = np.array(3).astype(dtype)
        state[f"empty.{dtype.str}.{dtype.name}"] = np.empty((2, 0, 3), dtype)
    state["transposed"] = block.T
    state["fortran"] = np.asfortranarray(block)
    state["slice"] = block[::2, ::-1, 1]
    state["broadcast"] = np.broadcast_to(np.float32(7), (3, 2))
    state["read-only"] = np.arange(3)
    state["read-only"].flags.writeable = False
    for bits in (16, 32, 64):  # every NaN is its own
        nan = np.array([-1, 1 - 2 ** (bits - 2)], f"i{bits // 8}").view(f"f{bits // 8}")
        state[f"nan{bits}"] = nan
        state[f"nan{bits} swapped"] = nan.byteswap().view(nan.dtype.newbyteorder())
    state["-0 inf"] = np.array([-0.0, np.inf, -np.inf, 5e-324])
    state["params/bn/scale"] = np.ones(1)
    state["名前 with spaces, .npy"] = np.ones(1)
    state["cupybn.json"] = np.ones(1)
    return state


@both
def test_everything_comes_back_exactly(suffix, tmp_path):
    state = nasty_state()
    loaded = round_trip(state, tmp_path / f"state{suffix}")
    assert_same(loaded, state)
    assert isinstance(loaded, StateDict)
    assert loaded.metadata == state.metadata
    assert list(loaded.metadata) == list(state.metadata)


@both
def test_a_network_of_layers(suffix, tmp_path):
    def network(seed):
        net = cupybn.Sequential(cupybn.BatchNorm2d(3), cupybn.Sequential(cupybn.BatchNorm1d(5)))
        rng = np.random.default_rng(seed)
        net[0](rng.standard_normal((2, 3, 4, 4)).astype(np.float32))
        return net

    source, target = network(0), network(1)
    target.load_state_dict(round_trip(source.state_dict(), tmp_path / f"net{suffix}"))
    assert_same(target.state_dict(), source.state_dict())
    assert target.state_dict().metadata == source.state_dict().metadata


def test_numpy_and_safetensors_read_the_files(tmp_path):
    from safetensors.numpy import load_file

    state = {"bn.weight": np.arange(6.0).reshape(2, 3).T, "bn.count": np.array(4)}
    for suffix, read in ((".npz", np.load), (".safetensors", load_file)):
        path = tmp_path / f"state{suffix}"
        cupybn.save(state, path)
        theirs = read(path)
        for name, array in state.items():
            np.testing.assert_array_equal(theirs[name], array, strict=True)


@pytest.mark.skipif(not BFLOAT16, reason="ml_dtypes is not installed")
def test_bfloat16_is_its_bits_for_numpy_and_itself_for_safetensors(tmp_path):
    state = {"x": np.array([1.5, -3], BFLOAT16[0])}
    cupybn.save(state, tmp_path / "x.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "x.npz")["x"], state["x"].view(np.uint16))
    cupybn.save(state, tmp_path / "x.safetensors")
    assert b'"dtype":"BF16"' in (tmp_path / "x.safetensors").read_bytes()


@pytest.mark.skipif(not BFLOAT16, reason="ml_dtypes is not installed")
@both
def test_bfloat16_without_ml_dtypes_names_the_extra(suffix, tmp_path, monkeypatch):
    cupybn.save({"x": np.ones(2, BFLOAT16[0])}, tmp_path / f"x{suffix}")
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match="x is bfloat16.*pip install ml_dtypes"):
        cupybn.load(tmp_path / f"x{suffix}")


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    cupybn.save({"x": np.ones(2)}, path)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for attempt in (lambda: cupybn.load(path), lambda: cupybn.save({}, path)):
        with pytest.raises(ImportError, match="pip install safetensors"):
            attempt()
    assert os.listdir(tmp_path) == ["x.safetensors"]
    monkeypatch.undo()
    assert_same(cupybn.load(path), {"x": np.ones(2)})


names = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\\"), min_size=1, max_size=30
).filter(lambda name: not content.name_fault(name))


@both
@given(
    state=st.dictionaries(
        names,
        st.sampled_from([*PLAIN, *BIG_ENDIAN]).flatmap(
            lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, min_side=0, max_dims=4))
        ),
        max_size=4,
    ),
    metadata=st.dictionaries(
        st.text(max_size=5),
        st.dictionaries(st.text(max_size=5), st.integers() | st.floats(allow_nan=False,
                        allow_infinity=False) | st.text() | st.lists(st.booleans())),
        max_size=3,
    ),
)  # fmt: skip
@settings(deadline=None, max_examples=150)
def test_any_state_round_trips(suffix, state, metadata, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    loaded = round_trip(StateDict(state, metadata=metadata), path)
    assert_same(loaded, state)
    assert loaded.metadata == metadata
    again = path.read_bytes()
    cupybn.save(loaded, path)
    assert path.read_bytes() == again


@both
def test_dicts_of_pytorch_and_of_nobody(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    state = OrderedDict(weight=np.ones(2))
    assert round_trip(state, path).metadata == {}
    state._metadata = OrderedDict({"": {"version": 2}})
    assert round_trip(state, path).metadata == {"": {"version": 2}}


class Tensor:
    """What offers DLPack, as PyTorch's tensors do."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@both
def test_dlpack_and_cupy_arrays_come_back_as_numpy(suffix, tmp_path, monkeypatch):
    class FakeCuPyArray:
        def __init__(self, host):
            self.host = host

        def get(self):
            return self.host.copy()

    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(ndarray=FakeCuPyArray))
    host = np.arange(6.0).reshape(2, 3).T
    state = {"device": FakeCuPyArray(host), "tensor": Tensor(host)}
    loaded = round_trip(state, tmp_path / f"x{suffix}")
    assert_same(loaded, {"device": host, "tensor": host})


@pytest.mark.gpu
@both
def test_arrays_on_a_gpu(suffix, tmp_path):
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    host = {"x": np.arange(6.0).reshape(2, 3).T[::2], "count": np.array(3), "none": np.ones((0, 2))}
    state = {name: cupy.asarray(array) for name, array in host.items()}
    state["x"] = cupy.asarray(np.arange(6.0).reshape(2, 3)).T[::2]
    assert_same(round_trip(state, tmp_path / f"x{suffix}"), host)


# ---- what cannot be saved ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        ("", "not empty"),
        (3, "names are strings"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("..\\evil", "backslash"),
        ("/etc/passwd", "leads out"),
        ("C:evil", "leads out"),
        ("a/../../b", "leads out"),
        ("..", "leads out"),
        ("__metadata__", "safetensors"),
        ("é" * 501, "1000 bytes"),
        ("\ud800", "Unicode"),
    ],
)
@both
def test_names_that_do_not_fit(name, message, suffix, tmp_path):
    with pytest.raises(ValueError, match=message) as raised:
        cupybn.save({"ok": np.ones(1), name: np.ones(1)}, tmp_path / f"x{suffix}")
    assert repr(name) in str(raised.value)
    assert not os.listdir(tmp_path)


@both
def test_the_most_dimensions(suffix, tmp_path):
    state = {"x": np.ones((1,) * 64), "none": np.ones((0,) + (1,) * 63)}
    assert_same(round_trip(state, tmp_path / f"x{suffix}"), state)


def test_the_longest_name(tmp_path):
    for suffix in SUFFIXES:
        state = {"é" * 500: np.ones(1)}
        assert_same(round_trip(state, tmp_path / f"x{suffix}"), state)


@pytest.mark.parametrize(
    "value",
    [3, [1.0], "text", None, np.array(["a"]), np.array([{}]), np.zeros(2, "V2"), np.ones(1, "c16"),
     np.ones(1, "g"), np.zeros(1, "M8[s]"), np.zeros(1, [("a", "f4")])],
    ids=repr,
)  # fmt: skip
@both
def test_values_that_do_not_fit(value, suffix, tmp_path):
    with pytest.raises(cupybn.DTypeError, match="^bn.extra"):
        cupybn.save({"bn.extra": value}, tmp_path / f"x{suffix}")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "metadata",
    [{"": {"version": np.int64(2)}}, {"": {"x": float("nan")}}, {"": {"x": float("inf")}},
     {3: {}}, {"": {"x": (1,)}},
     {"": {3: 4}}],
)  # fmt: skip
def test_metadata_that_does_not_fit(metadata, tmp_path):
    with pytest.raises(TypeError, match="JSON"):
        cupybn.save(StateDict(metadata=metadata), tmp_path / "x.npz")
    state = OrderedDict()
    state._metadata = {"": 3}
    with pytest.raises(TypeError, match="dict of dicts"):
        cupybn.save(state, tmp_path / "x.npz")
    assert not os.listdir(tmp_path)


def test_a_layer_is_no_state(tmp_path):
    with pytest.raises(TypeError, match=r"state_dict must be a mapping.*got BatchNorm2d"):
        cupybn.save(cupybn.BatchNorm2d(3), tmp_path / "x.npz")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["x", "x.npy", "x.pt", "x.NPZ", "npz", ".npz"])
def test_suffixes(name, tmp_path):
    for attempt in (lambda path: cupybn.save({}, path), cupybn.load):
        with pytest.raises(CheckpointError, match=r"must end in \.npz or \.safetensors"):
            attempt(tmp_path / name)


# ---- the file in its folder --------------------------------------------------------------------


@pytest.fixture
def umask():
    """Sets the umask, for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@both
def test_permissions_are_those_that_open_gives(suffix, tmp_path, umask):
    path = tmp_path / f"x{suffix}"
    umask(0o027)
    cupybn.save({}, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)  # open("wb") leaves those of a file that is there
    cupybn.save({"x": np.ones(1)}, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert list(cupybn.load(path)) == ["x"]


@both
def test_a_symbolic_link_stays_and_its_target_is_replaced(suffix, tmp_path):
    target, link = tmp_path / "there" / f"x{suffix}", tmp_path / f"link{suffix}"
    target.parent.mkdir()
    link.symlink_to(f"there/x{suffix}")
    for value in (1.0, 2.0):  # at first the link points to nothing
        cupybn.save({"x": np.full(1, value)}, link)
        assert link.is_symlink()
        assert cupybn.load(target)["x"] == value
        assert os.listdir(target.parent) == [target.name]


def test_what_is_no_file_is_not_replaced(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "null.npz").symlink_to(os.devnull)
    for name in ("folder.npz", "null.npz"):
        with pytest.raises(OSError, match="not a regular file"):
            cupybn.save({}, tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["folder.npz", "null.npz"]
    assert not stat.S_ISREG(os.stat(os.devnull).st_mode)
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("null", "pipe"):
        with pytest.raises(CheckpointError, match=rf"{name}\.npz: not a regular file"):
            cupybn.load(tmp_path / f"{name}.npz")


@both
def test_errors_of_the_system_stay_what_they_are(suffix, tmp_path):
    with pytest.raises(FileNotFoundError):
        cupybn.load(tmp_path / f"none{suffix}")
    with pytest.raises(FileNotFoundError):
        cupybn.save({}, tmp_path / "no folder" / f"x{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    with pytest.raises(IsADirectoryError):
        cupybn.load(tmp_path / f"folder{suffix}")


def test_a_seek_that_cannot_be_is_damage_and_want_of_disk_or_memory_is_not(tmp_path, monkeypatch):
    cupybn.save({}, tmp_path / "x.npz")
    for error, kind in (
        (OSError(errno.EINVAL, "of the system"), CheckpointError),
        (OSError(errno.EIO, "of the system"), OSError),
        (MemoryError("of the system"), MemoryError),
    ):

        def fail(file, error=error):
            raise error

        monkeypatch.setattr(npz, "ZipFile", fail)
        with pytest.raises(kind, match="of the system"):
            cupybn.load(tmp_path / "x.npz")


@both
@pytest.mark.parametrize(
    "failing, error",
    [
        ("fsync", OSError(28, "No space left on device")),
        ("replace", OSError(28, "No space left on device")),
        ("fsync", KeyboardInterrupt()),
        ("replace", KeyboardInterrupt()),
        ("chmod", KeyboardInterrupt()),
    ],
)
def test_a_failure_leaves_the_old_file_and_nothing_else(
    suffix, failing, error, tmp_path, monkeypatch
):
    path = tmp_path / f"x{suffix}"
    cupybn.save({"x": np.zeros(3)}, path)

    def fail(*args):
        raise error

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(type(error)):
        cupybn.save({"x": np.ones(3)}, path)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [path.name]
    assert_same(cupybn.load(path), {"x": np.zeros(3)})


@both
@pytest.mark.parametrize("values", [3, 10_000])
def test_the_file_is_on_the_disk_before_it_has_its_name_and_the_folder_after(
    values, suffix, tmp_path, monkeypatch
):
    path = tmp_path / f"x{suffix}"
    calls = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor):
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        size = os.fstat(descriptor).st_size if kind == "file" else 0
        calls.append((kind, size))
        fsync(descriptor)

    def spy_replace(source, target):
        calls.append(("replace", os.path.getsize(source)))
        assert os.path.dirname(source) == os.path.dirname(target)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    cupybn.save({"x": np.arange(values)}, path)
    size = path.stat().st_size
    assert size > 8 * values
    assert calls == [("file", size), ("replace", size), ("folder", 0)]


def test_large_members_use_zip64(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 2000)
    state = {"small": np.ones(3), "large": np.arange(1000.0), "last": np.ones(1)}
    path = tmp_path / "x.npz"
    cupybn.save(state, path)
    with zipfile.ZipFile(path) as archive:
        assert archive.infolist()[2].extract_version == zipfile.ZIP64_VERSION
    assert_same(cupybn.load(path), state)
