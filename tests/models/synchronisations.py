"""Counts what in a step would wait for a device.

On a CPU nothing waits. So every tensor counts as one on a device, but for those that are known to
be on the host: the targets, and what was copied there.
"""

import torch
from tiny import tiny_batch, tiny_targets
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

COPIES = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist, torch.Tensor.__array__}
COPIES_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor}
DATA_DEPENDENT = {  # operators that read tensors for a number or for the size of their result
    "_local_scalar_dense",  # item, bool, int, float, index
    "nonzero",  # argwhere and where with one argument, too
    "masked_select",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "equal",
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


def put_on_host(tensor):
    tensor.on_host = True
    return tensor


def on_host(tensor):
    return getattr(tensor, "on_host", False)


class _Calls(TorchFunctionMode):
    """Copies, which no operator is called for on a CPU."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in COPIES and on_host(args[0]):
            return func(*args, **kwargs)
        if func in COPIES or (func is torch.Tensor.to and self.waits(args, kwargs)):
            self.seen.append(func.__name__)
        if func is torch.Tensor.new_tensor or (func in COPIES_DATA and kwargs.get("device")):
            self.seen.append(func.__name__)
        result = func(*args, **kwargs)
        return put_on_host(result.clone()) if func is torch.Tensor.cpu else result

    @staticmethod
    def waits(args, kwargs):
        """to(device) or to(other tensor), in any position, but not to(dtype)."""
        places = (torch.device, str, int, torch.Tensor)
        moves = "device" in kwargs or any(isinstance(a, places) for a in args[1:2])
        return moves and not (kwargs.get("non_blocking") or True in args[2:4])


class Synchronisations(TorchDispatchMode):
    """Collects what would wait for a device, in `seen`."""

    def __init__(self):
        super().__init__()
        self.seen = []
        self.calls = _Calls(self.seen)

    def __enter__(self):
        self.calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.waits(func, args, kwargs):
            self.seen.append(str(func))
        return func(*args, **kwargs)

    @staticmethod
    def waits(func, args, kwargs):
        name = func.overloadpacket.__name__
        if name in INDEXING:
            return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        return name in DATA_DEPENDENT and not on_host(args[0])


def train_step(model, batch, targets):
    losses = model(*batch, targets)
    sum(losses.values()).backward()


def what_a_step_waits_for(model, *counts):
    targets = [type(target)(*map(put_on_host, target)) for target in tiny_targets(*counts)]
    batch = tiny_batch(dtype=next(model.parameters()).dtype)
    with Synchronisations() as counter:
        train_step(model, batch, targets)
    return counter.seen
