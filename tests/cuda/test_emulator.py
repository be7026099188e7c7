"""The emulator finds planted bugs, and leaves sound kernels alone."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch

from . import host

BUGS = {
    "global read out of bounds": "global read of 4 bytes out of bounds",
    "global write out of bounds": "global write of 4 bytes out of bounds",
    "write to an input": "global write to an input",
    "global race": "global race: two threads write one byte",
    "misaligned": "misaligned access of 16 bytes",
    "misaligned shared": "misaligned access of 8 bytes",
    "shared out of bounds": "shared access of 4 bytes out of bounds",
    "unwritten": "read of unwritten shared memory",
    "no barrier": "read of unwritten shared memory",
    "warp barrier for a block": "read of unwritten shared memory|shared race",
    "write after read": "shared race: write after access",
    "deadlock": "deadlock: waits for ever at __syncthreads",
    "diverged": "deadlock",
    "copy waited for too late": "before its asynchronous copy was waited for",
    "copy without barrier": "shared race: read after write",
    "copy over a copy": "shared write over a copy on its way",
}


def run(bug: str) -> tuple[str, torch.Tensor, torch.Tensor]:
    lib = host.library("emulation/planted.cpp")
    lib.qk_planted.restype = ctypes.c_char_p
    given = torch.arange(1, 65, dtype=torch.int32)
    out, counter = torch.full((64,), -1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    host.expose(lib, [given], [out, counter])
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (given, out, counter)]
    return lib.qk_planted(bug.encode(), *pointers).decode(), out, given


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_are_found(bug: str) -> None:
    found = run(bug)[0]
    assert re.search(BUGS[bug], found), found


def test_sound_kernels_pass() -> None:
    lanes = torch.arange(64, dtype=torch.int32)
    for name, want in (
        ("warp barrier for a warp: sound", lanes ^ 1),
        ("last block: sound", (lanes ^ 5) + 8),
        ("copy: sound", lanes + 1),
        ("copy of 12: sound", (lanes + 1) * (lanes % 4 != 3)),
    ):
        error, out, _ = run(name)
        assert error == "", f"{name}: {error}"
        assert torch.equal(out, want.to(torch.int32)), name


# ---------------------------------------------------------------------- what only Hopper has
HOPPER_BUGS = {
    "copy: not waited for": "asynchronous copy was waited for|unwritten",
    "copy: waited for by one warp": "shared race: read after write",
    "copy: over what is on its way": "copy on its way|asynchronous copy was waited for",
    "copy: freed by one warp for all": "shared race: write after access",
    "copy: freed without a warp barrier": "shared race: write after access",
    "copy: barrier not initialized": "unwritten|mbarrier that was not initialized",
    "copy: fewer bytes announced": "deadlock: waits for ever at mbarrier",
    "product: not committed": "waits for a product that was not committed",
    "product: its registers change": "registers of a wgmma on its way were changed",
    "product: never waited for": "a product was never waited for",
    "barrier of a warp for a warpgroup": "unwritten|shared race",
}


def run_hopper(bug: str) -> tuple[str, torch.Tensor]:
    lib = host.library("emulation/planted_hopper.cpp")
    lib.qk_planted.restype = ctypes.c_char_p
    given, out = torch.arange(256, dtype=torch.int32), torch.full((256,), -1, dtype=torch.int32)
    host.expose(lib, [given], [out])
    error = lib.qk_planted(bug.encode(), *(ctypes.c_void_p(t.data_ptr()) for t in (given, out)))
    return error.decode(), out


@pytest.mark.parametrize("bug", HOPPER_BUGS)
def test_planted_bugs_of_hopper_are_found(bug: str) -> None:
    found = run_hopper(bug)[0]
    assert re.search(HOPPER_BUGS[bug], found), found


def test_sound_kernels_of_hopper_pass() -> None:
    lanes = torch.arange(128, dtype=torch.int32)
    columns = lanes % 4 * 2 + 1  # of the sum that is shown: row r of b is r % 4, times 16 features
    twice = (lanes + lanes + 128).repeat(2)
    for name, want in (
        ("copy: sound", twice),
        ("copy: beyond the rows: sound", (lanes + 128).repeat(2)),
        ("product: sound", torch.cat([columns % 4 * 16, torch.zeros(128, dtype=torch.int32)])),
        ("barrier of a warpgroup: sound", torch.arange(256, dtype=torch.int32) ^ 64),
    ):
        error, out = run_hopper(name)
        assert error == "", f"{name}: {error}"
        assert torch.equal(out, want), name
