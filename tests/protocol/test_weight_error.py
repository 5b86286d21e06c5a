"""How an error of vLLM's worker in a weight update gets from verl's own receiver to the watch."""

import asyncio
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import verl

from hapo_verl.protocol.weight_error import first_error, keep_errors, name_the_first_error, weight_update_error

# verl's package imports vLLM, which this module does not need.
_FILE = Path(verl.__file__).parent / "workers" / "rollout" / "vllm_rollout" / "bucketed_weight_transfer.py"
_SPEC = importlib.util.spec_from_file_location("verls_bucketed_weight_transfer", _FILE)
transfer = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(transfer)

TIED = "'lm_head.weight' was skipped because it is tied to 'model.embed_tokens.weight'"


def update_that_fails():
    """verl's receiver with a real segment of shared memory; its clean-up fails after the loading error."""
    receiver = transfer.BucketedWeightReceiver("ipc:///tmp/hapo-test.sock", torch.device("cpu"), use_shm=True)
    segment = transfer.create_shared_memory(1024, "hapo-test-weights")
    received = [{"name": "hapo-test-weights", "size": 1024}, {"bucket_meta": {}, "is_last": True}]
    receiver._init_socket = lambda: None
    receiver.socket = SimpleNamespace(
        recv_pyobj=lambda: received.pop(0), send=lambda _: None, close=lambda: None, setsockopt=lambda *_: None
    )

    def load(weights, is_last):
        # The model keeps a reference to the given weights.
        load.kept = receiver.buffer[:4]
        raise ValueError(TIED)

    try:
        receiver.receive_weights(on_bucket_received=load)
    finally:
        load.kept = None
        receiver.shm = None
        segment.close()
        segment.unlink()


def test_verls_clean_up_hides_the_first_error(monkeypatch):
    """Otherwise the wrapper would not be needed."""
    monkeypatch.setattr(
        transfer, "get_torch_device", lambda: SimpleNamespace(synchronize=lambda: None, empty_cache=lambda: None)
    )
    monkeypatch.setattr(transfer, "is_support_ipc", lambda: False)
    with pytest.raises(BufferError, match="cannot close exported pointers exist") as raised:
        update_that_fails()
    assert str(first_error(raised.value)) == TIED


@pytest.fixture
def modules(monkeypatch):
    """Replacements of verl's two modules: a worker that fails, and a server with an engine."""

    class Worker:
        def update_weights_from_ipc(self, fail):
            try:
                if fail:
                    raise ValueError(TIED)
            finally:
                if fail == "twice":
                    raise BufferError("cannot close exported pointers exist")
            return "loaded"

        def update_verl_delta_weights(self):
            raise ValueError("a delta")

    class Server:
        def __init__(self, worker):
            self.worker = worker

        async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
            # vLLM passes on only an error's text.
            try:
                return getattr(self.worker, method)(*args, **(kwargs or {}))
            except Exception as error:
                raise Exception(f"Call to collective_rpc method failed: {error}") from None

    name_the_first_error(SimpleNamespace(vLLMColocateWorkerExtension=Worker))
    keep_errors(SimpleNamespace(vLLMHttpServer=Server))
    return Server(Worker())


@pytest.mark.parametrize(
    ("fail", "kept"),
    [
        (False, None),
        ("once", f"Exception: Call to collective_rpc method failed: {TIED}"),
        (
            "twice",
            f"Exception: Call to collective_rpc method failed: ValueError: {TIED} (behind it BufferError: cannot close "
            "exported pointers exist)",
        ),
    ],
)
def test_the_server_keeps_the_first_error_of_an_update_and_still_raises(modules, fail, kept):
    call = modules.collective_rpc("update_weights_from_ipc", timeout=1, kwargs={"fail": fail})
    if fail:
        with pytest.raises(Exception, match="Call to collective_rpc"):
            asyncio.run(call)
    else:
        assert asyncio.run(call) == "loaded"
    assert weight_update_error(modules) == kept


def test_failures_of_other_calls_are_left_to_verl(modules):
    with pytest.raises(Exception, match="no_such"):
        asyncio.run(modules.collective_rpc("no_such"))
    assert weight_update_error(modules) is None
