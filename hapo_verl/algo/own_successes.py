"""What the policy itself has solved before: of each prompt one verified success, its exact tokens and its step.

    kept of a prompt = the shortest success of the latest step in which the prompt succeeded

It is the demonstration of a later group of that prompt which fails, so that no teacher is needed
(`hapo.demonstrations.source=own`). It is ours; THEORY.md says what kind of bias it is.

Memory is bounded in bytes: where a success does not fit, those that were written longest ago are forgotten. A token
takes as many bits as the largest id of its response needs, 18 with a vocabulary of 151,936.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hapo_verl.algo.demonstration import Response

MIB = 2**20
# Step, tokens, turns, answers, bits a token, whether some of them are not the policy's own.
_HEADER = struct.Struct("<qIHHB?")
# Bytes that Python takes for a prompt beside the packed success: key, object, two tables.
PER_PROMPT = 384


class OwnSuccess(NamedTuple):
    """A success of the policy, and the training step of its group."""

    response: Response
    step: int


def packed(success: OwnSuccess) -> bytes:
    """The success as bytes; `unpacked` gives it back.

    Args:
        success: with at least one token, all ids below 2³².
    """
    response = success.response
    bits, masked = max(1, max(response.tokens).bit_length()), not all(response.mask)
    header = _HEADER.pack(success.step, len(response.tokens), response.turns, response.answers, bits, masked)
    wide_TW = np.unpackbits(np.array(response.tokens, dtype=">u4").view(np.uint8).reshape(-1, 4), axis=1)
    tokens = np.packbits(wide_TW[:, 32 - bits :]).tobytes()
    return header + tokens + (np.packbits(response.mask).tobytes() if masked else b"")


def unpacked(data: bytes) -> OwnSuccess:
    """The success that `packed` has written.

    Raises:
        ValueError: where these bytes are none.
    """
    step, count, turns, answers, bits, masked = _header(data)
    of_tokens = -(-count * bits // 8)
    body = np.frombuffer(data, dtype=np.uint8, offset=_HEADER.size)
    wide_TW = np.zeros((count, 32), dtype=np.uint8)
    wide_TW[:, 32 - bits :] = np.unpackbits(body[:of_tokens], count=count * bits).reshape(count, bits)
    tokens = np.packbits(wide_TW, axis=1).view(">u4").ravel().tolist()
    mask = np.unpackbits(body[of_tokens:], count=count).tolist() if masked else [1] * count
    return OwnSuccess(Response(tokens, mask, turns, answers), step)


class OwnSuccesses:
    """The successes of many prompts, the ones written longest ago first."""

    def __init__(self, limit: float, *, max_age: int | None = None) -> None:
        """Nothing yet.

        Args:
            limit: bytes that all of them may take.
            max_age: steps after which a success is forgotten; None: never.
        """
        self._limit, self._max_age = limit, max_age
        self._packed: OrderedDict[int, bytes] = OrderedDict()
        self.nbytes = 0
        # Successes that had to make room for others.
        self.evicted = 0

    def __len__(self) -> int:
        """Prompts of which a success is kept."""
        return len(self._packed)

    def recall(self, key: int, step: int) -> bytes:
        """The prompt's success, packed; nothing where there is none, or it is too old.

        Args:
            key: `prompt_key` of the prompt.
            step: in which it would be injected.
        """
        data = self._packed.get(key, b"")
        return b"" if data and self._is_old(data, step) else data

    def observe(self, successes: Iterable[tuple[int, Response]], step: int) -> None:
        """Keep a step's successes, in whatever order they come, and forget what is too old.

        Args:
            successes: (`prompt_key`, response); a prompt may occur several times.
            step: of their groups, not less than that of an earlier call.
        """
        while self._packed and self._is_old(next(iter(self._packed.values())), step + 1):
            self._forget_first()
        for key, response in sorted(successes, key=lambda of: (of[0], len(of[1].tokens), of[1].tokens)):
            self._keep(key, OwnSuccess(response, step))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a checkpoint holds: keys, sizes and the packed successes one behind the other."""
        every = list(self._packed.values())
        return {
            "keys": np.fromiter(self._packed, dtype=np.uint64, count=len(every)),
            "sizes": np.fromiter(map(len, every), dtype=np.int64, count=len(every)),
            "packed": np.frombuffer(b"".join(every), dtype=np.uint8),
            "evicted": np.array(self.evicted),
        }

    def restore(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Continue from `arrays`; with a lower limit the oldest are forgotten.

        Raises:
            ValueError: where they do not hold successes.
        """
        keys, ends, data = arrays["keys"].tolist(), np.cumsum(arrays["sizes"]), arrays["packed"].tobytes()
        if len(keys) != len(ends) or len(set(keys)) != len(keys) or len(data) != (ends[-1] if len(ends) else 0):
            raise ValueError("keys, sizes and successes do not fit together")
        parts = [data[end - size : end] for end, size in zip(ends, arrays["sizes"], strict=True)]
        for part in parts:
            _header(part)
        self._packed, self.nbytes, self.evicted = OrderedDict(), 0, int(arrays["evicted"])
        for key, part in zip(keys, parts, strict=True):
            self._put(key, part)

    def _keep(self, key: int, success: OwnSuccess) -> None:
        before = self._packed.get(key)
        if before is not None and _step(before) == success.step and _length(before) <= len(success.response.tokens):
            return
        self._put(key, packed(success))

    def _put(self, key: int, data: bytes) -> None:
        before = self._packed.pop(key, None)
        if before is not None:
            self.nbytes -= len(before) + PER_PROMPT
        if len(data) + PER_PROMPT > self._limit:
            return
        self._packed[key] = data
        self.nbytes += len(data) + PER_PROMPT
        while self.nbytes > self._limit:
            self._forget_first()
            self.evicted += 1

    def _forget_first(self) -> None:
        _, data = self._packed.popitem(last=False)
        self.nbytes -= len(data) + PER_PROMPT

    def _is_old(self, data: bytes, step: int) -> bool:
        return self._max_age is not None and step - _step(data) > self._max_age


def _header(data: bytes) -> tuple[int, int, int, int, int, bool]:
    if len(data) < _HEADER.size:
        raise ValueError("too short for a success")
    header = _, count, _, _, bits, masked = _HEADER.unpack_from(data)
    of_mask = -(-count // 8) if masked else 0
    if not count or not 1 <= bits <= 32 or len(data) != _HEADER.size - (-count * bits // 8) + of_mask:
        raise ValueError("not the length of its success")
    return header


def _step(data: bytes) -> int:
    return _HEADER.unpack_from(data)[0]


def _length(data: bytes) -> int:
    return _HEADER.unpack_from(data)[1]
