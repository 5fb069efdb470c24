"""Short versions of `make test-soak`: what stays behind after each call, step or cycle would show in these as well."""

from __future__ import annotations

import mmap

import pytest

from tools import soak

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("make, count", [(soak.calls, 5_000), (soak.training_steps, 150), (soak.cycles, 300)])
def test_nothing_stays_behind(make, count):
    growth = soak.grown(count, make())
    assert growth.classes == 0
    # One object in each call, step or cycle would be 0.9 times as many.
    assert growth.objects < min(soak.ALLOWED_OBJECTS, count // 2)


def test_what_stays_behind_is_noticed():
    kept = []
    assert soak.why_too_much(soak.grown(200, lambda at: kept.append([at]))).endswith("objects stayed; 100 are allowed")
    assert soak.why_too_much(soak.grown(200, lambda at: kept.append(type("New", (), {})))).endswith("classes stayed")
    assert "memory grew" in soak.why_too_much(soak.grown(50, lambda at: kept.append(new_pages(2**20))))


def new_pages(size):
    """Memory that the process did not have before; an allocator may hand out what it has."""
    memory = mmap.mmap(-1, size)
    memory.write(b"x" * size)
    return memory
