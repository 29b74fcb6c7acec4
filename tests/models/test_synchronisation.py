"""One training step waits for the device once: for the costs of the matching."""

import contextlib

import numpy as np
import pytest
import torch
from synchronisations import Synchronisations, train_step, what_a_step_waits_for
from tiny import NUM_CLASSES, tiny_batch, tiny_dino, tiny_targets

from dino_d2.losses import Criterion, FederatedClasses, matcher

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (0, 0), (20, 1)], ids=str)
@pytest.mark.parametrize("denoising", ["cdn", "dn", None])
@pytest.mark.parametrize("selection", ["static", "pure", "mixed"])
def test_a_training_step_waits_once(selection, denoising, counts):
    model = tiny_dino(query_selection=selection, denoising=denoising).train()
    assert what_a_step_waits_for(model, *counts) == ["cpu"]


def test_more_objects_than_denoising_has_room_for():
    model = tiny_dino().train()
    model.denoising.max_queries = 10
    assert what_a_step_waits_for(model, 20, 1) == ["cpu"]


def test_the_federated_loss_waits_for_nothing():
    choose = FederatedClasses([1.0] * NUM_CLASSES, 2)
    model = tiny_dino(criterion=Criterion(federated=choose)).train()
    assert what_a_step_waits_for(model, 3, 1) == ["cpu"]


def test_mixed_precision_waits_once():
    model = tiny_dino(torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert what_a_step_waits_for(model, 3, 1) == ["cpu"]


@torch.no_grad()
def test_inference_never_waits():
    model, batch = tiny_dino().eval(), tiny_batch()
    with Synchronisations() as counter:
        model(*batch)
    assert counter.seen == []


WAITING = {
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.numpy(),
    "array": lambda x: np.asarray(x),
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0]),
    "if": lambda x: 1 if x[0] else 0,
    "int": lambda x: int(x[0]),
    "float": lambda x: float(x[0]),
    "index": lambda x: range(x.long()[0]),
    "isin": lambda x: 2 in x,
    "equal": lambda x: torch.equal(x, x + 1),
    "nonzero": lambda x: x.nonzero(),
    "nonzero as tuple": lambda x: torch.nonzero(x, as_tuple=True),
    "argwhere": lambda x: torch.argwhere(x),
    "where": lambda x: torch.where(x > 1),
    "masked_select": lambda x: x.masked_select(x > 1),
    "boolean mask": lambda x: x[x > 1],
    "boolean mask of some dimensions": lambda x: x[None, :, None][:, x > 1],
    "assignment to a boolean mask": lambda x: x.__setitem__(x > 1, x[:1]),
    "index_put": lambda x: x.index_put((x > 1,), x[0]),
    "unique": lambda x: x.unique(),
    "unique rows": lambda x: x[:, None].unique(dim=0),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "bincount": lambda x: x.long().bincount(),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "tensor on a device": lambda x: torch.tensor([1, 2], device=x.device),
    "as_tensor on a device": lambda x: torch.as_tensor([1, 2], device=x.device),
    "new_tensor": lambda x: x.new_tensor([1, 2]),
    "to a device": lambda x: x.to(x.device),
    "to a named device": lambda x: x.to("cpu"),
    "to a device by keyword": lambda x: x.to(device=x.device, dtype=torch.float16),
    "to a device and type": lambda x: x.to(x.device, torch.float16),
    "to another tensor": lambda x: x.to(x),
}
NOT_WAITING = {
    "arithmetic": lambda x: (x + 1).sum(),
    "index": lambda x: x[torch.tensor([0, 2])],
    "slice": lambda x: x[1:],
    "mask": lambda x: x.masked_fill(x > 1, 0),
    "where": lambda x: torch.where(x > 1, x, 0),
    "repeat_interleave": lambda x: x.repeat_interleave(2),
    "host tensor": lambda x: torch.tensor([1, 2]),
    "host copy": lambda x: torch.tensor([1, 2]).to(x.device, non_blocking=True),
    "by keyword": lambda x: x.to(device=x.device, non_blocking=True),
    "type": lambda x: x.to(torch.float64),
    "like": lambda x: x.new_full((2,), 3),
    "shape": lambda x: x.shape[0] + len(x),
}


@pytest.mark.parametrize("name", WAITING)
def test_the_counter_sees(name):
    x = torch.tensor([0.0, 1.0, 2.0, 3.0])
    with Synchronisations() as counter:
        WAITING[name](x)
    assert len(counter.seen) == 1


@pytest.mark.parametrize("name", NOT_WAITING)
def test_the_counter_does_not_mind(name):
    x = torch.tensor([0.0, 1.0, 2.0, 3.0])
    with Synchronisations() as counter:
        NOT_WAITING[name](x)
    assert counter.seen == []


def test_the_counter_sees_the_backward_pass():
    x = torch.ones(3, requires_grad=True)
    x.register_hook(lambda gradient: gradient[gradient > 0].sum())
    with contextlib.suppress(RuntimeError), Synchronisations() as counter:
        (x * 2).sum().backward()
    assert len(counter.seen) == 1


def test_what_was_copied_is_on_the_host():
    with Synchronisations() as counter:
        copy = torch.ones(3).cpu()
        copy.numpy(), copy.tolist(), copy.cpu().numpy()
    assert counter.seen == ["cpu"]


@pytest.mark.cuda
def test_a_training_step_waits_once_on_a_gpu(monkeypatch):
    copies = []

    def copy_to_host(tensors, original=matcher._copy_to_host):
        torch.cuda.set_sync_debug_mode("default")
        copies.append(len(tensors))
        result = original(tensors)
        torch.cuda.set_sync_debug_mode("error")
        return result

    model = tiny_dino(torch.float32).train().cuda()
    batch = [part.cuda() for part in tiny_batch(dtype=torch.float32)]
    train_step(model, batch, tiny_targets(3, 1))  # libraries and memory start up
    monkeypatch.setattr(matcher, "_copy_to_host", copy_to_host)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for counts in ((3, 1), (0, 2), (0, 0), (20, 1)):
            train_step(model, batch, tiny_targets(*counts))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(copies) == 4
