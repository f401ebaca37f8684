"""Damaged and malicious files: CheckpointError, before anything large is read or allocated."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import BFLOAT16

import cupybn
from cupybn import CheckpointError, StateDict
from cupybn.checkpoint import content, npz, safetensors

FORMS = {".npz": npz, ".safetensors": safetensors}
PAYLOAD = np.arange(200_000.0)  # 1.6 MB, which no refusal should read

both = pytest.mark.parametrize("suffix", FORMS)
pytest.importorskip("safetensors", reason="the extra safetensors is not installed")


def small_state():
    layer = cupybn.BatchNorm1d(3)
    layer(np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32))
    state = layer.state_dict()
    state["half"] = np.ones((1, 2), [*BFLOAT16, np.dtype(">f2")][0])
    return state


def same(loaded, state):
    return (
        list(loaded) == list(state)
        and loaded.metadata == state.metadata
        and all(
            (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
            for a, b in zip(loaded.values(), state.values(), strict=True)
        )
    )


def outcome(path, data, state):
    """Writes and loads the data: "refused", or "same"."""
    path.write_bytes(data)
    try:
        loaded = cupybn.load(path)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ")
        return "refused"
    assert same(loaded, state)
    return "same"


@both
def test_every_truncation(suffix, tmp_path):
    path, state = tmp_path / f"x{suffix}", small_state()
    cupybn.save(state, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        assert outcome(path, whole[:length], state) == "refused", length
    assert outcome(path, whole, state) == "same"


def flips(suffix, folder, count=500):
    """Of `count` files with one bit flipped, how many are refused."""
    path, state = folder / f"flipped{suffix}", small_state()
    cupybn.save(state, path)
    whole = path.read_bytes()
    bits = np.random.default_rng(1).choice(8 * len(whole), count, replace=False)
    found = []
    for bit in bits:
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        found.append(outcome(path, bytes(data), state))
    return found.count("refused"), len(whole)


@both
def test_five_hundred_bit_flips(suffix, tmp_path):
    refused, _ = flips(suffix, tmp_path)
    assert refused > 400  # the others hit what says nothing about the data, times for example


@both
def test_bytes_before_and_after(suffix, tmp_path):
    path, state = tmp_path / f"x{suffix}", small_state()
    cupybn.save(state, path)
    whole = path.read_bytes()
    for data in (b"\0" + whole, whole + b"\0", whole + whole):
        outcome(path, data, state)


@both
def test_the_messages_say_which(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    cupybn.save({"x": np.zeros(100)}, path)
    whole = path.read_bytes()
    for data, message in [
        (b"", "truncated, or not a"),
        (whole[:-1], "truncated"),
        (whole[: len(whole) // 2], "truncated"),
        (whole.replace(bytes(64), b"\1" + bytes(63), 1), "altered"),
    ]:
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            cupybn.load(path)


# ---- forged files ------------------------------------------------------------------------------


class Counting(io.BytesIO):
    """Counts the bytes that are read."""

    count = 0

    def read(self, *size):
        data = super().read(*size)
        self.count += len(data)
        return data


def refuse(suffix, data, message, most=20_000):
    """The file is refused with this message, after reading no more than `most` bytes."""
    file = Counting(data)
    tracemalloc.start()
    try:
        with pytest.raises(Exception) as raised:  # noqa: PT011
            FORMS[suffix].read(file, len(data))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message in str(raised.value)
    assert file.count <= most
    assert peak < PAYLOAD.nbytes, peak  # what Python's parsers need for nested nonsense
    folder = Path(refuse.folder)
    (folder / f"forged{suffix}").write_bytes(data)
    with pytest.raises(CheckpointError):
        cupybn.load(folder / f"forged{suffix}")


@pytest.fixture(autouse=True)
def folder(tmp_path):
    refuse.folder = tmp_path


def packed(*, state=None, **changes):
    """The content of a state, and fields of its header changed, with the digest that belongs."""
    arrays = content.pack(StateDict({"payload": PAYLOAD}) if state is None else state).arrays
    fields = {
        "format": 1,
        "library": "cupybn 0",
        "arrays": [list(described) for described, _ in arrays.values()],
        "metadata": {},
    }
    fields |= changes
    fields["sha256"] = content.digest(fields, [array for _, array in arrays.values()])
    return content.Content(json.dumps(fields), arrays)


def npz_of(members, compression=zipfile.ZIP_STORED):
    """An archive of (name, bytes) members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, data in members:
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def npy_of(array, allow_pickle=False):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def written(suffix, saved):
    file = io.BytesIO()
    FORMS[suffix].write(file, saved)
    return file.getvalue()


HEADER = ("cupybn.json", packed().header)
X = ("x.npy", npy_of(np.zeros(3)))
BIG = ("payload.npy", npy_of(PAYLOAD))
LISTING_X = ("cupybn.json", packed(state={"x": np.zeros(3)}).header)


class Touch:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_not_loaded(tmp_path):
    trap = tmp_path / "sprung"
    evil = npy_of(np.array([Touch(trap)] * 3), allow_pickle=True)
    data = npz_of([LISTING_X, ("x.npy", evil), BIG])
    refuse(".npz", npz_of([LISTING_X, ("x.npy", evil)]), "pickled objects")
    refuse(".npz", data, "are not those")
    listed = json.loads(LISTING_X[1]) | {"arrays": [["x", "|O", [3]]]}
    refuse(".npz", npz_of([("cupybn.json", json.dumps(listed)), ("x.npy", evil)]), "dtype '|O'")
    refuse(".npz", pickle.dumps(Touch(trap)), "not an .npz file")
    refuse(".safetensors", pickle.dumps(Touch(trap)), "not a .safetensors file")
    assert not trap.exists()


@pytest.mark.parametrize(
    "header, message",
    [
        (
            b"{'descr': '<f8', 'fortran_order': False, 'shape': (1152921504606846976,), }",
            "not the array",
        ),
        (b"{'descr': '<f8', 'fortran_order': True, 'shape': (3,), }", "not the array"),
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (6,), }", "not the array"),
        (b"{'descr': '<f8', 'fortran_order': False, 'shape': (-3,), }", "not the array"),
        (b"{'descr': 'V24', 'fortran_order': False, 'shape': (), }", "not the array"),
        (b"{'descr': '<f8', 'fortran_order': False, 'shape': (" + b"-" * 1900 + b"3,), }", ""),
        (b"{'descr': '<f8', 'fortran_order': False, 'shape': (" + b"-" * 9000 + b"3,), }", ""),
        (b"(" * 1900, ""),
        (b"(" * 199 + b"-" * 1500 + b"3" + b")" * 199, "absurd"),
        (b"(" * 9000, ""),
        (b"[" * 50 + b"]" * 50, ""),
        (b"{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }" + b" " * 20_000, ""),
        (b"{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (3,), }", ""),
    ],
)
def test_absurd_npy_headers(header, message):
    npy = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(24)
    data = npz_of([LISTING_X, ("x.npy", npy)])
    refuse(".npz", data, message, most=30_000)
    both = packed(state={"payload": PAYLOAD, "x": np.zeros(3)}).header
    refuse(".npz", npz_of([("cupybn.json", both), BIG, ("x.npy", npy)]), message, most=30_000)


def test_npy_of_another_version_or_length():
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }"
    second = b"\x93NUMPY\2\0" + struct.pack("<I", 2**32 - 1) + header
    refuse(".npz", npz_of([LISTING_X, ("x.npy", second)]), "version")
    refuse(".npz", npz_of([LISTING_X, ("x.npy", b"")]), "")
    refuse(".npz", npz_of([LISTING_X, ("x.npy", X[1] + b"\0")]), "claims an array of 24 bytes")
    refuse(".npz", npz_of([LISTING_X, ("x.npy", X[1][:-1])]), "claims an array of 24 bytes")


def test_zip_bombs():
    zeros = np.zeros(20_000_000)
    packed_zeros = npz_of([("cupybn.json", packed(state={"x": zeros}).header),
                           ("x.npy", npy_of(zeros))], zipfile.ZIP_DEFLATED)  # fmt: skip
    assert len(packed_zeros) < 200_000 < zeros.nbytes / 500
    refuse(".npz", packed_zeros, "compressed")
    for kind in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refuse(".npz", npz_of([LISTING_X, X, BIG], kind), "compressed")


def patched(data, member, **fields):
    """The archive with other words in the directory's entry of a member."""
    layout = struct.Struct("<4s4B4HL2L5H2L")
    names = ["signature", "v1", "v2", "v3", "v4", "flags", "method", "time", "date", "crc",
             "compress_size", "file_size", "name", "extra", "comment", "disk", "internal",
             "external", "offset"]  # fmt: skip
    start = data.index(struct.pack("<4s", b"PK\1\2"))
    for _ in range(member):
        start = data.index(b"PK\1\2", start + 4)
    words = list(layout.unpack_from(data, start))
    for name, value in fields.items():
        words[names.index(name)] = value
    return data[:start] + layout.pack(*words) + data[start + layout.size :]


def test_sizes_that_cannot_be():
    data = npz_of([LISTING_X, X, BIG])
    huge = 2**32 - 2
    refuse(".npz", patched(data, 1, compress_size=huge, file_size=huge), "claims 4294967294 bytes")
    refuse(".npz", patched(data, 1, file_size=huge), "cannot be")
    refuse(".npz", patched(data, 0, compress_size=huge, file_size=huge), "claims 4294967294 bytes")
    refuse(".npz", patched(data, 1, flags=1), "encrypted")
    refuse(".npz", patched(data, 2, offset=0), "cannot be")  # two entries, one member
    refuse(".npz", patched(data, 1, offset=huge), "claims")


def test_a_directory_that_begins_before_the_file():
    data = npz_of([LISTING_X, X])
    end = data.rindex(b"PK\5\6")
    for size, offset in [(end + 10, 0), (46, 2**32 - 2), (2**32 - 2, 0), (end, 2**31)]:
        forged = data[: end + 12] + struct.pack("<2L", size, offset) + data[end + 20 :]
        refuse(".npz", forged, "")


def test_a_header_that_is_a_bomb():
    header = b" " * 2_000_000
    with zipfile.ZipFile(io.BytesIO(npz_of([("cupybn.json", header)]))) as archive:
        assert archive.infolist()[0].file_size < content.HEADER_LIMIT
    limit = content.HEADER_LIMIT
    npz.HEADER_LIMIT = 1_000_000
    try:
        refuse(".npz", npz_of([("cupybn.json", header)]), "a header of 2000000 bytes")
    finally:
        npz.HEADER_LIMIT = limit


@pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..", "C:x", "a\\x", "a\nx", ""])
def test_path_tricks_in_zip_names(name):
    refuse(".npz", npz_of([HEADER, BIG, (f"{name}.npy", b"")]), "is refused")


@pytest.mark.skipif(
    not hasattr(zipfile, "_sanitize_filename"), reason="this Python reads no second names"
)
def test_a_member_with_a_second_name():
    """In an extra field, which replaces the first one; here by what the header lists."""
    file = io.BytesIO()
    second = struct.pack("<BL", 1, zlib.crc32(b"y.npy")) + b"x.npy"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(zipfile.ZipInfo(LISTING_X[0]), LISTING_X[1])
        member = zipfile.ZipInfo("y.npy")
        member.extra = struct.pack("<HH", 0x7075, len(second)) + second
        archive.writestr(member, X[1])
    refuse(".npz", file.getvalue(), "'y.npy' is refused: ambiguous")


def test_a_name_that_ends_early():
    data = npz_of([HEADER, BIG, ("a.npy_b.npy", X[1])])
    refuse(".npz", data.replace(b"a.npy_b.npy", b"a.npy\0b.npy"), "is refused")


def test_names_that_are_there_twice():
    refuse(".npz", npz_of([HEADER, BIG, BIG]), "payload.npy is there twice")
    refuse(".npz", npz_of([HEADER, BIG, HEADER]), "cupybn.json is there twice")
    fields = json.loads(HEADER[1])
    for text in (
        HEADER[1].replace('"format": 1', '"format": 1, "format": 1'),
        HEADER[1].replace('"metadata": {}', '"metadata": {"": {}, "": {}}'),
        json.dumps(fields | {"arrays": 2 * fields["arrays"]}),
    ):
        refuse(".npz", npz_of([("cupybn.json", text), BIG]), "")


def test_members_and_list_must_agree():
    for members in ([HEADER], [HEADER, X, BIG], [HEADER, X], [HEADER, BIG, X]):
        refuse(".npz", npz_of(members), "not those that its header lists")
    for members in ([], [BIG, HEADER], [BIG]):
        refuse(".npz", npz_of(members), "not written by cupybn.save")
    file = io.BytesIO()
    np.savez(file, payload=PAYLOAD)
    refuse(".npz", file.getvalue(), "not written by cupybn.save")


@both
def test_a_newer_format_is_refused_by_name(suffix):
    for saved in (packed(format=3), packed(format=3, arrays="another way", state={})):
        message = f"format 3 is newer than 1, the newest that cupybn {cupybn.__version__} knows"
        refuse(suffix, written(suffix, saved), message)


PAYLOADS = [["payload", "<f8", [200_000]]]


@both
@pytest.mark.parametrize("version", ["1", True, 0, None, 1.0], ids=repr)
def test_formats_that_cannot_be(version, suffix):
    refuse(suffix, written(suffix, packed(format=version)), "names no format")


@both
@pytest.mark.parametrize(
    "arrays, message",
    [
        (None, ""),
        ([[]], ""),
        ([["payload", "<f8", 200_000]], ""),
        ([["payload", "<f8", [200_000.0]]], "has the shape"),
        ([["payload", "<f8", [True, 200_000]]], "has the shape"),
        ([["payload", "<f8", [-400, -500]]], "has the shape"),
        ([["payload", ["<f8"], [200_000]]], "has the dtype"),
        ([["payload", "O", [200_000]]], "has the dtype"),
        ([["../payload", "<f8", [200_000]]], "is refused"),
        ([[3, "<f8", [200_000]]], "is refused"),
        (2 * PAYLOADS, "two arrays have the same name"),
        ([*PAYLOADS, ["none", "<f8", [0]]], "are not those"),
        ([], "are not those"),
        ([["payload", "<f8", [2**60]]], "not"),
        ([["payload", "<i8", [200_000]]], "not"),
        ([["payload", "<f8", [400, 500]]], "not"),
    ],
    ids=str,
)
def test_lists_that_cannot_be(arrays, message, suffix):
    refuse(suffix, written(suffix, packed(arrays=arrays)), message)


@both
@pytest.mark.parametrize("metadata", [None, 3, [], {"": 3}, {"": [1]}])
def test_metadata_that_cannot_be(metadata, suffix):
    refuse(suffix, written(suffix, packed(metadata=metadata)), "no dict of dicts")


@both
@pytest.mark.parametrize("text", ["[" * 100_000, "", "3", "{}", '{"format": 1}', "\ufeff{}", "NaN"])
def test_headers_that_are_no_header(text, suffix):
    saved = content.Content(text, packed().arrays)
    refuse(suffix, written(suffix, saved), "", most=300_000)


@both
def test_a_digest_that_is_not_the_contents(suffix):
    saved = packed()
    other = saved._replace(header=saved.header.replace("cupybn 0", "cupybn 1"))
    file = io.BytesIO(written(suffix, other))
    with pytest.raises(CheckpointError, match="SHA-256"):
        FORMS[suffix].read(file, len(file.getvalue()))


# ---- safetensors -------------------------------------------------------------------------------


def tensors_of(table, data=b"", length=None):
    header = (table if isinstance(table, str) else json.dumps(table)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def table_of(**changes):
    """A table of x (3 doubles) and payload; the entry of x changed."""
    state = {"x": np.zeros(3), "payload": PAYLOAD}
    x = {"dtype": "F64", "shape": [3], "data_offsets": [0, 24]} | changes
    payload = {"dtype": "F64", "shape": [200_000], "data_offsets": [24, 1_600_024]}
    return {"__metadata__": {"cupybn": packed(state=state).header}, "x": x, "payload": payload}


DATA = bytes(24) + PAYLOAD.tobytes()


def test_the_forge_can_write_what_is_accepted(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(tensors_of(table_of(), DATA))
    np.testing.assert_array_equal(cupybn.load(tmp_path / "x.safetensors")["payload"], PAYLOAD)
    (tmp_path / "x.npz").write_bytes(npz_of([HEADER, BIG]))
    np.testing.assert_array_equal(cupybn.load(tmp_path / "x.npz")["payload"], PAYLOAD)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**12, len(DATA) + 10_000])
def test_lengths_of_the_header_beyond_the_file(length):
    refuse(".safetensors", tensors_of(table_of(), DATA, length), "truncated", most=8)


def test_a_header_over_the_limit(monkeypatch):
    monkeypatch.setattr(safetensors, "HEADER_LIMIT", 100)
    refuse(".safetensors", tensors_of(table_of(), DATA), "a header of", most=8)


@pytest.mark.parametrize(
    "changes",
    [
        {"data_offsets": [0, 2**60]},
        {"data_offsets": [24, 48]},  # overlaps payload
        {"data_offsets": [-24, 0]},
        {"data_offsets": [0, 24, 3]},
        {"data_offsets": None},
        {"shape": [2**60]},
        {"shape": [1, 3]},
        {"dtype": "F32", "shape": [6]},
        {"dtype": "I64"},
    ],
    ids=str,
)
def test_tables_that_cannot_be(changes):
    refuse(".safetensors", tensors_of(table_of(**changes), DATA), "")


def test_a_tensor_in_more_bytes_than_it_has():
    table = table_of(shape=[2])
    listed = packed(state={"x": np.zeros(2), "payload": PAYLOAD})
    table["__metadata__"]["cupybn"] = listed.header
    refuse(".safetensors", tensors_of(table, DATA), "x claims 16 bytes in 24")


def test_tables_and_lists_must_agree():
    table = table_of()
    refuse(".safetensors", tensors_of(table, DATA + b"\0"), "1600024 bytes in 1600025")
    refuse(".safetensors", tensors_of(table, DATA[:-1]), "truncated")
    twice = json.dumps(table).replace('"x":', '"payload":')
    refuse(".safetensors", tensors_of(twice, DATA), "twice")
    for name in ("x", "payload", "__metadata__"):
        refuse(".safetensors", tensors_of({k: table[k] for k in table if k != name}, DATA), "")
    more = table | {"more": {"dtype": "F64", "shape": [0], "data_offsets": [0, 0]}}
    refuse(".safetensors", tensors_of(more, DATA), "not those that its header lists")
    for metadata in ({}, {"cupybn": 3}, [], None, "cupybn"):
        refuse(".safetensors", tensors_of(table | {"__metadata__": metadata}, DATA), "")
    from safetensors.numpy import save

    refuse(".safetensors", save({"x": PAYLOAD}), "not written by cupybn.save")


if __name__ == "__main__":  # the figures of docs/checkpoints.md
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        for ending in FORMS:
            refused, size = flips(ending, Path(name))
            print(f"{ending}: {size} bytes; of 500 single-bit flips {refused} refused, "
                  f"{500 - refused} without effect on the data")  # fmt: skip
