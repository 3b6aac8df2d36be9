"""What users send, fixed before the fleet answers: classes, lengths, think times, arrivals.

Traffic depends on the workload and the seed alone, so two fleets, and a simulated and a real run, face the same
requests. Every cause (class, prompt length, output length, think time, arrival gaps) has its own random stream, and
values come from uniforms by inverse CDF: changing one distribution changes no other draw, and a user's k-th request is
the same whatever the number of users.

Prompt and output length of a request are drawn independently of each other, also where both are empirical columns of
one file; a trace keeps them together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, assert_never

import numpy as np
from numpy.typing import NDArray

from sim.spec import (
    ClosedLoop,
    Distribution,
    Empirical,
    Exponential,
    Fixed,
    Lognormal,
    OpenLoop,
    Trace,
    Uniform,
    WorkloadSpec,
)
from sim.streams import stream

MAX_TOKENS = 2**31 - 1  # request records hold token counts as int32
BLOCK_REQUESTS = 4096  # of open-loop and trace traffic
BLOCK_ROUNDS = 16  # of closed-loop traffic; opening a stream costs as much as drawing about a thousand values


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceTable:
    """Recorded requests in order of arrival.

    Attributes:
        arrival_s: shape (n,), seconds since the first request, never decreasing.
        prompt_tokens: shape (n,), >= 1.
        output_tokens: shape (n,), >= 1.
        prefix_id: shape (n,); requests of one number begin with the same tokens, of -1 with what their class shares.
            None: all -1.
        prefix_tokens: shape (n,); how many tokens those of one ``prefix_id`` share. None with ``prefix_id``.
        notes: what the reader left out or did not use, one sentence each.
    """

    arrival_s: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prefix_id: NDArray[np.int64] | None = None
    prefix_tokens: NDArray[np.int64] | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadData:
    """What a workload needs from files (``sim.traces.read_workload_data`` reads it).

    Attributes:
        trace: the trace it replays, if any.
        columns: (file, column) as the workload names them -> values of an empirical distribution, sorted.
        notes: what a reader of results must know about these data, one sentence each.
    """

    trace: TraceTable | None = None
    columns: Mapping[tuple[str, str], NDArray[np.float64]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def column(self, distribution: Empirical) -> NDArray[np.float64]:
        """Return the sorted values of an empirical distribution.

        Raises:
            ValueError: that column was not read.
        """
        values = self.columns.get((distribution.file, distribution.column))
        if values is None:
            raise ValueError(
                f"column {distribution.column!r} of {distribution.file} is not in the workload data; "
                "pass what read_workload_data returns for this workload"
            )
        return values


# ------------------------------------------------------------------------------------------------- distributions


def sample(distribution: Distribution, uniforms: NDArray[np.float64], data: WorkloadData) -> NDArray[np.float64]:
    """Return the values of a distribution at these uniforms in [0, 1), same shape, by inverse CDF, clipped."""
    match distribution:
        case Fixed():
            return np.full(uniforms.shape, distribution.value)
        case Uniform():
            return distribution.min + (distribution.max - distribution.min) * uniforms
        case Exponential():
            return -distribution.mean * np.log1p(-uniforms)
        case Lognormal():
            from scipy.special import ndtri  # slow to import, and only this case needs it

            variance = np.log1p(distribution.cv**2)
            normal = ndtri(uniforms)
            values = distribution.mean * np.exp(np.sqrt(variance) * normal - variance / 2)
            return np.asarray(np.clip(values, distribution.min, distribution.max), dtype=np.float64)
        case Empirical():
            column = data.column(distribution)
            values = column[(uniforms * len(column)).astype(np.int64)]
            return values if distribution.max is None else np.minimum(values, distribution.max)
        case _:
            assert_never(distribution)


def sample_tokens(distribution: Distribution, uniforms: NDArray[np.float64], data: WorkloadData) -> NDArray[np.int64]:
    """Return token counts of a distribution at these uniforms: ``sample`` rounded, at least 1.

    Uniform means every whole number from ``min`` to ``max`` is equally likely, both included.
    """
    if isinstance(distribution, Uniform):
        first, last = round(distribution.min), round(distribution.max)
        values = first + np.floor((last - first + 1) * uniforms)
    else:
        values = np.rint(sample(distribution, uniforms, data))
    tokens: NDArray[np.int64] = np.clip(values, 1, MAX_TOKENS).astype(np.int64)
    return tokens


def mean_of(distribution: Distribution, data: WorkloadData) -> float:
    """Return the mean of a distribution before clipping to its bounds and before rounding to tokens."""
    match distribution:
        case Fixed():
            return distribution.value
        case Uniform():
            return (distribution.min + distribution.max) / 2
        case Exponential() | Lognormal():
            return distribution.mean
        case Empirical():
            return float(data.column(distribution).mean())
        case _:
            assert_never(distribution)


# ------------------------------------------------------------------------------------------------------- classes


class _Mix:
    """The classes of a workload as arrays: draws classes by share, and lengths by class."""

    def __init__(self, workload: WorkloadSpec, data: WorkloadData):
        classes = workload.classes.values()
        shares = np.array([spec.share for spec in classes])
        # Without the last bound, which rounding may leave below 1: what is above the others is the last class.
        self._bounds = np.cumsum(shares / shares.sum())[:-1]
        self._prompt_tokens = [spec.prompt_tokens for spec in classes]
        self._output_tokens = [spec.output_tokens for spec in classes]
        self._data = data

    def classes(self, uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        return np.asarray(np.searchsorted(self._bounds, uniforms, side="right"), dtype=np.int64)

    def prompt_tokens(self, class_index: NDArray[np.int64], uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        return self._by_class(self._prompt_tokens, class_index, uniforms)

    def output_tokens(self, class_index: NDArray[np.int64], uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
        return self._by_class(self._output_tokens, class_index, uniforms)

    def _by_class(
        self, distributions: Sequence[Distribution], class_index: NDArray[np.int64], uniforms: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        tokens = np.empty(uniforms.shape, np.int64)
        for index, distribution in enumerate(distributions):
            of_class = class_index == index
            tokens[of_class] = sample_tokens(distribution, uniforms[of_class], self._data)
        return tokens


# --------------------------------------------------------------------------------------------------- closed loop


class TrafficRound(NamedTuple):
    """The k-th request of every user; arrays of shape (users,).

    Attributes:
        class_index: into the workload's classes.
        prompt_tokens: >= 1.
        output_tokens: >= 1.
        think_s: seconds between the answer before and this request; in round 0 the time the user starts.
    """

    class_index: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    think_s: NDArray[np.float64]


class ClosedLoopTraffic:
    """Users who each wait for the answer, think, and send the next prompt."""

    def __init__(self, workload: WorkloadSpec, users: int, seed: int, data: WorkloadData):
        """Prepare the traffic of ``users`` users.

        Raises:
            TypeError: the workload is not a closed loop.
        """
        if not isinstance(workload.load, ClosedLoop):
            raise TypeError(f"ClosedLoopTraffic needs a closed_loop workload, got {workload.load.kind}")
        self._mix = _Mix(workload, data)
        self._load = workload.load
        self._users = users
        self._seed = seed
        self._data = data
        self._block_index = -1
        self._block: list[TrafficRound] = []

    def round(self, k: int) -> TrafficRound:
        """Return the ``k``-th request (from 0) of every user. Rounds are drawn in blocks: cheapest in order."""
        block_index, offset = divmod(k, BLOCK_ROUNDS)
        if block_index != self._block_index:
            self._block = self._draw_block(block_index)
            self._block_index = block_index
        return self._block[offset]

    def _draw_block(self, block_index: int) -> list[TrafficRound]:
        mix = self._mix
        class_index = mix.classes(self._uniforms("class", block_index))
        prompt_tokens = mix.prompt_tokens(class_index, self._uniforms("prompt_tokens", block_index))
        output_tokens = mix.output_tokens(class_index, self._uniforms("output_tokens", block_index))
        think_s = sample(self._load.think_time_s, self._uniforms("think_time", block_index), self._data)
        if block_index == 0:
            think_s[0] = self._load.ramp_up_s * np.arange(self._users) / self._users
        return [
            TrafficRound(*columns) for columns in zip(class_index, prompt_tokens, output_tokens, think_s, strict=True)
        ]

    def _uniforms(self, cause: str, block_index: int) -> NDArray[np.float64]:
        """Uniforms of shape (rounds, users). Drawn user by user: more users append draws and move none."""
        drawn = stream(self._seed, cause, block_index).random((self._users, BLOCK_ROUNDS))
        return np.ascontiguousarray(drawn.T)


# --------------------------------------------------------------------------------------------- open loop and trace


class TrafficBlock(NamedTuple):
    """Successive arrivals; arrays of equal length.

    Attributes:
        arrival_s: seconds since the run began, never decreasing, also from block to block.
        class_index: into the workload's classes.
        prompt_tokens: >= 1.
        output_tokens: >= 1.
        prefix_id, prefix_tokens: see ``TraceTable``; -1 and 0 in an open loop.
    """

    arrival_s: NDArray[np.float64]
    class_index: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    prefix_id: NDArray[np.int64]
    prefix_tokens: NDArray[np.int64]


class OpenTraffic:
    """Arrivals that ignore completions: a renewal process with gamma gaps of mean ``1 / rate_rps``.

    ``burstiness`` is the shape of the gamma, as in vLLM's load generator: 1 is a Poisson process, the squared
    coefficient of variation of the gaps is ``1 / burstiness``. Unlike there, arrivals are not rescaled to hit a total,
    which would make the process another one. The rate only scales the gaps: a sweep over rates compares one sample.
    """

    def __init__(self, workload: WorkloadSpec, rate_rps: float, seed: int, data: WorkloadData):
        """Prepare arrivals at this rate.

        Raises:
            TypeError: the workload is not an open loop.
        """
        if not isinstance(workload.load, OpenLoop):
            raise TypeError(f"OpenTraffic needs an open_loop workload, got {workload.load.kind}")
        self._mix = _Mix(workload, data)
        self._shape = workload.load.burstiness
        self._rate_rps = rate_rps
        self._seed = seed

    def blocks(self) -> Iterator[TrafficBlock]:
        """Yield arrivals from the start, without end, ``BLOCK_REQUESTS`` at a time."""
        last_s = 0.0
        index = 0
        while True:
            gaps = stream(self._seed, "arrival_gaps", index).standard_gamma(self._shape, BLOCK_REQUESTS)
            arrival_s = last_s + np.cumsum(gaps / (self._shape * self._rate_rps))
            class_index = self._mix.classes(stream(self._seed, "class", index).random(BLOCK_REQUESTS))
            prompt_uniforms = stream(self._seed, "prompt_tokens", index).random(BLOCK_REQUESTS)
            output_uniforms = stream(self._seed, "output_tokens", index).random(BLOCK_REQUESTS)
            yield TrafficBlock(
                arrival_s,
                class_index,
                self._mix.prompt_tokens(class_index, prompt_uniforms),
                self._mix.output_tokens(class_index, output_uniforms),
                np.full(BLOCK_REQUESTS, -1),
                np.zeros(BLOCK_REQUESTS, np.int64),
            )
            last_s = float(arrival_s[-1])
            index += 1


class TraceTraffic:
    """A recorded trace, replayed from time 0 with its times scaled; classes are drawn by share."""

    def __init__(self, workload: WorkloadSpec, data: WorkloadData, seed: int):
        """Prepare the replay.

        Raises:
            TypeError: the workload does not replay a trace.
            ValueError: the trace was not read.
        """
        if not isinstance(workload.load, Trace):
            raise TypeError(f"TraceTraffic needs a trace workload, got {workload.load.kind}")
        if data.trace is None:
            raise ValueError(f"trace {workload.load.file} was not read; pass what read_workload_data returns")
        self._mix = _Mix(workload, data)
        self._time_scale = workload.load.time_scale
        self._trace = data.trace
        self._seed = seed

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self._trace.arrival_s)

    def blocks(self) -> Iterator[TrafficBlock]:
        """Yield the requests from the start, at most ``BLOCK_REQUESTS`` at a time."""
        trace = self._trace
        none = np.full(len(self), -1), np.zeros(len(self), np.int64)
        prefix_id = none[0] if trace.prefix_id is None else trace.prefix_id
        prefix_tokens = none[1] if trace.prefix_tokens is None else trace.prefix_tokens
        for index, start in enumerate(range(0, len(self), BLOCK_REQUESTS)):
            part = slice(start, start + BLOCK_REQUESTS)
            arrival_s = trace.arrival_s[part] * self._time_scale
            class_index = self._mix.classes(stream(self._seed, "class", index).random(len(arrival_s)))
            yield TrafficBlock(
                arrival_s,
                class_index,
                trace.prompt_tokens[part],
                trace.output_tokens[part],
                prefix_id[part],
                prefix_tokens[part],
            )
