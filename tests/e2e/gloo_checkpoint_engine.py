"""A checkpoint engine for a machine without a GPU: verl's own, except `naive`, use NCCL, NIXL or Mooncake.

`actor_rollout_ref.rollout.checkpoint_engine.backend=gloo` with
`...checkpoint_engine.custom_backend_module=tests.e2e.gloo_checkpoint_engine` select it. It broadcasts one tensor at a
time, which is enough for tests.
"""

from __future__ import annotations

import datetime
import pickle
from collections.abc import AsyncIterator, Iterator
from typing import Any

import ray
import torch
import torch.distributed as dist
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry
from verl.utils.net_utils import get_free_port

TIMEOUT = datetime.timedelta(seconds=60)
LAST = pickle.dumps(None)


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Rank 0 of the actor broadcasts to the rollout workers; the actor's other ranks do not take part."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self._store: dist.TCPStore | None = None
        self._group: dist.ProcessGroupGloo | None = None

    def prepare(self) -> dict[str, Any]:
        address = ray.util.get_node_ip_address()
        port, _ = get_free_port(address)
        return {"address": address, "port": port}

    @classmethod
    def build_topology(cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list[dict]) -> tuple:
        def ranks(values: list[int]) -> dict[str, list[Any]]:
            size = rollout_world_size + 1
            return {"rank": values, "size": [size] * len(values), "master": [metadata[0]] * len(values)}

        return ranks([0] + [-1] * (actor_wg_world_size - 1)), ranks(list(range(1, rollout_world_size + 1)))

    def init_process_group(self, rank: int, size: int, master: dict[str, Any]) -> None:
        if rank >= 0:
            self._store = dist.TCPStore(master["address"], master["port"], size, is_master=rank == 0, timeout=TIMEOUT)
            self._group = dist.ProcessGroupGloo(self._store, rank, size, TIMEOUT)

    def finalize(self) -> None:
        self._group = self._store = None

    async def send_weights(
        self, weights: Iterator[tuple[str, torch.Tensor]], global_steps: int | None = None
    ) -> dict[str, Any]:
        number = -1
        # Every rank iterates over the weights, because all ranks are needed to gather a sharded weight.
        for number, (name, tensor) in enumerate(weights):
            if self._group is not None:
                tensor = tensor.detach().contiguous()
                self._store.set(str(number), pickle.dumps((name, tensor.dtype, tensor.shape)))
                self._group.broadcast([tensor.view(-1).view(torch.uint8)], dist.BroadcastOptions()).wait()
        if self._group is not None:
            self._store.set(str(number + 1), LAST)
            # The store lives in this process, which must not end before every worker has read the end marker.
            self._group.barrier().wait()
        return {}

    async def receive_weights(self, global_steps: int | None = None) -> AsyncIterator[tuple[str, torch.Tensor]]:
        number = 0
        while (head := pickle.loads(self._store.get(str(number)))) is not None:
            name, dtype, shape = head
            tensor = torch.empty(shape, dtype=dtype)
            self._group.broadcast([tensor.view(-1).view(torch.uint8)], dist.BroadcastOptions()).wait()
            yield name, tensor
            number += 1
        self._group.barrier().wait()
