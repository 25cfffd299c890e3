"""Checkpoints: what is saved comes back, damage is found, and a file is never left half-written."""

import hashlib
import json
import os
import sys
import tracemalloc

import numpy as np
import pytest

from bnkernels.train import checkpoint, files
from bnkernels.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, write_atomically

META = {"step": 7, "generator": {"state": 2**127 + 1}, "history": [{"loss": 0.1}]}
ARRAYS = {
    "batch/model/0.weight": np.arange(6, dtype=np.float32).reshape(2, 3) / 7,
    "batch/optimizer/steps": np.array(7),
    "none/model/empty": np.zeros((0, 3)),
}


@pytest.fixture
def path(tmp_path):
    """Return a valid checkpoint."""
    path = tmp_path / "checkpoint.npz"
    save_checkpoint(path, META, ARRAYS)
    return path


def same(arrays):
    return arrays.keys() == ARRAYS.keys() and all(
        (arrays[k].dtype, arrays[k].shape, arrays[k].tobytes()) == (v.dtype, v.shape, v.tobytes())
        for k, v in ARRAYS.items()
    )


def test_what_is_saved_comes_back(path):
    meta, arrays = load_checkpoint(path)
    assert meta == {"format": "bnkernels checkpoint", "version": 1, **META}
    assert same(arrays)


def test_a_checkpoint_is_a_plain_npz_without_pickle(path):
    with np.load(path, allow_pickle=False) as archive:
        assert json.loads(archive["meta"].item())["step"] == 7
        assert not any(archive[name].dtype.hasobject for name in archive.files)


TYPES = ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "int4", "uint4", "float4_e2m1fn", "int2"]


@pytest.mark.parametrize("name", TYPES)
def test_types_of_ml_dtypes_come_back_bit_for_bit(tmp_path, name):
    """numpy.savez writes them as void, or not at all."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = np.dtype(getattr(ml_dtypes, name, None) or pytest.skip(f"this ml_dtypes has no {name}"))
    bits = np.arange(16, dtype=f"u{dtype.itemsize}")
    arrays = {"x": bits.view(dtype), "turned": bits.view(dtype).reshape(2, 8).T, "one": bits[3].view(dtype), "f": bits}
    save_checkpoint(tmp_path / "c.npz", META, arrays)
    meta, back = load_checkpoint(tmp_path / "c.npz")
    assert meta == {"format": "bnkernels checkpoint", "version": 1, **META}
    for key, array in arrays.items():
        assert (back[key].dtype, back[key].shape) == (array.dtype, array.shape)
        assert back[key].tobytes() == array.tobytes()


def test_without_ml_dtypes_its_types_are_refused_with_the_way_out(tmp_path, monkeypatch):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    path = tmp_path / "c.npz"
    save_checkpoint(path, META, {"x": np.ones(3, ml_dtypes.bfloat16)})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ml_dtypes", None)
        with pytest.raises(CheckpointError, match="other types than NumPy's: pip install ml_dtypes"):
            load_checkpoint(path)
    monkeypatch.delattr(ml_dtypes, "bfloat16")
    with pytest.raises(CheckpointError, match="a type that the installed ml_dtypes lacks: upgrade it"):
        load_checkpoint(path)


@pytest.mark.parametrize("dtypes", [3, {"x": "finfo"}, {"x": "bfloat16"}, {"y": "bfloat16"}, {"x": 3}, {"x": "int4"}])
def test_a_wrong_table_of_types_is_damage(tmp_path, monkeypatch, dtypes):
    pytest.importorskip("ml_dtypes")
    monkeypatch.setattr(checkpoint, "TAKEN", set())
    save_checkpoint(tmp_path / "c.npz", {"dtypes": dtypes}, {"x": np.ones(3)})
    with pytest.raises(CheckpointError, match=r"damaged|lacks"):
        load_checkpoint(tmp_path / "c.npz")


@pytest.mark.parametrize("name", ["file", "self", "args", "x.npy", "a b/c"])
def test_names_that_numpy_takes_for_its_own_come_back(tmp_path, name):
    save_checkpoint(tmp_path / "c.npz", {}, {name: np.arange(3)})
    assert load_checkpoint(tmp_path / "c.npz")[1][name].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("meta", "arrays", "message"),
    [
        ({}, {"meta": np.ones(3)}, "the name meta is taken"),
        ({}, {"digest": np.ones(3)}, "the name digest is taken"),
        ({}, {"x\0y": np.ones(3)}, "the name of an array must be words"),
        ({}, {"../x": np.ones(3)}, "the name of an array must be words"),
        ({}, {"x" * 70_000: np.ones(3)}, "at most 1000 bytes long"),
        ({}, {3: np.ones(3)}, "the name of an array must be a string, got int"),
        ({}, {"x": np.ma.masked_array([1.0], [True])}, "the array x is masked"),
        ({}, {"x": np.array(["a"], np.dtypes.StringDType())}, "the array x is of the type"),
        ({"version": 3}, {}, "version of the meta data is taken"),
        ({"format": "other", "dtypes": {}}, {}, "dtypes, format of the meta data is taken"),
        ({"loss": float("nan")}, {}, "JSON"),
        ({"x": {1, 2}}, {}, "JSON"),
    ],
)
def test_what_would_not_come_back_is_refused_when_saving(tmp_path, meta, arrays, message):
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        save_checkpoint(tmp_path / "c.npz", meta, arrays)
    assert len(str(caught.value)) < 300
    assert list(tmp_path.iterdir()) == []


def test_meta_data_nested_too_deeply_are_refused_both_ways(tmp_path):
    nested = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(ValueError, match="nested too deeply"):
        save_checkpoint(tmp_path / "c.npz", {"x": nested}, {})
    np.savez(tmp_path / "c.npz", meta=np.array(b'{"format": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"))
    with pytest.raises(CheckpointError, match="is not a bnkernels checkpoint"):
        load_checkpoint(tmp_path / "c.npz")


def written_by_hand(path, text, arrays=(), save=np.savez):
    """Write a checkpoint as the first version did, with a right digest for whatever the meta data say."""
    digest = hashlib.sha256(text)
    for name, array in sorted(dict(arrays).items()):
        digest.update(f"{name}\0{array.dtype.str}{array.shape}".encode() + array.tobytes())
    save(path, meta=np.array(text), digest=np.array(digest.hexdigest().encode()), **dict(arrays))


def test_a_checkpoint_of_the_first_version_is_read(tmp_path):
    text = json.dumps({"format": "bnkernels checkpoint", "version": 1, **META}).encode()
    arrays = ARRAYS | {"odd": np.zeros(2, [("a", "i4")]), "order": np.asfortranarray(np.ones((2, 3)))}
    written_by_hand(tmp_path / "c.npz", text, arrays)
    meta, back = load_checkpoint(tmp_path / "c.npz")
    assert meta["step"] == 7
    assert all(back[name].tobytes() == array.tobytes() for name, array in arrays.items())


@pytest.mark.parametrize(
    "version", ['"1"', "1.0", "true", "null", "-1", "0", "[1]", "NaN", "1" + "0" * 4000, "1" + "0" * 5000]
)
def test_a_version_that_is_none_is_one_short_line(tmp_path, version):
    written_by_hand(tmp_path / "c.npz", b'{"format": "bnkernels checkpoint", "version": %s}' % version.encode())
    with pytest.raises(CheckpointError, match=r"is not a bnkernels checkpoint|newer version") as caught:
        load_checkpoint(tmp_path / "c.npz")
    assert len(str(caught.value)) < 300


def test_a_checkpoint_that_unpacks_to_gibibytes_is_refused(tmp_path):
    """Ours are not compressed: what declares more than its file holds is a bomb."""
    text = b'{"format": "bnkernels checkpoint", "version": 1}'
    written_by_hand(tmp_path / "c.npz", text, {"x": np.zeros(2**24)}, save=np.savez_compressed)
    assert (tmp_path / "c.npz").stat().st_size < 2**20
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=r"truncated or damaged: its arrays would take more than \d+ bytes"):
        load_checkpoint(tmp_path / "c.npz")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_pipe_is_no_checkpoint(tmp_path):
    """To open one would wait for its writer, for ever."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is a device or a pipe"):
        load_checkpoint(tmp_path / "pipe")


def test_objects_are_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"[Oo]bject"):
        save_checkpoint(tmp_path / "c.npz", META, {"a": np.array([None])})
    assert list(tmp_path.iterdir()) == []


def test_every_truncation_is_found_and_the_file_left_alone(path):
    whole = path.read_bytes()
    for length in range(0, len(whole), 13):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"checkpoint\.npz is truncated or damaged"):
            load_checkpoint(path)
        assert path.read_bytes() == whole[:length]


def test_flipped_bits_are_found_or_harmless(path):
    """Some bits of a zip file mean nothing (time stamps, attributes): then the content must be unchanged."""
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    found = 0
    for position in rng.integers(0, len(whole), 400):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        try:
            meta, arrays = load_checkpoint(path)
        except CheckpointError:
            found += 1
        else:
            assert meta["step"] == 7
            assert same(arrays)
    assert found > 200


def test_a_changed_array_in_an_intact_zip_is_found(path):
    with np.load(path) as archive:
        entries = dict(archive)
    entries["batch/model/0.weight"] = entries["batch/model/0.weight"] + np.float32(1e-6)
    np.savez(path, **entries)
    with pytest.raises(CheckpointError, match="is truncated or damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("content", [b"not a zip file", b"\x93NUMPY\x01\x00", b"\x80\x04K\x01."])
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "other.npz"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"other\.npz is not a bnkernels checkpoint"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "meta", [None, np.zeros(3), np.array(b"no json"), np.array(b"[1]"), np.array(b'{"format": "other", "version": 1}')]
)
def test_an_npz_of_someone_else_is_refused(tmp_path, meta):
    path = tmp_path / "other.npz"
    np.savez(path, x=np.zeros(3), **({} if meta is None else {"meta": meta}))
    with pytest.raises(CheckpointError, match="is not a bnkernels checkpoint"):
        load_checkpoint(path)


def test_a_newer_format_asks_for_an_upgrade_and_is_left_alone(tmp_path, monkeypatch):
    path = tmp_path / "new.npz"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 2)
        save_checkpoint(path, META, ARRAYS)
    content = path.read_bytes()
    expected = r"written by a newer version \(format 2, this version reads up to 1\): upgrade bnkernels"
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(path)
    assert path.read_bytes() == content


def test_a_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nowhere.npz")


def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(files.os, name)
        monkeypatch.setattr(
            files.os, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))[1]
        )
    write_atomically(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]
