"""Two Ray nodes, each with its own working folder and its own installation of the plugin. Then one of the nodes dies.

Each node runs one rank of the actor, one vLLM server and one agent loop worker.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter

import psutil
import pytest
import ray

from tests.e2e.conftest import PROMPTS, ROLLOUTS, ROOT, TrainingError, name_of
from tests.e2e.test_limits import ANNEALED, SCRIPTED, annealed  # noqa: F401

pytestmark = [pytest.mark.e2e, pytest.mark.long]
ADDRESSES, MINUTE = ("127.0.0.2", "127.0.0.3"), 60
STEPS = 4


class Node:
    """`ray start` in a folder of its own; its workers import the plugin that is installed there."""

    def __init__(self, folder, address, environment, *start):
        self.folder, self.address = folder, address
        site = folder / "site"
        # The folder's own installation comes before the repository, which the workers need for the tests' agent loops.
        self.environment = environment | {"PYTHONPATH": f"{site}:{ROOT}"}
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, ROOT], check=True
        )
        ray_start = [sys.executable, "-m", "ray.scripts.scripts", "start", *start, "--block", "--disable-usage-stats"]
        size = ["--num-cpus=8", "--num-gpus=1", "--object-store-memory=200000000"]
        with (folder / "ray.log").open("w") as log:
            self.process = psutil.Popen(
                [*ray_start, f"--node-ip-address={address}", *size],
                cwd=folder,
                env={**os.environ, **self.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def family(self):
        return [self.process, *self.process.children(recursive=True)] if self.process.is_running() else []

    def kill(self):
        """Kill all processes of the node, as in a power failure."""
        family = self.family
        for process in family:
            process.kill()
        psutil.wait_procs(family, timeout=30)

    def workers(self, name):
        """Processes of this node that are actors of this class and whose working folder is the node's."""
        return [p for p in self.family if name_of(p) == f"ray::{name}" and p.cwd() == str(self.folder)]


class TwoNodes:
    """A run of the annealed launch on two nodes; the second node is killed after the last compared step."""

    def __init__(self, prepare, folders):
        overrides = [
            *ANNEALED,
            *SCRIPTED,
            "trainer.nnodes=2",
            "actor_rollout_ref.rollout.agent.num_workers=2",
            "reward.num_workers=2",
            # The cluster is already running with its own numbers.
            "~ray_kwargs.ray_init.num_cpus",
            "~ray_kwargs.ray_init.num_gpus",
            # The driver connects to the head node, and the trainer's process starts on the driver's node.
            f"+ray_kwargs.ray_init._node_ip_address={ADDRESSES[0]}",
        ]
        port = 6397
        environment = {"RAY_ADDRESS": f"{ADDRESSES[0]}:{port}", "RAY_AUTH_MODE": "disabled"}
        launch, self.run = prepare("two_nodes", *overrides, steps=1000, environment=environment)
        on_nodes = launch.environment | {"VERL_FILE_LOGGER_PATH": str(launch.metrics)}
        del on_nodes["RAY_ADDRESS"]
        # This is not below the test's folder, because the path of a socket has at most 107 characters.
        scratch = tempfile.mkdtemp(prefix="hapo-")
        first = Node(
            folders[0],
            ADDRESSES[0],
            on_nodes,
            "--head",
            f"--port={port}",
            f"--temp-dir={scratch}",
            "--include-dashboard=false",
        )
        self.nodes = [first]
        self.error, self.found = None, {}
        try:
            wait_for(lambda: "Ray runtime started" in (folders[0] / "ray.log").read_text())
            self.nodes.append(Node(folders[1], ADDRESSES[1], on_nodes, f"--address={ADDRESSES[0]}:{port}"))
            wait_for(lambda: "Ray runtime started" in (folders[1] / "ray.log").read_text())
            at = 0.0
            for kind, record in launch.run():
                if kind == "step" and record["step"] == STEPS and not at:
                    for name in ("WorkerDict", "vLLMHttpServer", "HapoAgentLoopWorker"):
                        self.found[name] = [len(node.workers(name)) for node in self.nodes]
                    at = time.monotonic()
                    self.nodes[1].kill()
        except TrainingError as error:
            self.error, self.seconds = error, time.monotonic() - at
        finally:
            for node in self.nodes:
                node.kill()
            shutil.rmtree(scratch, ignore_errors=True)
        self.log = launch.log.read_text(errors="replace")


def wait_for(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "a node did not start"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def two(prepared, tmp_path_factory):
    assert not ray.is_initialized()
    return TwoNodes(prepared, [tmp_path_factory.mktemp(name) for name in ("first", "second")])


def test_each_node_trains_generates_and_injects_with_its_own_plugin(two):
    assert two.found == {"WorkerDict": [1, 1], "vLLMHttpServer": [1, 1], "HapoAgentLoopWorker": [1, 1]}
    for node in two.nodes:
        assert list((node.folder / "site" / "hapo_verl" / "rollout" / "__pycache__").glob("worker.*.pyc"))
    # There is one file per rank.
    assert len(list((two.run.folder / "trace").glob("loss-*.jsonl"))) == 2


def trained(run, step):
    """Responses, flags and advantages of a step, regardless of how its rows were distributed to ranks."""
    uids = {group["uid"] for group in run.groups if group["step"] == step}
    return Counter(
        (tuple(row["responses"]), row["hapo_demonstration"], round(row["advantages"][0], 5))
        for row in run.loss_rows
        if row["uid"] in uids
    )


def test_two_nodes_give_the_results_of_one_node(two, annealed):  # noqa: F811
    for step in range(1, STEPS + 1):
        assert trained(two.run, step) == trained(annealed, step)
        # In step 1 every group has a demonstration in addition to its rollouts.
        assert trained(two.run, step).total() == PROMPTS * (ROLLOUTS + (step == 1))
        ours, ones = two.run.steps[step - 1], annealed.steps[step - 1]
        for name in ("actor/pg_loss", "actor/grad_norm", *(key for key in ones if key.startswith("hapo/"))):
            assert ours[name] == pytest.approx(ones[name], rel=1e-5, abs=1e-7), (step, name)


def test_a_node_that_dies_ends_the_run_within_a_minute_with_a_line_that_names_it(two):
    assert two.error is not None
    assert two.seconds < MINUTE
    (line,) = [line for line in two.log.splitlines() if "hapo: " in line and " died (" in line]
    assert f"hapo: Ray node {ADDRESSES[1]}, " in line
    assert "The actor died because its node has died." in line
