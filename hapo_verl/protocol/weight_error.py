"""An engine's error in a weight update, from the process where it is raised to the watch that ends the run.

verl's actor sends new weights over a socket and waits there for vLLM's worker to take each piece, without a limit; it
looks at the outcome of the call behind the last one. A worker that raises takes no further piece, so nobody ever looks.
The error passes the server, an actor of its own: it keeps the text, and the watch asks for it.

The worker's receiver cleans up behind an error and may raise another one there; what is kept is the first.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

_ATTRIBUTE = "hapo_weight_update_error"
# verl's methods of vLLM's worker that take weights.
_UPDATES = ("update_weights_from_ipc", "update_verl_delta_weights")


def name_the_first_error(utils: ModuleType) -> None:
    """In vLLM's worker: an update that fails says its first error, and not the one of the clean-up behind it.

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
            # vLLM hands on no more than an error's own text.
            behind = f"behind it {type(error).__name__}: {error}"
            raise RuntimeError(f"{type(first).__name__}: {first} ({behind})") from error

    return wrapped


def first_error(error: BaseException) -> BaseException:
    """The error with which it began."""
    while (before := error.__cause__ or error.__context__) is not None:
        error = before
    return error


def keep_errors(server_module: ModuleType) -> None:
    """In verl's server of vLLM: keep the text of an update that has failed.

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
    """What `keep_errors` has kept; called in the server's actor."""
    return getattr(server, _ATTRIBUTE, None)
