"""Times of functions that run in alternating rounds, so that a change of the machine's speed affects all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Contenders = Mapping[str, Callable[[], object]]

# Shorter turns would measure the clock's resolution, and the cache contents of the other contenders.
_TURN_SECONDS = 0.005
# All of three rounds are on one side of 1 by chance once in four times, all of four once in eight.
_FEWEST_JUDGED = 4


@dataclass(frozen=True)
class _Sample:
    """One number for each round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.rounds) == 1:
            return self.rounds[0], self.rounds[0]
        lower, _, upper = statistics.quantiles(self.rounds, n=4)
        return lower, upper


class Times(_Sample):
    """Seconds per call in each round."""


class Ratio(_Sample):
    """The speedup of one function over another: the ratio of their times in each round."""

    @classmethod
    def of(cls, before: Times, after: Times) -> Ratio:
        return cls(tuple(one / other for one, other in zip(before.rounds, after.rounds, strict=True)))

    @property
    def is_noise(self) -> bool:
        """Whether 1 lies between the quartiles, or there are too few rounds to tell."""
        lower, upper = self.quartiles
        return len(self.rounds) < _FEWEST_JUDGED or lower <= 1 <= upper

    @property
    def rounds_won(self) -> int:
        return sum(ratio > 1 for ratio in self.rounds)


def take_turns(
    contenders: Contenders, seconds: float, device: torch.device, *, fewest_rounds: int = 5, calls: int | None = None
) -> dict[str, Times]:
    """The times of each contender: all have one turn in each round, and the order rotates.

    Args:
        contenders: functions without arguments.
        seconds: how long to measure each contender.
        device: where they run.
        fewest_rounds: how many rounds are completed in any case.
        calls: the number of calls in a turn; by default, as many as take 5 ms.
    """
    turns = {name: _turn(function, calls, device) for name, function in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    deadline = time.perf_counter() + seconds * len(order)
    while len(times[order[0]]) < fewest_rounds or time.perf_counter() < deadline:
        for name in order:
            times[name].append(turns[name]())
        order.append(order.pop(0))
    return {name: Times(tuple(rounds)) for name, rounds in times.items()}


def seconds_per_call(function: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Wall-clock time of a call, including the work on the device; the mean of several calls."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _synchronize(device)
    return (time.perf_counter() - start) / calls


def _turn(function: Callable[[], object], calls: int | None, device: torch.device) -> Callable[[], float]:
    """A function that measures one turn of a contender, in seconds per call."""
    if calls is None and device.type != "cpu":
        return lambda: _device_turn(function)
    if calls is None:
        # The first call warms up.
        function()
        calls = max(1, round(_TURN_SECONDS / seconds_per_call(function, device)))
    # Not torch.utils.benchmark's timer: it warms up with two calls before each turn, and some calls take 20 s.
    return lambda: seconds_per_call(function, device, calls)


def _device_turn(function: Callable[[], object]) -> float:
    # `do_bench` clears the cache before each call, and measures time on the device.
    from triton.testing import do_bench

    return do_bench(function, warmup=5, rep=20, return_mode="median") / 1e3


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize(device)
