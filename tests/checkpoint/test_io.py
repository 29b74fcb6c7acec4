import argparse
import contextlib
import errno
import hashlib
import os
import pickle
import random
import resource

import numpy as np
import pytest
import torch
from figures import tally

from dino_d2.checkpoint import CheckpointError, read_weights, write_weights
from dino_d2.checkpoint.io import read_content

WEIGHTS = {
    "conv.weight": torch.arange(6.0).reshape(2, 3),
    "norm.running_mean": torch.tensor([1.5], dtype=torch.float64),
    "steps": torch.tensor(7),
}


class Payload:
    """Creates the file when it is unpickled without care."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return open, (str(self.victim), "w")


def assert_weights(actual, expected=WEIGHTS):
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0)


def as_arrays(weights):
    return {name: tensor.numpy() for name, tensor in weights.items()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    write_weights(WEIGHTS, path)
    assert_weights(read_weights(path))
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, f"{path.name}.sha256"]


def test_write_creates_the_folder(tmp_path):
    write_weights(WEIGHTS, tmp_path / "new" / "folder" / "weights.pth")
    assert_weights(read_weights(tmp_path / "new" / "folder" / "weights.pth"))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_shared_and_strided_tensors_are_written_whole(tmp_path, suffix):
    matrix = torch.arange(12.0).reshape(3, 4)
    weights = {"a": matrix, "b": matrix, "row": matrix[1], "transposed": matrix.t()}
    write_weights(weights, tmp_path / f"weights{suffix}")
    assert_weights(read_weights(tmp_path / f"weights{suffix}"), weights)


@pytest.mark.parametrize("name", ["weights", "weights.pkl", "weights.bin"])
def test_write_refuses_other_suffixes(tmp_path, name):
    with pytest.raises(CheckpointError, match=rf"{name}: .*\.safetensors or \.pth"):
        write_weights(WEIGHTS, tmp_path / name)
    assert not list(tmp_path.iterdir())


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"weights{suffix}"
    write_weights(WEIGHTS, path)
    before = files(tmp_path)

    def fail(_descriptor):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    wanted = rf"weights\{suffix}: .*\(no space left on device\); it needs \d+ bytes, \d+ bytes are"
    with pytest.raises(CheckpointError, match=wanted):
        write_weights({"other": torch.ones(1)}, path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["weights.pth", "new.pth"])
@pytest.mark.parametrize("room", [0, 1, 1000, 39_000, 40_500])
def test_a_full_disk_leaves_what_was_there(tmp_path, name, room):
    """Files of this process may grow to `room` bytes."""
    write_weights(WEIGHTS, tmp_path / "weights.pth")
    before = files(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be written \(File too large"):
            write_weights({"other": torch.ones(10_000)}, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files(tmp_path) == before


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    write_weights(WEIGHTS, path)
    before = files(tmp_path)

    def refuse(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:  # permissions do not stop every user
        patch.setattr(type(path), "open", refuse)
        with pytest.raises(CheckpointError, match=r"weights\.pth: .*\(Permission denied\)"):
            write_weights({"other": torch.ones(1)}, path)
    assert files(tmp_path) == before


def test_the_checksum_is_that_of_sha256sum(tmp_path):
    write_weights(WEIGHTS, tmp_path / "weights.pth")
    digest = hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()
    assert (tmp_path / "weights.pth.sha256").read_text() == f"{digest}  weights.pth\n"


def test_a_writer_clears_away_what_a_killed_one_left(tmp_path):
    for name in ("model_7.pth.unfinished", "model_7.pth.sha256.unfinished", "model_3.pth.sha256"):
        (tmp_path / name).write_bytes(b"rest")
    (tmp_path / "mine.txt.sha256").write_bytes(b"not a checkpoint's")
    write_weights(WEIGHTS, tmp_path / "model_9.pth")
    assert set(files(tmp_path)) == {"model_9.pth", "model_9.pth.sha256", "mine.txt.sha256"}


def damaged(data, generator, block):
    """A copy with one bit turned over, or with a block of zeros."""
    data = bytearray(data)
    at = generator.randrange(len(data))
    if block:
        at = generator.randrange(len(data) - 512)
        data[at : at + 512] = bytes(512)
    else:
        data[at] ^= 1 << generator.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("checksum", [True, False])
@pytest.mark.parametrize("block", [True, False])
def test_no_damage_is_silent(tmp_path, block, checksum):
    """Without a checksum beside it, what does not matter may change: bytes between the tensors."""
    path, generator = tmp_path / "weights.pth", random.Random(0)
    weights = {f"layer{i}": torch.randn(40, 40) for i in range(10)}
    write_weights(weights, path)
    whole = path.read_bytes()
    if not checksum:
        (tmp_path / "weights.pth.sha256").unlink()
    for _ in range(40):
        path.write_bytes(damaged(whole, generator, block))
        if checksum and path.read_bytes() != whole:
            with pytest.raises(
                CheckpointError, match=r"damaged; it does not match weights\.pth\.sha"
            ):
                read_weights(path)
            continue
        with contextlib.suppress(CheckpointError):
            assert_weights(read_weights(path), weights)


@pytest.mark.parametrize("nest", [["model"], ["state_dict"], ["model_state"], ["model", "model"]])
def test_weights_are_found_in_their_nest(tmp_path, nest):
    content = WEIGHTS
    for name in reversed(nest):
        content = {name: content, "epoch": 12}
    torch.save(content, tmp_path / "weights.pth")
    assert_weights(read_weights(tmp_path / "weights.pth"))


def test_what_is_no_tensor_is_left_out(tmp_path):
    torch.save({**WEIGHTS, "epoch": 3, "note": "text", 5: torch.ones(1)}, tmp_path / "weights.pth")
    assert_weights(read_weights(tmp_path / "weights.pth"))


def test_content_keeps_the_trainers_state(tmp_path):
    content = {"model": WEIGHTS, "iteration": 5, "optimizer": {"state": {0: torch.ones(2)}}}
    torch.save(content, tmp_path / "checkpoint.pth")
    read = read_content(tmp_path / "checkpoint.pth")
    assert read["iteration"] == 5
    assert_weights(read["model"])
    assert read["optimizer"]["state"][0].tolist() == [1, 1]


def test_command_line_in_the_file_is_fine(tmp_path):
    arguments = argparse.Namespace(lr=1e-4, names=["a"], device="cuda")
    torch.save({"model": WEIGHTS, "args": arguments}, tmp_path / "official.pth")
    assert_weights(read_weights(tmp_path / "official.pth"))


def test_old_torch_format(tmp_path):
    path = tmp_path / "old.pth"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    assert_weights(read_weights(path))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_model_zoo_pickle(tmp_path, protocol):
    content = {
        "model": as_arrays(WEIGHTS),
        "__author__": "torchvision",
        "matching_heuristics": True,
    }
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(content, protocol))
    assert_weights(read_weights(tmp_path / "R-50.pkl"))


def test_arrays_without_numbers_are_an_error(tmp_path):
    (tmp_path / "names.pkl").write_bytes(pickle.dumps({"names": np.array(["a", "b"])}))
    with pytest.raises(CheckpointError, match=r"names\.pkl: .*str_"):
        read_weights(tmp_path / "names.pkl")


executions = tally("hostile checkpoints that run code")


@pytest.mark.faults
@pytest.mark.parametrize("environment", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("where", ["beside", "in arguments", "in an array"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_payload_is_refused_and_does_not_run(
    tmp_path, monkeypatch, executions, suffix, where, environment
):
    if environment:
        monkeypatch.setenv(environment, "1")
    victim = tmp_path / "victim"
    payload = {
        "beside": Payload(victim),
        "in arguments": argparse.Namespace(lr=Payload(victim)),
        "in an array": np.array([Payload(victim)], dtype=object),
    }[where]
    content = {"model": as_arrays(WEIGHTS) if suffix == ".pkl" else WEIGHTS, "more": payload}
    path = tmp_path / f"evil{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=rf"evil\{suffix}: refused.*asks for \w+\.") as error:
        read_weights(path)
    executions.append(victim.exists())
    assert not executions[-1]
    assert "weights_only" not in str(error.value)  # no advice to read it all the same


def test_payload_would_run_without_care(tmp_path):
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Payload(tmp_path / "victim")))
    pickle.loads((tmp_path / "evil.pkl").read_bytes()).close()
    assert (tmp_path / "victim").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
@pytest.mark.parametrize("damage", ["cut", "short", "text", "empty"])
def test_damaged_file(tmp_path, suffix, damage):
    whole = tmp_path / f"whole{suffix}"
    if suffix == ".pkl":
        whole.write_bytes(pickle.dumps(as_arrays(WEIGHTS)))
    else:
        write_weights({"weight": torch.zeros(5000)}, whole)
    data = whole.read_bytes()
    path = tmp_path / f"damaged{suffix}"
    changed = {"cut": data[: len(data) // 2], "short": data[:20], "text": b"<html>", "empty": b""}
    path.write_bytes(changed[damage])
    with pytest.raises(CheckpointError, match=rf"damaged\{suffix}: (cannot be read|not a valid)"):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".pkl"])
def test_missing_file(tmp_path, suffix):
    with pytest.raises(CheckpointError, match=rf"absent\{suffix}: there is no such file"):
        read_weights(tmp_path / f"absent{suffix}")


@pytest.mark.parametrize("content", [{}, {"epoch": 1}, {"model": {}}, {"model": {"a": 1}}])
def test_file_without_weights(tmp_path, content):
    torch.save(content, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match=r"none\.pth: there are no weights"):
        read_weights(tmp_path / "none.pth")


def test_file_that_is_no_dictionary(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth: holds a list"):
        read_weights(tmp_path / "list.pth")
