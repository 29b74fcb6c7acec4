import argparse
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch

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
    assert list(tmp_path.iterdir()) == [path]


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


@pytest.mark.parametrize(
    ("suffix", "module", "function"),
    [(".pth", torch, "save"), (".safetensors", safetensors.torch, "save_file")],
)
def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch, suffix, module, function):
    path = tmp_path / f"weights{suffix}"
    write_weights(WEIGHTS, path)

    def fail_half_way(_weights, unfinished):
        unfinished.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(module, function, fail_half_way)
    with pytest.raises(OSError, match="no space left"):
        write_weights({"other": torch.ones(1)}, path)
    assert_weights(read_weights(path))
    assert list(tmp_path.iterdir()) == [path]


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


@pytest.mark.parametrize("environment", [None, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
@pytest.mark.parametrize("where", ["beside", "in arguments", "in an array"])
@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_payload_is_refused_and_does_not_run(tmp_path, monkeypatch, suffix, where, environment):
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
    assert not victim.exists()
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
