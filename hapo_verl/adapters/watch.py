"""What a run cannot go on without: where one of them dies, the run ends with a line that names it.

verl's trainer waits without a limit: for rollouts that a dead agent loop worker will never write, for a dead vLLM
engine to take new weights. So a thread beside it looks at them. An actor is asked whether it is there by a call that
waits in its queue and fails when it dies, however busy it is; an engine, which lives in a process of its own behind
the actor, by its HTTP server's `/health`. A slow answer is no death.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection, HTTPException
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError

SERVICE_UNAVAILABLE = 503  # vLLM's answer when its engine is dead
# A server that refuses connections has lost its process. Ray knows more of that: at once, or, where the whole node is
# gone, in some 20 s, and then also that it was the node. So its word is waited for.
REFUSED_SECONDS = 30.0
# What dies with another needs a moment to be seen, and a line to reach the driver.
MOMENT_SECONDS = 2.0
# A trainer that fails may have seen a death before Ray tells of it.
FAILED_SECONDS = 10.0


def _end() -> None:
    """End this process, whose main thread may wait in C++, where no exception reaches it."""
    threading.Event().wait(MOMENT_SECONDS)
    os._exit(1)


class Watch:
    """A thread that looks every few seconds between `start` and `stop`."""

    def __init__(self, *, interval: float, advice: str, end: Callable[[], None] = _end) -> None:
        """A watch over nothing yet.

        Args:
            interval: seconds between two looks.
            advice: what to do after a death, the last sentence of the line.
            end: called behind the line.
        """
        self._interval, self._advice, self._end = interval, advice, end
        self._actors: dict[str, Any] = {}
        self._engines: dict[str, str] = {}
        self._calls: dict[str, ray.ObjectRef] = {}
        self._refused: dict[str, float] = {}  # since when, by the monotonic clock
        self._nodes: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="hapo-watch", daemon=True)

    def over(self, actors: Mapping[str, Any], engines: Mapping[str, str] | None = None) -> None:
        """Watch these as well.

        Args:
            actors: Ray actor handles by the name that a line would give them.
            engines: `host:port` of vLLM's HTTP servers, likewise.
        """
        self._nodes |= {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
        # Whole mappings are exchanged: the thread may be in the middle of a look.
        self._actors = self._actors | dict(actors)
        self._engines = self._engines | dict(engines or {})

    def start(self) -> None:
        """Look from now on."""
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

    def _actor(self, name: str, actor: Any) -> str | None:
        if name not in self._calls:
            self._calls[name] = actor.__ray_ready__.remote()
        if not ray.wait([self._calls[name]], timeout=0)[0]:
            return None
        try:
            ray.get(self._calls.pop(name))
        except ActorUnavailableError:
            return None
        except RayActorError as error:
            return _cause(error)
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
            if self.dead() and not self._stop.is_set() and self._say_what_died():
                self._end()
                return

    def _say_what_died(self) -> bool:
        """The line to stderr, which Ray forwards to the driver; whether there was one to say."""
        found = self.dead()
        threading.Event().wait(MOMENT_SECONDS)
        found |= self.dead()
        if found:
            print(f"hapo: {self._line(found)}", file=sys.stderr, flush=True)
        return bool(found)

    def _line(self, found: Mapping[str, str]) -> str:
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        nodes = [f"Ray node {address}" for key, address in self._nodes.items() if key not in alive]
        causes = dict.fromkeys(found.values())
        return f"{', '.join([*nodes, *found])} died ({'; '.join(causes)}). {self._advice}"


def _cause(error: RayActorError) -> str:
    """The sentence of Ray's many that says why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    because = next((line for line in lines if line.startswith("The actor ") and " because " in line), lines[0])
    return because.partition(" Some common causes")[0].rstrip(".")
