"""Ends a wrong launch before Ray is started, with one sentence on stderr and exit code 2.

It is a Hydra callback, `hydra.callbacks.hapo`, which HAPO's presets set; verl's entry point is unchanged. An error that
only the trainer can find is printed the same way when the run has ended, below its log. `HAPO_TRACEBACK=1` also prints
the traceback.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from hapo_verl.config import ConfigError
from hapo_verl.launch.checks import check_before_ray
from hapo_verl.launch.files import MissingFileError
from hapo_verl.rollout.reward import RewardError

EXIT_CODE = 2


class Preflight(Callback):
    """The Hydra callback: checks the composed configuration before the job and reports its error after it."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Check a single run, before anything is started or any folder is made."""
        _check(config)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        """Check a job of a sweep; a single run was checked by `on_run_start`."""
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            _check(config)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        """Print the trainer's error as one sentence, without Ray's traceback."""
        if job_return.status == JobStatus.FAILED:
            error = _sentence(job_return._return_value)
            if error is not None:
                _end(error)


def _check(config: DictConfig) -> None:
    try:
        check_before_ray(config)
    except MissingFileError as error:
        if not _joins_a_cluster(config):
            _end(error)
        print(f"hapo: {error} The launch goes on: the trainer may run on another machine.", file=sys.stderr, flush=True)
    except ConfigError as error:
        _end(error)


def _end(error: BaseException) -> NoReturn:
    if os.environ.get("HAPO_TRACEBACK") == "1":
        traceback.print_exception(error)
    print(error, file=sys.stderr, flush=True)
    # Raising would not do: Hydra turns an exception in a callback into a warning.
    sys.exit(EXIT_CODE)


def _joins_a_cluster(config: DictConfig) -> bool:
    """Whether the launch joins a running Ray cluster, so that its trainer may run on another machine."""
    given = OmegaConf.select(config, "ray_kwargs.ray_init.address") or os.environ.get("RAY_ADDRESS")
    if given:
        return given != "local"
    # By default Ray joins the cluster that was started last on this machine.
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return (Path(folder) / "ray" / "ray_current_cluster").exists()


def _sentence(error: Any) -> BaseException | None:
    """The `ConfigError` or `RewardError` with which a job ended, here or in another process; None for other errors."""
    cause = getattr(error, "cause", None)
    return next((found for found in (cause, error) if isinstance(found, ConfigError | RewardError)), None)
