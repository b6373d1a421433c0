# SPDX-License-Identifier: Apache-2.0
"""The last few Gaussian lattices: those depend on the size of the picture, not on what it shows."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import torch
from torch import Tensor

MAX_ENTRIES = 16
MAX_BYTES = 128 << 20


class LatticeCache:
    """Least recently used lattices, limited in number and in bytes. Safe to use from threads.

    Args:
        max_entries: Number of lattices kept at most.
        max_bytes: Their size in bytes at most, all together; a larger lattice is not kept.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._lattices: OrderedDict[Hashable, Tensor] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        # A fork may happen while another thread holds the lock; nobody would release it there.
        os.register_at_fork(after_in_child=self._renew_lock)

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds now."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._lattices)

    def get(self, key: Hashable, build: Callable[[], Tensor]) -> Tensor:
        """The lattice of ``key``, built where it is not there. Nobody may write to it.

        Two threads that miss at once both build: the lattices are equal, one of them stays.
        """
        with self._lock:
            lattice = self._lattices.get(key)
            if lattice is not None:
                self._lattices.move_to_end(key)
                return lattice
        # A lattice made in inference mode could not be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            lattice = build()
        if is_plain(lattice):  # not where a mode turned it into something that stands for it
            self._put(key, lattice)
        return lattice

    def clear(self) -> None:
        """Drop all lattices."""
        with self._lock:
            self._lattices.clear()
            self._bytes = 0

    def _put(self, key: Hashable, lattice: Tensor) -> None:
        if lattice.nbytes > self._max_bytes:
            return
        with self._lock:
            known = self._lattices.pop(key, None)
            self._bytes += lattice.nbytes - (0 if known is None else known.nbytes)
            self._lattices[key] = lattice
            while self._bytes > self._max_bytes or len(self._lattices) > self._max_entries:
                _, oldest = self._lattices.popitem(last=False)
                self._bytes -= oldest.nbytes

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()


LATTICES = LatticeCache(MAX_ENTRIES, MAX_BYTES)


def clear_lattice_cache() -> None:
    """Free the Gaussian lattices that ``dense_crf`` keeps.

    A Gaussian kernel depends on the size of the picture alone, so its lattice is kept for the next
    picture of that size: up to 16 lattices and 128 MiB for the whole process (a lattice takes about
    25 bytes per pixel), the least recently used is dropped first. Results do not depend on it: the
    lattice that would be built is the same, bit for bit. Under ``torch.compile`` and
    ``torch.export`` nothing is kept. Every stream of a GPU has lattices of its own; a CUDA graph
    needs those it was captured with, so nothing may drop them while it is used.
    """
    LATTICES.clear()


def is_plain(x: Tensor) -> bool:
    """Whether a tensor holds numbers: no subclass, no fake, no functional wrapper."""
    ordinary = type(x) in (Tensor, torch.nn.Parameter) and not x.is_meta
    return ordinary and not torch._is_functional_tensor(x)


def is_eager(x: Tensor) -> bool:
    """Whether a call on this tensor computes now, rather than being traced."""
    return not torch.compiler.is_compiling() and is_plain(x)
