"""Archives: what they declare is checked before it is believed; what is written comes back."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
from collections.abc import Callable

import numpy as np
import pytest

from bnkernels.train.archive import ArchiveError, check_name, pack_arrays, read_arrays

GIB = 2**30


def npy(array: np.ndarray, **header: object) -> bytes:
    """Return an ``.npy`` file whose header says something else."""
    buffer = io.BytesIO()
    described = np.lib.format.header_data_from_array_1_0(array) | header
    np.lib.format.write_array_header_1_0(buffer, described)
    return buffer.getvalue() + array.tobytes()


def zipped(*entries: tuple[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytearray:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)
    return bytearray(buffer.getvalue())


def patched(content: bytearray, offset_local: int, offset_central: int, value: bytes) -> bytearray:
    """Write a field of the first entry in both of its headers."""
    central = content.index(b"PK\x01\x02")
    for start, offset in ((0, offset_local), (central, offset_central)):
        if offset >= 0:
            content[start + offset : start + offset + len(value)] = value
    return content


def declared_size(size: int) -> bytearray:
    """Return an archive whose directory declares another size."""
    return patched(zipped(("x.npy", npy(np.ones(4)))), 22, 24, struct.pack("<I", size))


@pytest.mark.parametrize(
    "name", ["x", "file", "self", "args", "batch/model/0.weight", "x.npy", "with space", "größe", "x" * 1000]
)
def test_a_name_comes_back(name: str) -> None:
    check_name(name)
    arrays = {name: np.arange(6.0).reshape(2, 3), "other": np.arange(3)}
    content = pack_arrays(arrays)
    back = read_arrays(io.BytesIO(content), len(content))
    assert list(back) == [name, "other"]
    np.testing.assert_array_equal(back[name], arrays[name])
    back[name][0, 0] = 7  # writable
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        assert len(archive.files) == 2


@pytest.mark.parametrize(
    "name",
    [
        "",
        "/x",
        "x/",
        "a//b",
        "../x",
        "a/../b",
        "./x",
        "..",
        "x\0y",
        "a\\b",
        "\ud800",
        "x" * 1001,
        "é" * 501,
        "x" * 10**6,
    ],
)
def test_a_name_that_would_not_come_back_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="the name of an array must be") as caught:
        check_name(name)
    assert len(str(caught.value)) < 300
    assert str(caught.value).isprintable()


def test_a_name_is_a_string() -> None:
    with pytest.raises(TypeError, match="must be a string, got int"):
        check_name(3)


@pytest.mark.parametrize(
    "array",
    [
        np.float64(1.5),
        np.zeros((0, 3)),
        np.asfortranarray(np.arange(6, dtype="int16").reshape(2, 3)),
        np.array([True, False]),
        np.array(["a", "bc"]),
        np.array([1 + 2j], "complex64"),
        np.array([3], ">i4"),
        np.array([1], "M8[ns]"),
        np.zeros(2, [("a", "i4"), ("b", "f8")]),
        np.random.default_rng(0).standard_normal(300_000),  # more than is read at a time
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_what_numpy_saves_is_read(save: Callable, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    save(buffer, x=array, y=np.arange(3))
    back = read_arrays(buffer, 10**7)["x"]
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)
    assert read_arrays(buffer, 24 + 128, names=("y", "z")).keys() == {"y"}


BOMBS = {
    "six gibibytes of zeros in three mebibytes": lambda: zipped(
        ("x.npy", npy(np.zeros(4 * 2**20), shape=(6 * GIB // 8,))), compression=zipfile.ZIP_DEFLATED
    ),
    "a shape of an exbibyte": lambda: zipped(("x.npy", npy(np.ones(4), shape=(2**57,)))),
    "a shape beyond 64 bits": lambda: zipped(("x.npy", npy(np.ones(4), shape=(2**40, 2**40)))),
    "a shape that multiplies to the right size": lambda: zipped(("x.npy", npy(np.ones(4), shape=(-2, -2)))),
    "nothing of an endless shape": lambda: zipped(("x.npy", npy(np.ones(0), shape=(0, 2**70)))),
    "elements of no bytes": lambda: zipped(("x.npy", npy(np.ones(0), descr="|V0", shape=(2**60,)))),
    "a directory that declares more": lambda: declared_size(4 * GIB - 1),
    "a directory that declares less": lambda: declared_size(100),
    "a thousand names of one entry": lambda: overlapping(1000),
    "a header of a megabyte": lambda: zipped(("x.npy", b"\x93NUMPY\x02\x00" + struct.pack("<I", 10**6) + b"(" * 10**6)),
    "a header nested deeply": lambda: zipped(("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000)),
}


def overlapping(count: int) -> bytearray:
    """Return an archive whose directory lists one entry under many names, all of the same bytes."""
    content = zipped(("x.npy", npy(np.ones(10_000))))
    central, end = content.index(b"PK\x01\x02"), content.index(b"PK\x05\x06")
    entry, tail = content[central:end], content[end:]
    entries = bytearray()
    for number in range(count):
        name = f"{number:05}.npy".encode()
        one = bytearray(entry[:46]) + name
        one[28:30] = struct.pack("<H", len(name))
        entries += one
    tail[8:12], tail[12:16] = struct.pack("<HH", count, count), struct.pack("<I", len(entries))
    return content[:central] + entries + tail


DAMAGED = {
    "a name twice": lambda: zipped(("x.npy", npy(np.ones(4))), ("y.npy", npy(np.ones(4)))),
    "encrypted": lambda: patched(zipped(("x.npy", npy(np.ones(4)))), 6, 8, b"\x01\x00"),
    "a wrong checksum": lambda: patched(zipped(("x.npy", npy(np.ones(4)))), 14, 16, b"\xff\xff\xff\xff"),
    "objects": lambda: zipped(("x.npy", npy(np.ones(4), descr="|O"))),
    "no array": lambda: zipped(("x.npy", b"text")),
    "an empty entry": lambda: zipped(("x.npy", b"")),
    "a folder": lambda: zipped(("x/", b"")),
    "a truncated array": lambda: zipped(("x.npy", npy(np.ones(4))[:-1])),
    "a longer array": lambda: zipped(("x.npy", npy(np.ones(4)) + b"more")),
    "a newer header": lambda: zipped(("x.npy", b"\x93NUMPY\x09" + npy(np.ones(4))[7:])),
    "no type": lambda: zipped(("x.npy", npy(np.ones(4), descr="<q9"))),
    "no archive": lambda: b"PK\x03\x04 and nothing",
    "nothing": lambda: b"",
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make", (BOMBS | DAMAGED).values(), ids=(BOMBS | DAMAGED).keys())
def test_what_cannot_be_is_refused_before_anything_is_allocated(make: Callable) -> None:
    content = bytes(make())
    if make is DAMAGED["a name twice"]:
        content = content.replace(b"y.npy", b"x.npy")
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError) as caught:
            read_arrays(io.BytesIO(content), len(content))
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 20 * 2**20
    assert len(str(caught.value)) < 100


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_unpacks_without_a_bound_is_refused(compression: int) -> None:
    """Python gives theirs no limit on what one piece may become."""
    content = zipped(("x.npy", npy(np.zeros(2**20))), compression=compression)
    with pytest.raises(ArchiveError, match="compressed in a way that numpy does not write"):
        read_arrays(io.BytesIO(content), GIB)


def test_the_limit_is_of_all_arrays_that_are_read() -> None:
    content = pack_arrays({"x": np.ones(100), "y": np.ones(100)})
    size = 2 * (100 * 8 + 128)
    assert read_arrays(io.BytesIO(content), size).keys() == {"x", "y"}
    with pytest.raises(ArchiveError, match=f"its arrays would take more than {size - 1} bytes"):
        read_arrays(io.BytesIO(content), size - 1)
    assert read_arrays(io.BytesIO(content), size // 2, names=["y"]).keys() == {"y"}


def test_a_disk_that_fails_is_no_damage() -> None:
    class Failing(io.BytesIO):
        """A file that can be read at its end, where the directory is, and not at its beginning."""

        def read(self, *size: int) -> bytes:
            if self.tell() == 0:
                raise OSError(5, "Input/output error")
            return super().read(*size)

    with pytest.raises(OSError, match="Input/output error"):
        read_arrays(Failing(pack_arrays({"x": np.ones(3)})), 10**6)
