"""Watches the processes that a run needs: if one dies, or the run hangs, the run ends with a line that says why.

verl's trainer waits without a limit, for example for the rollouts of a dead agent loop worker, or until a dead vLLM
engine takes new weights. So a thread beside the trainer checks these processes. For an actor it sends a call, which
waits in the actor's queue while the actor is busy and fails when the actor dies. An engine runs in a separate process
behind an actor and is checked by its HTTP server's `/health`. A slow answer does not count as a death.

A trainer can also wait for ever while every process is alive. Either an engine could not load new weights; its server
keeps the error text (`weight_error.py`). Or something hangs; then the trainer's position does not change
(`progress.py`).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from hapo_verl.driver.progress import Position
from hapo_verl.protocol.stacks import stacks_of
from hapo_verl.protocol.weight_error import weight_update_error

SERVICE_UNAVAILABLE = 503  # vLLM's answer when its engine is dead
# If a server refuses connections, its process is gone. Ray reports the cause: at once, or if the whole node is gone,
# after some 20 s. So the watch waits for Ray's report before it reports the refused connection itself.
REFUSED_SECONDS = 30.0
# Time until other processes that died at the same time are noticed, and until a line reaches the driver.
MOMENT_SECONDS = 2.0
# A trainer that fails may have noticed a death before Ray reports it; the watch waits this long for the report.
FAILED_SECONDS = 10.0
# An actor counts as busy if a call has waited in its queue for this many checks and this many seconds.
BUSY_LOOKS = 3
BUSY_SECONDS = 5.0
# Stacks are collected on every node by a Ray task, which may have to wait until a worker has started.
STACKS_SECONDS = 60.0


def _end() -> None:
    """End this process at once; its main thread may be waiting in C++ code, where no exception reaches it."""
    threading.Event().wait(MOMENT_SECONDS)
    os._exit(1)


@dataclass(frozen=True)
class Stall:
    """Settings for the detection of a hang.

    Attributes:
        position: returns the trainer's position; called at every check.
        report: seconds without progress until a line reports it; None for no report.
        limit: seconds without progress until the run ends; None to wait for ever.
        folder: folder for a file with the stacks of all processes.
    """

    position: Callable[[], Position]
    report: float | None
    limit: float | None
    folder: Path


class Watch:
    """A thread that checks the processes every few seconds between `start` and `stop`."""

    def __init__(
        self, *, interval: float, advice: str, stall: Stall | None = None, end: Callable[[], None] = _end
    ) -> None:
        """Make a watch; `over` adds the processes to be watched.

        Args:
            interval: seconds between two checks.
            advice: the last sentence of a report: what the user should do after a death.
            stall: settings for the detection of a hang; None for no detection.
            end: called after the report, to end the run.
        """
        self._interval, self._advice, self._stall, self._end = interval, advice, stall, end
        self._actors: dict[str, Any] = {}
        self._engines: dict[str, str] = {}
        self._updated: dict[str, Any] = {}
        self._calls: dict[str, ray.ObjectRef] = {}
        self._called: dict[str, float] = {}  # when, by the monotonic clock
        self._asked: dict[str, ray.ObjectRef] = {}  # for the error of a weight update
        self._places: dict[str, ray.ObjectRef] = {}  # node and process id
        self._refused: dict[str, float] = {}  # since when, by the monotonic clock
        self._nodes: dict[str, str] = {}
        self._mark: Any = None
        self._since, self._reported = time.monotonic(), False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hapo-watch", daemon=True)

    def over(
        self,
        actors: Mapping[str, Any],
        engines: Mapping[str, str] | None = None,
        updated: Mapping[str, Any] | None = None,
    ) -> None:
        """Watch these processes too.

        Args:
            actors: name → Ray actor handle; the names are used in reports.
            engines: name → `host:port` of vLLM's HTTP server.
            updated: name → handle of the actors that pass new weights to an engine and keep its errors.
        """
        self._nodes |= {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        # The places are asked for now, since a blocked actor would not answer later.
        self._places |= {name: actor.__ray_call__.remote(_place) for name, actor in actors.items()}
        # The mappings are replaced, not changed, since the thread may be reading them.
        self._actors = self._actors | dict(actors)
        self._engines = self._engines | dict(engines or {})
        self._updated = self._updated | dict(updated or {})

    def start(self) -> None:
        """Start checking."""
        self._since = time.monotonic()
        self._thread.start()

    def stop(self, *, failed: bool = False) -> None:
        """Stop checking, so that processes that end with the run are not reported as dead.

        Args:
            failed: whether the trainer has raised an error. The cause may be a death that the watch has not seen yet,
                so it checks for some more seconds and reports a death.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        until = time.monotonic() + FAILED_SECONDS
        while failed and not self._say_what_died() and time.monotonic() < until:
            pass

    def dead(self) -> dict[str, str]:
        """Name → cause, for each process that has died."""
        actors = {name: self._actor(name, actor) for name, actor in self._actors.items()}
        engines = {name: self._engine(name, address) for name, address in self._engines.items()}
        return {name: cause for name, cause in (actors | engines).items() if cause}

    def not_updated(self) -> dict[str, str]:
        """Name → the engine's error, for each server whose engine could not load new weights."""
        return {name: error for name, server in self._updated.items() if (error := self._update_error(name, server))}

    def _actor(self, name: str, actor: Any) -> str | None:
        if name not in self._calls:
            self._calls[name], self._called[name] = actor.__ray_ready__.remote(), time.monotonic()
        if not ray.wait([self._calls[name]], timeout=0)[0]:
            return None
        try:
            ray.get(self._calls.pop(name))
        except ActorUnavailableError:
            return None
        except RayActorError as error:
            return _cause(error)
        return None

    def _update_error(self, name: str, server: Any) -> str | None:
        if name not in self._asked:
            self._asked[name] = server.__ray_call__.remote(weight_update_error)
        if not ray.wait([self._asked[name]], timeout=0)[0]:
            return None
        try:
            return ray.get(self._asked.pop(name))
        except RayActorError:
            return None

    def _engine(self, name: str, address: str) -> str | None:
        since = self._refused.pop(name, None)
        # HTTPConnection uses no proxy; a cluster's proxy would answer for servers that it does not reach.
        connection = HTTPConnection(address, timeout=self._interval)
        try:
            connection.request("GET", "/health")
            status = connection.getresponse().status
        except ConnectionRefusedError:
            self._refused[name] = time.monotonic() if since is None else since
            long = time.monotonic() - self._refused[name] >= REFUSED_SECONDS
            return f"{address} refuses connections" if long else None
        except (OSError, HTTPException):
            # A time-out or a reset connection means a busy server.
            return None
        finally:
            connection.close()
        return f"{address}/health answers {status}" if status == SERVICE_UNAVAILABLE else None

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            wrong = self.dead() or self.not_updated()
            if (wrong and not self._stop.is_set() and self._say_what_died()) or self._stands_still():
                self._end()
                return

    def _say_what_died(self) -> bool:
        """Report deaths and failed updates on stderr, which Ray forwards to the driver; False if there were none."""
        found, errors = self.dead(), self.not_updated()
        threading.Event().wait(MOMENT_SECONDS)
        found, errors = found | self.dead(), errors | self.not_updated()
        if found:
            _say(self._line(found))
        elif errors:
            texts = dict.fromkeys(errors.values())
            _say(f"{', '.join(errors)} could not load new weights ({'; '.join(texts)}). {self._advice}")
        return bool(found or errors)

    def _line(self, found: Mapping[str, str]) -> str:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        nodes = [f"Ray node {address}" for key, address in self._nodes.items() if key not in alive]
        causes = dict.fromkeys(found.values())
        return f"{', '.join([*nodes, *found])} died ({'; '.join(causes)}). {self._advice}"

    def _stands_still(self) -> bool:
        """Whether the trainer has hung until `limit`, so that the run must end; reports it once at `report`."""
        stall, now = self._stall, time.monotonic()
        if stall is None:
            return False
        mark, text = stall.position()
        if mark != self._mark:
            self._mark, self._since, self._reported = mark, now, False
            return False
        seconds = now - self._since
        over = stall.limit is not None and seconds >= stall.limit
        if over or (stall.report is not None and seconds >= stall.report and not self._reported):
            self._reported = True
            file = self._write_stacks(stall.folder, text)
            # The trainer may have made progress meanwhile.
            over = over and not self._stop.is_set() and stall.position().mark == mark
            then = f"The run ends. {self._advice}" if over else _what_then(stall.limit)
            _say(f"no progress for {seconds:.0f} s in {text}{self._busy()}. Stacks of all processes: {file}. {then}")
        return over

    def _busy(self) -> str:
        # An idle actor answers a call before the next check; one that does not is busy.
        long_ago = time.monotonic() - max(BUSY_LOOKS * self._interval, BUSY_SECONDS)
        names = [name for name in self._actors if name in self._calls and self._called[name] < long_ago]
        cpus = [int(of().get("CPU", 0)) for of in (ray.available_resources, ray.cluster_resources)]
        return f"; busy: {', '.join(names) or 'nobody'}; Ray has {cpus[0]} of {cpus[1]} CPUs free"

    def _write_stacks(self, folder: Path, text: str) -> Path:
        file = folder / f"hapo_stacks_{time.strftime('%Y%m%d-%H%M%S')}.txt"
        folder.mkdir(parents=True, exist_ok=True)
        parts = [text, *(f"trainer: {stack}" for stack in stacks_of([os.getpid()]).values()), *self._stacks()]
        file.write_text("\n\n".join(parts) + "\n")
        return file

    def _stacks(self) -> list[str]:
        """The stacks of every actor whose place is known, and of its child processes, collected on its node."""
        known, _ = ray.wait([*self._places.values()], num_returns=len(self._places), timeout=0)
        names: dict[str, dict[int, str]] = {}
        for name, place in self._places.items():
            try:
                node, pid = ray.get(place) if place in known else ("", 0)
            except RayActorError:
                continue
            if node:
                names.setdefault(node, {})[pid] = name
        task = ray.remote(num_cpus=0, max_retries=0)(stacks_of)
        asked = {
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(list(of)): of
            for node, of in names.items()
        }
        answered, _ = ray.wait([*asked], num_returns=len(asked), timeout=STACKS_SECONDS) if asked else ([], [])
        found: list[str] = []
        for reference, of in asked.items():
            try:
                stacks = ray.get(reference) if reference in answered else dict.fromkeys(of, "its node does not answer")
            except RayError as error:
                stacks = dict.fromkeys(of, f"its node does not answer ({type(error).__name__})")
            found += (f"{of.get(pid, 'started by it')}, process {pid}: {stack}" for pid, stack in stacks.items())
        return found


def _say(line: str) -> None:
    print(f"hapo: {line}", file=sys.stderr, flush=True)


def _what_then(limit: float | None) -> str:
    if limit is None:
        return "The run goes on."
    return f"The run goes on, and ends after {limit:.0f} s without progress (hapo.stall_limit)."


def _place(_actor: Any) -> tuple[str, int]:
    return ray.get_runtime_context().get_node_id(), os.getpid()


def _cause(error: RayActorError) -> str:
    """The sentence of Ray's long error message that gives the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    because = next((line for line in lines if line.startswith("The actor ") and " because " in line), lines[0])
    return because.partition(" Some common causes")[0].rstrip(".")
