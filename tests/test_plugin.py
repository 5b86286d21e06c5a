"""The effect of importing verl on a process, with and without the plugin."""

import json
import os
import subprocess
import sys

import pytest

from hapo_verl.config import AnnealedGate
from hapo_verl.launch.checks import check_launch


def python(code, **environment):
    """The last line that `code` prints in a fresh interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "VERL_PLATFORM"} | environment
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=env, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()[-1]


# Starting an interpreter that imports verl takes eight seconds, so one answers several questions.
IMPORTED = """
import sys, verl
modules = ("hapo_verl.plugin", "verl.trainer.ppo.v1", "hapo_verl.driver.trainer", "hapo_verl.cpu.platform")
imported = [name in sys.modules for name in modules]
"""
PATCHED = """
from importlib import metadata
from torch.distributed.fsdp import CPUOffloadPolicy
try:
    version = metadata.version("vllm")
except metadata.PackageNotFoundError:
    version = "none"
patched = [version.endswith("+cpu"), CPUOffloadPolicy().pin_memory]
"""
SOCKET = """
import os, types, ray
from hapo_verl.cpu import platform as cpu_platform
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
context = ray.get_runtime_context()
class Sender:
    def __init__(self):
        self.zmq_handle = f"ipc:///tmp/zmq-{context.get_job_id()}-replica-0.sock"
class Receiver:
    def __init__(self):
        os.environ["VERL_RAY_JOB_ID"] = context.get_job_id()
cpu_platform._socket_of_its_own(types.SimpleNamespace(ServerAdapter=Sender))
cpu_platform._server_of_that_socket(types.SimpleNamespace(vLLMHttpServer=Receiver))
sent, _ = Sender().zmq_handle, Receiver()
received = f"ipc:///tmp/zmq-{os.environ['VERL_RAY_JOB_ID']}-replica-0.sock"
socket = [sent == received, context.gcs_address.rpartition(":")[2] in sent, context.get_job_id() in sent]
"""
WRAPPED = """
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension as Worker
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer as Server
from hapo_verl.protocol.weight_error import _UPDATES
methods = [*(getattr(Worker, name) for name in _UPDATES), Server.collective_rpc]
wrapped = [method.__wrapped__.__qualname__ for method in methods]
"""


@pytest.fixture(scope="module")
def without_the_platform():
    return json.loads(python(f"{IMPORTED}{PATCHED}import json; print(json.dumps([imported, patched]))"))


@pytest.fixture(scope="module")
def with_the_platform():
    code = f"import verl\n{PATCHED}{SOCKET}{WRAPPED}import json; print(json.dumps([patched, socket, wrapped]))"
    return json.loads(python(code, VERL_PLATFORM="cpu"))


def test_importing_verl_loads_the_plugin_and_no_trainer(without_the_platform):
    assert without_the_platform[0] == [True, False, False, False]


def test_without_the_plugin_the_readmes_launch_line_fails_instead_of_training_grpo():
    code = (
        "import verl\n"
        "from hydra import compose, initialize_config_module\n"
        "from verl.trainer.ppo.v1 import get_trainer_cls\n"
        "with initialize_config_module('verl.trainer.config', version_base=None):\n"
        "    config = compose('ppo_trainer', overrides=['+hapo=paper', 'trainer.v1.trainer_mode=hapo_sync'])\n"
        "try:\n    get_trainer_cls(config.trainer.v1.trainer_mode)\n"
        "except ValueError as error:\n    print(config.hapo, error)\n"
    )
    printed = python(code, VERL_USE_EXTERNAL_PLUGINS="none")
    assert printed.startswith("paper Unknown trainer 'hapo_sync'.")


def test_the_cpu_platform_is_patched_in_only_if_requested(without_the_platform, with_the_platform):
    assert without_the_platform[1] == [False, True]
    assert with_the_platform[0] == [True, False]


def test_both_ends_of_the_weight_socket_are_named_after_the_cluster_and_the_job(with_the_platform):
    assert with_the_platform[1] == [True, True, True]


def test_verls_weight_updates_are_wrapped_where_verl_is_imported(with_the_platform):
    """So that an error of a worker gets to the watch: see protocol/test_weight_error.py."""
    assert with_the_platform[2] == [
        "vLLMColocateWorkerExtension.update_weights_from_ipc",
        "vLLMColocateWorkerExtension.update_verl_delta_weights",
        "vLLMHttpServer.collective_rpc",
    ]


def test_vllm_is_left_alone_without_the_cpu_platform(monkeypatch):
    from hapo_verl.cpu import vllm as vllm_cpu

    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)  # Importing it would raise.
    vllm_cpu.register()
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    with pytest.raises(ImportError):
        vllm_cpu.register()


# Only another vLLM can change this, and each case imports it.
@pytest.mark.long
@pytest.mark.parametrize(("registered", "seconds"), [(True, (0.0, 0.05)), (False, (0.01, 10.0))])
def test_vllms_processes_wait_for_each_other_without_using_a_core(registered, seconds):
    code = (
        "import threading, time\n"
        + "from hapo_verl.cpu import vllm\nvllm.register()\n" * registered
        + "from vllm.distributed.device_communicators.shm_broadcast import MessageQueue\n"
        "writer = MessageQueue(n_reader=1, n_local_reader=1)\n"
        "reader = MessageQueue.create_from_handle(writer.export_handle(), 0)\n"
        "ready = threading.Thread(target=writer.wait_until_ready)\n"
        "ready.start(); reader.wait_until_ready(); ready.join()\n"
        "writer.enqueue('first'); reader.dequeue()\n"
        "threading.Timer(0.9, writer.enqueue, args=['later']).start()\n"
        "started = time.process_time()\n"
        "first, used = reader.dequeue(), time.process_time() - started\n"
        # Simulate a lost notification.
        "writer._spin_condition.notify = lambda: None\n"
        "threading.Timer(1.5, writer.enqueue, args=['unheard']).start()\n"
        "started = time.monotonic()\n"
        "print(first, used, reader.dequeue(), time.monotonic() - started)"
    )
    heard, used, unheard, waited = python(code, VERL_PLATFORM="cpu").split()
    assert (heard, unheard) == ("later", "unheard")
    assert seconds[0] <= float(used) <= seconds[1]
    # vLLM looks again after five seconds.
    assert (float(waited) < 4) == registered


def test_plus_is_the_papers_launch_with_annealing_appended_rows_and_the_logarithm(launch):
    plus, paper = (launch("actor_rollout_ref.rollout.n=8", preset=[f"+hapo={name}"]) for name in ("plus", "paper"))
    assert (plus.hapo.gate.name, plus.hapo.injection.mode) == ("annealed", "append")
    assert (plus.hapo.loss.exponent, plus.hapo.loss.shaping) == (0.0, 1.0)
    assert check_launch(plus).gate == AnnealedGate()
    plus.hapo.gate.name, plus.hapo.injection.mode = "paper", "replace"
    plus.hapo.loss.exponent, plus.hapo.loss.shaping = 1.0, 0.1
    assert plus == paper


def test_single_keys_of_both_presets_stay_overridable(launch):
    config = launch("+hapo_platform=cpu", "hapo.gate.threshold=0.7", "actor_rollout_ref.rollout.dtype=bfloat16")
    assert config.hapo.gate.threshold == 0.7
    assert config.hapo.gate.prior_success is None
    assert config.algorithm.adv_estimator == "hapo"
    assert config.trainer.device == "cpu"
    assert config.actor_rollout_ref.rollout.dtype == "bfloat16"


def test_the_cpu_platform_without_hapo_is_verls_own_trainer(launch):
    config = launch("+hapo_platform=cpu", preset=[])
    assert config.trainer.v1.trainer_mode == "sync"
    assert "hapo" not in config
