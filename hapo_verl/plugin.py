"""verl's door to this package: importing it registers everything (entry point group `verl.plugins`).

verl imports it at the end of `import verl`, in every process that does so: driver, trainer, actors, agent loops,
reward workers, vLLM servers. Three things follow. verl is half imported here, so what needs verl's modules waits until
verl itself imports them; a worker that never trains pays nothing for the trainer classes; and verl logs a plugin's
failure at DEBUG only, so a failure is written to stderr before it is raised.
"""

from __future__ import annotations

import os
import sys
import traceback
from types import ModuleType


def register() -> None:
    """Register estimator, trainers, training engine, presets and, with VERL_PLATFORM=cpu, the CPU platform.

    And what a hang leaves to be read: errors of weight updates, and stacks.
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

    # In Ray's processes, and those that they start; nothing of a user's own process is touched.
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
