"""The Beta posterior of each prompt's success rate, learned from the prompt's earlier visits.

    prior of a visit    a = κ μ + ρ A,    b = κ (1 − μ) + ρ B
    after the visit     A ← ρ A + S,      B ← ρ B + (N − S)

A and B are the prompt's own discounted counts of on-policy successes and failures. A run visits a prompt only once or
twice, so most of the prior is pooled over the prompt's data source: κ pseudo-rollouts at the source's running success
rate μ (empirical Bayes). The gates `posterior` and `thompson` use it. It is ours; the gate of arXiv 2603.11321v1 uses
the current group only.

The state is a few arrays with one entry per prompt of the data set (33 MB for a million prompts). It is updated in
place and does not depend on the order of the groups within a step.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def prompt_key(*parts: Any) -> int:
    """A 64-bit id of a prompt, the same in every process and on every machine.

    Args:
        parts: the values that identify the prompt, such as its data source and index.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class PromptPosterior:
    """Beta posteriors of a data set's prompts."""

    def __init__(self, keys: Sequence[int] | NDArray[np.uint64], sources: Sequence[str]) -> None:
        """Start with the prompts of a data set and no visits.

        Args:
            keys: `prompt_key` of each row of the data set; rows with one key share a posterior.
            sources: data source of each row.
        """
        key_R = np.asarray(keys, dtype=np.uint64)
        names = sorted(set(sources))
        number = {name: i for i, name in enumerate(names)}
        source_R = np.fromiter((number[source] for source in sources), dtype=np.int32, count=len(key_R))
        self.key_K, first_K = np.unique(key_R, return_index=True)
        self.source_K: NDArray[np.int32] = source_R[first_K]
        self.source_names = names
        self.success_K = np.zeros(len(self.key_K), dtype=np.float64)
        self.failure_K = np.zeros(len(self.key_K), dtype=np.float64)
        # Running counts of each source; `priors` adds one success and one failure to them.
        self.source_success_D = np.zeros(len(names), dtype=np.float64)
        self.source_rollouts_D = np.zeros(len(names), dtype=np.float64)

    def slots(self, keys: Sequence[int]) -> NDArray[np.int64]:
        """Positions of prompts in the arrays.

        Raises:
            KeyError: if a key is not in the data set.
        """
        wanted = np.asarray(keys, dtype=np.uint64)
        found = np.minimum(np.searchsorted(self.key_K, wanted), len(self.key_K) - 1)
        if (self.key_K[found] != wanted).any():
            raise KeyError(int(wanted[self.key_K[found] != wanted][0]))
        return found

    def priors(self, keys: Sequence[int], *, strength: float, discount: float) -> tuple[list[float], list[float]]:
        """The prior Beta(a, b) of each prompt's next visit: a list of a > 0 and a list of b > 0.

        Args:
            keys: `prompt_key` of P prompts; a prompt may occur several times.
            strength: κ > 0.
            discount: ρ in [0, 1].

        Raises:
            KeyError: if a key is not in the data set.
        """
        slot_P = self.slots(keys)
        source_P = self.source_K[slot_P]
        rate_P = (1 + self.source_success_D[source_P]) / (2 + self.source_rollouts_D[source_P])
        success_P = strength * rate_P + discount * self.success_K[slot_P]
        failure_P = strength * (1 - rate_P) + discount * self.failure_K[slot_P]
        return success_P.tolist(), failure_P.tolist()

    def observe(
        self,
        keys: Sequence[int],
        successes: Sequence[int],
        rollouts: Sequence[int],
        *,
        discount: float,
        memory: float,
    ) -> None:
        """Add one step's on-policy outcomes; a prompt that occurs twice in the step is discounted once.

        Args:
            keys: `prompt_key` of the step's P prompts.
            successes: S of each.
            rollouts: N of each.
            discount: ρ in [0, 1], the share of a prompt's counts that a visit keeps.
            memory: share of a source's running counts that a step keeps, in [0, 1).

        Raises:
            KeyError: if a key is not in the data set.
        """
        if not len(keys):
            return
        slot_P = self.slots(keys)
        success_P, rollouts_P = np.asarray(successes, dtype=np.float64), np.asarray(rollouts, dtype=np.float64)
        visited = np.unique(slot_P)
        self.success_K[visited] *= discount
        self.failure_K[visited] *= discount
        np.add.at(self.success_K, slot_P, success_P)
        np.add.at(self.failure_K, slot_P, rollouts_P - success_P)

        source_P = self.source_K[slot_P]
        seen = np.unique(source_P)
        for total_D, values_P in ((self.source_success_D, success_P), (self.source_rollouts_D, rollouts_P)):
            total_D[seen] *= memory
            np.add.at(total_D, source_P, values_P)

    def fingerprint(self) -> str:
        """A hash that identifies the data set: its prompts and their sources."""
        digest = hashlib.blake2b(self.key_K.tobytes(), digest_size=16)
        digest.update(self.source_K.tobytes())
        digest.update(repr(self.source_names).encode())
        return digest.hexdigest()

    def arrays(self) -> dict[str, NDArray[Any]]:
        """The arrays for a checkpoint: the data set's fingerprint and the counts of visited prompts."""
        (visited,) = np.nonzero(self.success_K + self.failure_K)
        return {
            "fingerprint": np.array(self.fingerprint()),
            "visited": visited,
            "success": self.success_K[visited],
            "failure": self.failure_K[visited],
            "source_success": self.source_success_D,
            "source_rollouts": self.source_rollouts_D,
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Restore the state that `arrays` returned.

        Raises:
            ValueError: if the state belongs to another data set.
        """
        if str(arrays["fingerprint"]) != self.fingerprint():
            raise ValueError("the state was kept for other prompts")
        self.success_K[:], self.failure_K[:] = 0.0, 0.0
        self.success_K[arrays["visited"]] = arrays["success"]
        self.failure_K[arrays["visited"]] = arrays["failure"]
        self.source_success_D[:] = arrays["source_success"]
        self.source_rollouts_D[:] = arrays["source_rollouts"]
