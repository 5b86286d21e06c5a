"""What a run cannot go on without: where one of them dies, the run ends with a line that names it.

verl's trainer waits without a limit: for rollouts that a dead agent loop worker will never write, for a dead vLLM
engine to take new weights. So a thread beside it looks at them. An actor is asked whether it is there by a call that
waits in its queue and fails when it dies, however busy it is; an engine, which lives in a process of its own behind
the actor, by its HTTP server's `/health`. A slow answer is no death.

Two more things leave a trainer waiting with every process alive: an engine that could not load new weights, whose text
its server keeps (`weight_error.py`), and a hang, which shows in a trainer that stands where it stood (`progress.py`).
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
# A server that refuses connections has lost its process. Ray knows more of that: at once, or, where the whole node is
# gone, in some 20 s, and then also that it was the node. So its word is waited for.
REFUSED_SECONDS = 30.0
# What dies with another needs a moment to be seen, and a line to reach the driver.
MOMENT_SECONDS = 2.0
# A trainer that fails may have seen a death before Ray tells of it.
FAILED_SECONDS = 10.0
# Looks, and seconds, that a call may wait in the queue of an actor that is not busy.
BUSY_LOOKS = 3
BUSY_SECONDS = 5.0
# Stacks are asked for on every node, by a task that may have to wait for a worker to start.
STACKS_SECONDS = 60.0


def _end() -> None:
    """End this process, whose main thread may wait in C++, where no exception reaches it."""
    threading.Event().wait(MOMENT_SECONDS)
    os._exit(1)


@dataclass(frozen=True)
class Stall:
    """When a trainer that stands still is a hang.

    Attributes:
        position: where it is, asked at every look.
        report: seconds without progress until a line says so; None says nothing.
        limit: seconds without progress until the run ends; None waits for ever.
        folder: receives a file with the stacks of all processes.
    """

    position: Callable[[], Position]
    report: float | None
    limit: float | None
    folder: Path


class Watch:
    """A thread that looks every few seconds between `start` and `stop`."""

    def __init__(
        self, *, interval: float, advice: str, stall: Stall | None = None, end: Callable[[], None] = _end
    ) -> None:
        """A watch over nothing yet.

        Args:
            interval: seconds between two looks.
            advice: what to do after a death, the last sentence of the line.
            stall: when a trainer that stands still is a hang; None never says so.
            end: called behind the line.
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
        """Watch these as well.

        Args:
            actors: Ray actor handles by the name that a line would give them.
            engines: `host:port` of vLLM's HTTP servers, likewise.
            updated: those of the actors that hand new weights to an engine and keep its errors.
        """
        self._nodes |= {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        # Asked now: an actor that is blocked says nothing.
        self._places |= {name: actor.__ray_call__.remote(_place) for name, actor in actors.items()}
        # Whole mappings are exchanged: the thread may be in the middle of a look.
        self._actors = self._actors | dict(actors)
        self._engines = self._engines | dict(engines or {})
        self._updated = self._updated | dict(updated or {})

    def start(self) -> None:
        """Look from now on."""
        self._since = time.monotonic()
        self._thread.start()

    def stop(self, *, failed: bool = False) -> None:
        """Look no more; what takes a run apart at its end is no death.

        Args:
            failed: the trainer has raised by itself, perhaps for a death that it saw first: say the line then too,
                some seconds later where nothing died.
        """
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        until = time.monotonic() + FAILED_SECONDS
        while failed and not self._say_what_died() and time.monotonic() < until:
            pass

    def dead(self) -> dict[str, str]:
        """Of each that has died its name and the cause."""
        actors = {name: self._actor(name, actor) for name, actor in self._actors.items()}
        engines = {name: self._engine(name, address) for name, address in self._engines.items()}
        return {name: cause for name, cause in (actors | engines).items() if cause}

    def not_updated(self) -> dict[str, str]:
        """Of each whose engine could not load new weights its name and the engine's error."""
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
        # No proxy stands between: a cluster's proxy answers for servers that it does not reach.
        connection = HTTPConnection(address, timeout=self._interval)
        try:
            connection.request("GET", "/health")
            status = connection.getresponse().status
        except ConnectionRefusedError:
            self._refused[name] = time.monotonic() if since is None else since
            long = time.monotonic() - self._refused[name] >= REFUSED_SECONDS
            return f"{address} refuses connections" if long else None
        except (OSError, HTTPException):
            # A time-out or a reset connection: a busy server.
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
        """The line to stderr, which Ray forwards to the driver; whether there was one to say."""
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
        """Whether the run is to end for it; says so once at `report`, and at `limit`."""
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
            # It may have gone on meanwhile.
            over = over and not self._stop.is_set() and stall.position().mark == mark
            then = f"The run ends. {self._advice}" if over else _what_then(stall.limit)
            _say(f"no progress for {seconds:.0f} s in {text}{self._busy()}. Stacks of all processes: {file}. {then}")
        return over

    def _busy(self) -> str:
        # A call is answered by the next look, or its actor is at something else.
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
        """Of every actor that has said where it is, and of what it has started; on its node."""
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
    """The sentence of Ray's many that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    because = next((line for line in lines if line.startswith("The actor ") and " because " in line), lines[0])
    return because.partition(" Some common causes")[0].rstrip(".")
