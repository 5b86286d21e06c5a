"""Imports a peer's kernels without the rest of the peer, which may need more packages, such as Ray for verl.

If a peer is not installed, or needs more than torch, Triton and transformers, ModuleNotFoundError is raised, which
becomes a line in the bench's table.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from types import ModuleType
from typing import Any


def without_init(*packages: str) -> None:
    """Let modules of these packages be imported without running the packages' `__init__`; parents come first.

    A package that is already imported is not changed.

    Raises:
        ModuleNotFoundError: if a package is not installed.
    """
    for name in packages:
        if name in sys.modules:
            continue
        spec = importlib.util.find_spec(name)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        package = ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        package.__spec__ = spec
        sys.modules[name] = package


def verl_kernels() -> None:
    """Make `verl.utils.kernel`, `.groupwise` and `.experimental` importable without Ray, which verl itself needs."""
    without_init("verl", "verl.utils")


def trl_chunked_logprob() -> Any:
    """TRL's `ChunkedLogProbFunction`, since 1.15: hidden, weight, bias, label, τ, columns, softcap, scale, outputs."""
    without_init("trl", "trl.trainer")
    if "trl.trainer.utils" not in sys.modules:
        # The backward pass uses one function of a module that imports datasets, accelerate and pandas. It gathers a
        # weight that DeepSpeed has sharded; here no weight is.
        utils: Any = ModuleType("trl.trainer.utils")
        utils.maybe_gather_lm_head_ctx = lambda *parameters: contextlib.nullcontext()
        sys.modules["trl.trainer.utils"] = utils
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction
