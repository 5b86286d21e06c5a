"""The plugin that verl loads (entry point group `verl.plugins`): importing this module registers everything.

verl imports it at the end of `import verl`, in every process: driver, trainer, actors, agent loops, reward workers,
vLLM servers. At this point verl is only half imported, so code that needs verl's modules runs when verl imports them;
a worker that never trains thus never loads the trainer classes. verl logs the failure of a plugin at DEBUG only, so a
failure is written to stderr before it is raised.
"""

from __future__ import annotations

import os
import sys
import traceback
from types import ModuleType


def register() -> None:
    """Register estimator, trainers, training engine, presets and, with VERL_PLATFORM=cpu, the CPU platform.

    Also prepares the diagnosis of hangs: errors of weight updates are kept, and processes can report their stacks.
    """
    from wrapt import when_imported

    @when_imported("verl.trainer.ppo.core_algos")
    def _estimator(_module: object) -> None:
        import hapo_verl.driver.estimator  # noqa: F401

    @when_imported("verl.trainer.ppo.v1")
    def _trainers(_module: object) -> None:
        import hapo_verl.driver.trainer  # noqa: F401

    @when_imported("verl.workers.engine.fsdp.transformer_impl")
    def _engine(_module: object) -> None:
        import hapo_verl.actor.engine  # noqa: F401

    @when_imported("verl.workers.rollout.vllm_rollout.utils")
    def _vllm_worker(module: ModuleType) -> None:
        from hapo_verl.protocol.weight_error import name_the_first_error

        name_the_first_error(module)

    @when_imported("verl.workers.rollout.vllm_rollout.vllm_async_server")
    def _vllm_server(module: ModuleType) -> None:
        from hapo_verl.protocol.weight_error import keep_errors

        keep_errors(module)

    # Only in Ray's processes and those they start; a user's own process is left alone.
    if "RAY_RAYLET_PID" in os.environ:
        from hapo_verl.protocol.stacks import answer_the_signal

        answer_the_signal()

    from hapo_verl.launch.presets import register_presets

    register_presets()

    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        import hapo_verl.cpu.platform  # noqa: F401


try:
    register()
except Exception:
    print("hapo-verl could not be loaded; `python -m hapo_verl.doctor` says more.", file=sys.stderr)
    traceback.print_exc()
    raise
