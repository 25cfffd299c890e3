"""Checkpoints: what is saved comes back, damage is found, and a file is never left half-written."""

import json

import numpy as np
import pytest

from bnkernels import checkpoint
from bnkernels.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, write_atomically

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


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_keeps_the_old_content(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, call, fail)
        with pytest.raises(OSError, match="disk full"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    write_atomically(path, b"newer")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"newer"


def test_content_reaches_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        original = getattr(checkpoint.os, name)
        monkeypatch.setattr(
            checkpoint.os, name, lambda *a, name=name, original=original: (calls.append(name), original(*a))[1]
        )
    write_atomically(tmp_path / "file", b"content")
    assert calls == ["fsync", "replace", "fsync"]
