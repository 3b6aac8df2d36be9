"""What a fit of iteration times is made from: iterations of one kind, gathered from the records of an engine's log.

An observation is a stretch of like decode-only iterations, as the mean of their times, or one iteration with prefill.
The time from log line to log line also has the moments at which the front end got to write them, so its noise has two
parts: a share of the time itself, and jitter that a stretch averages out.

An asynchronous engine works on the host for the next batch while the device computes this one, so its log shows each
batch with the host's work on the next (``calibrate.fit.host_fit``).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sim.service_curve import IterationWork

SHARE_NOISE = 0.02
"""Standard deviation of an observation, as a share of its time."""
WAITED_S, WAITED_SHARE = 3e-4, 0.02
"""From how long a wait on, and what share of its time, a batch was waited for: the host is not what took so long."""
MORE_WORK = 1.2
"""By how much more of the host's work on the next batch it hides what it took for one."""
UNSURE = 0.1
"""Share of a device's time that may be unknown."""
LONGEST_STRETCH = 16
SHORTEST_STRETCH = 3
FEWEST_OBSERVATIONS = 8

Floats = NDArray[np.float64]


class TooFewRecordsError(ValueError):
    """There is not enough to fit; the message says how much there is and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """What a fit is made from; all arrays have one entry an observation.

    Attributes:
        works: shape (observations, 6), means of the fields of ``IterationWork``.
        measured_s: mean cycle.
        iterations: how many cycles it is the mean of.
        points: name of what was measured, repeats alike.
        jitter_s: standard deviation of one log line's delay.
        host_s: mean work of the host, of an asynchronous engine; else None.
        waited_s: likewise, the mean wait for the device.
    """

    works: Floats
    measured_s: Floats
    iterations: Floats
    points: NDArray[np.object_]
    jitter_s: float
    host_s: Floats | None = None
    waited_s: Floats | None = None

    def select(self, keep: NDArray[np.bool_] | NDArray[np.int64]) -> "Observations":
        """Return some of them, by mask or index."""
        return Observations(
            works=self.works[keep],
            measured_s=self.measured_s[keep],
            iterations=self.iterations[keep],
            points=self.points[keep],
            jitter_s=self.jitter_s,
            host_s=None if self.host_s is None else self.host_s[keep],
            waited_s=None if self.waited_s is None else self.waited_s[keep],
        )

    @property
    def waited_for(self) -> NDArray[np.bool_]:
        """Which of them the device took longest for; all of a synchronous engine's."""
        if self.waited_s is None:
            return np.ones(len(self.measured_s), dtype=np.bool_)
        return np.asarray(self.waited_s > np.maximum(WAITED_S, WAITED_SHARE * self.measured_s))


def observations(records: pd.DataFrame, *, asynchronous: bool = False) -> Observations:
    """Gather observations from records (``iteration_records.ITERATION_COLUMNS``) in the order of their logging.

    Records that are not matched, and cycles that an idle engine interrupted, are left out. Point names end in
    ``#NUMBER`` where one was measured several times.

    Args:
        records: of one engine.
        asynchronous: it decides a batch while the one before runs.

    Raises:
        TooFewRecordsError: fewer than FEWEST_OBSERVATIONS are left.
    """
    rows: list[tuple[Floats, float, float, float, int, str]] = []
    overheads = []
    works = records[[*IterationWork._fields]].to_numpy(dtype=np.float64)
    names = records["point"].to_numpy()
    elapsed_s = records["elapsed_s"].to_numpy()
    took_s, host_s = _took_s(records, names, asynchronous=asynchronous)
    usable = records["matched"].to_numpy() & (took_s > 0)
    for first, last in _stretches(names, works, usable):
        length = last - first
        if works[first, 0] == 0 and length < SHORTEST_STRETCH:
            continue
        name = str(names[first]).partition("#")[0]
        took, host, waited = (float(each[first:last].mean()) for each in (took_s, host_s, elapsed_s))
        rows.append((works[first:last].mean(axis=0), took, host, waited, length, name))
        if length > SHORTEST_STRETCH:
            overheads.append(np.std(took_s[first:last] - elapsed_s[first:last], ddof=1))
    if len(rows) < FEWEST_OBSERVATIONS:
        raise TooFewRecordsError(
            f"{len(records)} iteration records give {len(rows)} observations, a fit needs {FEWEST_OBSERVATIONS}; "
            "measure for longer"
        )
    return Observations(
        works=np.array([row[0] for row in rows]),
        measured_s=np.array([row[1] for row in rows]),
        iterations=np.array([float(row[4]) for row in rows]),
        points=np.array([row[5] for row in rows], dtype=np.object_),
        # A cycle ends and begins with a delayed line.
        jitter_s=float(np.median(overheads)) / 2**0.5 if overheads else 0.0,
        host_s=np.array([row[2] for row in rows]) if asynchronous else None,
        waited_s=np.array([row[3] for row in rows]) if asynchronous else None,
    )


def _took_s(records: pd.DataFrame, names: NDArray[np.object_], *, asynchronous: bool) -> tuple[Floats, Floats]:
    """Return what each iteration took and what of it was the host's work; NaN where that is not known.

    Asynchronous: the cycle of batch ``n`` is the host's work on batch ``n + 1`` and the wait for ``n``.
    """
    cycle_s, elapsed_s = records["cycle_s"].to_numpy(), records["elapsed_s"].to_numpy()
    next_s = cycle_s - elapsed_s
    if not asynchronous:
        return cycle_s, next_s
    unknown = np.isnan(cycle_s)  # launched into an idle device
    unknown[1:] |= names[1:] != names[:-1]
    host_s = np.where(unknown, np.nan, np.concatenate([[np.nan], next_s[:-1]]))
    waited = elapsed_s > np.maximum(WAITED_S, WAITED_SHARE * cycle_s)
    before_waited = np.concatenate([[False], waited[:-1]])
    # Waited for after another that was: the device went from one to the other. After one that was not, it began at some
    # moment of the launch.
    began_s = np.where(before_waited, 0.0, host_s)
    device_s = cycle_s + began_s / 2
    device_s[began_s / 2 > UNSURE * device_s] = np.nan
    # Not waited for: the host took longer, if not for the next batch.
    of_host_s = np.where(next_s > MORE_WORK * host_s, np.nan, host_s + elapsed_s)
    took_s = np.where(waited, device_s, of_host_s)
    return np.where(unknown, np.nan, took_s), host_s


def _stretches(names: NDArray[np.object_], works: Floats, usable: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Yield the first and one past the last record of each observation."""
    first = 0
    for place in range(len(names) + 1):
        goes_on = (
            place < len(names)
            and place > first
            and place - first < LONGEST_STRETCH
            and usable[place]
            and names[place] == names[first]
            and works[place, 0] == 0 == works[first, 0]
            and works[place, 4] == works[first, 4]
        )
        if goes_on:
            continue
        if place > first and usable[first]:
            yield first, place
        first = place


def noise_s(seen: Observations, expected_s: Floats) -> Floats:
    """Return the standard deviation of each observation when its time is ``expected_s``."""
    jitter_s = seen.jitter_s * 2**0.5 / seen.iterations
    return np.asarray(np.hypot(SHARE_NOISE * expected_s, jitter_s))
