"""Contenders take turns, so that whatever slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time
import timeit
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Contenders = Mapping[str, Callable[[], object]]

# A turn is this long at least: shorter ones would measure the clock, and what the others left in the caches.
_TURN_SECONDS = 0.005
_FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Times:
    """Microseconds for one call, from one turn in each round."""

    turns: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.turns)

    @property
    def quartiles(self) -> tuple[float, float]:
        lower, _, upper = statistics.quantiles(self.turns, n=4)
        return lower, upper


def take_turns(contenders: Contenders, seconds: float, device: torch.device) -> dict[str, Times]:
    """The times of each contender; everyone has a turn in each round, and the order rotates.

    Args:
        contenders: functions without arguments.
        seconds: how long to go on for each contender; five rounds are completed in any case.
    """
    turn = _device_turn if device.type != "cpu" else _cpu_turn
    numbers = {name: _calls_in_a_turn(function) for name, function in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    deadline = time.perf_counter() + seconds * len(order)
    while len(times[order[0]]) < _FEWEST_ROUNDS or time.perf_counter() < deadline:
        for name in order:
            times[name].append(turn(contenders[name], numbers[name]))
        order.append(order.pop(0))
    return {name: Times(tuple(turns)) for name, turns in times.items()}


def compiled(function: Callable) -> Callable:
    """By torch.compile, which forgets what it compiled before: after eight versions of one function it runs eager."""
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def speedup(eager: Times, other: Times) -> float:
    """How many times faster than eager: the median over the rounds, whose turns stood next to each other."""
    return statistics.median(before / after for before, after in zip(eager.turns, other.turns))


def _calls_in_a_turn(function: Callable[[], object]) -> int:
    # The first call warms up.
    function()
    start = time.perf_counter()
    function()
    return max(1, round(_TURN_SECONDS / (time.perf_counter() - start)))


def _cpu_turn(function: Callable[[], object], number: int) -> float:
    # Not torch.utils.benchmark's timer: it runs two calls to warm up before each turn, and some calls take 20 s.
    return timeit.timeit(function, number=number) / number * 1e6


def _device_turn(function: Callable[[], object], number: int) -> float:
    # Clears the cache before each call, and asks the device for the time.
    from triton.testing import do_bench

    return do_bench(function, warmup=5, rep=20, return_mode="median") * 1e3
