"""Carries an error in a weight update from vLLM's worker, where it is raised, to the watch that ends the run.

verl's actor sends new weights over a socket and waits, without a limit, until vLLM's worker has taken each piece. It
checks the result of the call only after the last piece. A worker that raises an error takes no further piece, so the
check never happens and the run hangs. But the error passes through the server, which is a separate actor: the server
keeps the text, and the watch asks for it.

While the worker's receiver cleans up after an error it may raise a second one; the first one is kept.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

_ATTRIBUTE = "hapo_weight_update_error"
# verl's methods on vLLM's worker that receive weights.
_UPDATES = ("update_weights_from_ipc", "update_verl_delta_weights")


def name_the_first_error(utils: ModuleType) -> None:
    """Patch vLLM's worker: a failed update reports its first error instead of the one raised while cleaning up.

    Args:
        utils: `verl.workers.rollout.vllm_rollout.utils`.
    """
    worker = utils.vLLMColocateWorkerExtension
    for name in _UPDATES:
        setattr(worker, name, _with_first_error(getattr(worker, name)))


def _with_first_error(update: Any) -> Any:
    @functools.wraps(update)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return update(*args, **kwargs)
        except Exception as error:
            first = first_error(error)
            if first is error:
                raise
            # vLLM passes on only the error's own text, without its cause.
            behind = f"behind it {type(error).__name__}: {error}"
            raise RuntimeError(f"{type(first).__name__}: {first} ({behind})") from error

    return wrapped


def first_error(error: BaseException) -> BaseException:
    """The first error of a chain of causes and contexts."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def keep_errors(server_module: ModuleType) -> None:
    """Patch verl's vLLM server: keep the error text of a failed update.

    Args:
        server_module: `verl.workers.rollout.vllm_rollout.vllm_async_server`.
    """
    server = server_module.vLLMHttpServer
    original = server.collective_rpc

    @functools.wraps(original)
    async def collective_rpc(self: Any, method: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await original(self, method, *args, **kwargs)
        except Exception as error:
            if method in _UPDATES:
                setattr(self, _ATTRIBUTE, f"{type(error).__name__}: {error}" if str(error) else repr(error))
            raise

    server.collective_rpc = collective_rpc


def weight_update_error(server: Any) -> str | None:
    """The error text kept by `keep_errors`, or None; to be called in the server's actor."""
    return getattr(server, _ATTRIBUTE, None)
