"""Waits until the Ray cluster has its nodes: `python wait_for_nodes.py 4`.

verl itself would wait for missing GPUs for ever. If nodes are missing when the time is up, the exit code is 1, and the
nodes that are present are printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def wait(
    nodes: int,
    look: Callable[[], Sequence[dict[str, Any]]],
    *,
    seconds: float,
    pause: float = 5.0,
) -> list[str]:
    """Wait until there are `nodes` living nodes with GPUs or the time is up; returns the addresses of the nodes.

    Args:
        nodes: number of nodes to wait for.
        look: a function like `ray.nodes`; a ConnectionError means that there is no cluster yet.
        seconds: longest time to wait.
        pause: seconds between two checks.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            there = [node["NodeManagerAddress"] for node in look() if node["Alive"] and node["Resources"].get("GPU", 0)]
        except ConnectionError:
            there = []
        if len(there) >= nodes or time.monotonic() >= end:
            return there
        time.sleep(pause)


def ray_nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster that RAY_ADDRESS names, or else of the cluster that this machine belongs to."""
    import ray

    if not ray.is_initialized():
        # Without an address Ray would start a new cluster.
        ray.init(address=os.environ.get("RAY_ADDRESS", "auto"), log_to_driver=False)
    return ray.nodes()


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 if all nodes are present."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nodes", type=int, help="machines with GPUs")
    parser.add_argument("--seconds", type=float, default=600, help="to wait at most")
    args = parser.parse_args(argv)
    there = wait(args.nodes, ray_nodes, seconds=args.seconds)
    print(
        f"wait_for_nodes: {len(there)} of {args.nodes} nodes with GPUs: {', '.join(there) or 'none'}", file=sys.stderr
    )
    return 0 if len(there) >= args.nodes else 1


if __name__ == "__main__":
    sys.exit(main())
