"""What tests that start several processes need."""

import datetime
import inspect
import os
import socket
from typing import Any

import torch.distributed as dist
from transformers.distributed import DistributedConfig


def free_port() -> int:
    """A port on which no process of this machine listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def join(rank: int, size: int, port: int) -> None:
    """Make this process one of `size` that communicate over gloo."""
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )


def tensor_parallel() -> dict[str, Any]:
    """The arguments of `from_pretrained` for tensor parallelism, which were others in transformers 5.0."""
    if "tp_plan" in inspect.signature(DistributedConfig).parameters:
        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    return {"tp_plan": "auto"}


def leave() -> None:
    """End this process once all have come here, without destructors.

    With threads of gloo still there, an ordinary exit has aborted in two of eight runs: "terminate called without an
    active exception" (torch 2.13).
    """
    dist.barrier()
    os._exit(0)
