"""The wire on which a trainer's weights reach a rollout server: NCCL between GPUs, Gloo between CPUs.

Both are spoken through vLLM's own endpoints of weight transfer. On GPUs its engine ``nccl`` receives; on a CPU, where
it has none, :class:`GlooWeightTransferEngine` does, so that everything but the wire is the same code.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer import nccl_common
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)


class Group(Protocol):
    """The trainer (rank 0) and every worker of one server."""

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None: ...


class GlooGroup:
    """A :class:`Group` over TCP, apart from the groups that a trainer or an engine has of its own."""

    def __init__(self, host: str, port: int, rank: int, world_size: int) -> None:
        self._group: Any = stateless_init_torch_distributed_process_group(host, port, rank, world_size, "gloo")

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """Fill contiguous `tensor` with that of rank `src`."""
        options = torch.distributed.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self._group.broadcast([tensor.view(-1).view(torch.uint8)], options).wait()


class GlooWeightTransferEngine(NCCLWeightTransferEngine):
    """vLLM's receiver of weights with a group of Gloo in the place of NCCL's: ``--weight-transfer-config`` names it."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Meet the trainer."""
        assert init_info.master_address is not None and init_info.master_port is not None
        here = self.parallel_config.data_parallel_index * self.parallel_config.world_size + self.parallel_config.rank
        rank = here + init_info.rank_offset
        self._gloo = GlooGroup(init_info.master_address, init_info.master_port, rank, init_info.world_size)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive tensors. The parent's waits for an accelerator after that."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Receive tensors one by one, each loaded before the next comes."""
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self._gloo.broadcast(weight, 0)
            self.model.load_weights([(name, weight)])  # type: ignore[operator]


def open_group(information: dict[str, Any], device: torch.device) -> Group:
    """The trainer's end, as rank 0; it waits for all workers. `information` is what they are told, `device` that of the
    weights."""
    if device.type == "cuda":
        return nccl_common.trainer_init(information)
    return GlooGroup(information["master_address"], information["master_port"], 0, information["world_size"])


def send(group: Group, tensors: Sequence[Tensor]) -> None:
    """Send `tensors` of any shape, in order; they may be freed after that."""
    on_gpu = tensors[0].device.type == "cuda"
    stream = torch.cuda.current_stream() if on_gpu else None
    for tensor in tensors:
        group.broadcast(tensor.detach().contiguous(), 0, stream)
    if stream is not None:
        stream.synchronize()
