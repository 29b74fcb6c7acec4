"""Models whose state is too large for one GPU: each process keeps a part (PyTorch's FSDP2)."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from detectron2.utils import comm
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only

from ..models import transformer_layers
from .meta_arch import DetrMetaArch

logger = logging.getLogger("detectron2.dino_d2")


def shard(model: DetrMetaArch) -> DetrMetaArch:
    """Leave each process a part of every weight, and so of its gradient and optimizer state.

    The weights of a layer of encoder or decoder, or of a backbone's transformer block, come
    together while it runs, all others for the whole step. Buffers stay whole. Weights to start
    with are those of process 0; `load_state_dict` takes whole ones.
    """
    for tensor in model.state_dict().values():
        distributed.broadcast(tensor, 0)
    blocks = [
        module
        for name, module in model.detector.backbone.named_modules()
        if name.split(".")[-2:-1] == ["blocks"]
    ]
    for module in (*blocks, *transformer_layers(model.detector)):
        fully_shard(module)
    fully_shard(model)
    model.register_load_state_dict_pre_hook(_place_weights)
    own, total = (sum(map(size, model.parameters())) for size in (_own_size, Tensor.numel))
    logger.info("Sharded: %d of %d weights are in this process", own, total)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether it went through `shard`."""
    return isinstance(model, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be sharded. Every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be sharded; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather(state):
    """State with whole tensors, on the CPU, for process 0; the others get None for what is sharded.

    Every process has to call it.
    """

    def collect(tensor: DTensor) -> Tensor | None:
        tensor = tensor.full_tensor()
        return tensor.cpu() if comm.is_main_process() else None

    return tree_map_only(DTensor, collect, state)


def place(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if another one is sharded."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    tensor = tensor.to(like.device)
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def take_whole_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer of sharded weights load state that is whole."""
    optimizer.register_load_state_dict_pre_hook(_place_state)


@contextmanager
def without_sync(model: nn.Module) -> Iterator[None]:
    """In this context, gradients stay in their process."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif is_sharded(model):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """In this context, which is for inference, every process has all weights.

    Processes then need not have the same number of images.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def _own_size(weight: Tensor) -> int:
    return own_part(weight).numel()


def _place_weights(model: nn.Module, state_dict: dict[str, Tensor], *_) -> None:
    for name, tensor in model.state_dict().items():
        if name in state_dict:
            state_dict[name] = place(state_dict[name], tensor)


def _place_state(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state = {
        index: {
            name: place(value, weights[index]) if value.shape == weights[index].shape else value
            for name, value in of_weight.items()
        }
        for index, of_weight in state_dict["state"].items()
    }
    return {**state_dict, "state": state}
