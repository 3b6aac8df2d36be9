"""Which points to measure, and which of them next.

A point is a batch of alike requests that decode together, into which further prompts arrive one after another; or one
prompt at a time into an idle engine; or closed-loop users, kept aside as a check. What a point would tell is found by
running it through the simulated scheduler. Near its solution the fit is a linear model, so a point's rows take a known
amount off the variance of every prediction; the point is chosen that takes most off the mean variance of those
predictions that matter, a second of measuring (I-optimality; Atkinson, Donev and Tobias 2007, chapter 10). The model of
a choice is richer than the fit's: it also doubts that time is linear in tokens, or only the corners would be measured.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from calibrate.fit.iteration_fit import TERMS, TermFit, design
from calibrate.fit.iteration_observations import LONGEST_STRETCH, SHARE_NOISE
from sim.engine import Engine, EngineRequest
from sim.fleet import EngineSettings
from sim.service_curve import IterationWork
from sim.spec import ClassSpec, Lognormal, WorkloadSpec
from sim.traffic import WorkloadData, sample_tokens

Floats = NDArray[np.float64]

DECODE_STEPS = 24
"""Iterations that a batch only decodes, besides those into which prompts arrive."""
IDLE_OUTPUT = 6
IDLE_REPEATS = 3
LATE_PROMPTS = 3
POINT_OVERHEAD_S = 0.4
"""A point's time beyond its iterations: sending, settling, writing."""
POINT_SPREAD = 0.02
"""How much a whole point may be off, however many iterations it has: the machine is not always equally fast."""
KNOTS = (4, 16, 64, 256)
"""Tokens at which a choice doubts that time is linear."""
DOUBT = 0.2
"""By what share of a typical iteration it may bend there."""

_LENGTHS = 64  # values that stand for a workload's lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Something to measure.

    Attributes:
        kind: ``steps``, a batch with late prompts; ``idle``, one request at a time; ``closed``, users.
        requests: in the batch; of one after another; or of all users together.
        prompt_tokens, output_tokens: of each; ``closed``: 0, they are drawn from the workload.
        late: prompts that arrive while the batch decodes, one after another, with two output tokens each.
        late_tokens: of each of them.
        users: of ``closed``.
    """

    kind: Literal["steps", "idle", "closed"]
    requests: int
    prompt_tokens: int = 0
    output_tokens: int = 0
    late: int = 0
    late_tokens: int = 0
    users: int = 0

    @property
    def name(self) -> str:
        """What it is, in a few words; the same for each repeat."""
        if self.kind == "closed":
            return f"closed users={self.users}"
        if self.kind == "idle":
            return f"idle prompt={self.prompt_tokens}"
        late = f" late={self.late_tokens}" if self.late else ""
        return f"steps batch={self.requests} context={self.prompt_tokens}{late}"


REFERENCE = Point(kind="steps", requests=4, prompt_tokens=16, output_tokens=20)
"""Measured again and again, to see the machine drift."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Lengths in tokens that the profile is for, as equally likely values.

    Attributes:
        prompts: shape (n,), in no order.
        outputs: shape (n,), likewise.
    """

    prompts: NDArray[np.int64]
    outputs: NDArray[np.int64]

    @property
    def mean_context(self) -> int:
        """Mean tokens of a decoding request, half of its output made."""
        return round(float(self.prompts.mean() + self.outputs.mean() / 2))

    @property
    def longest_context(self) -> int:
        """Most tokens of a request."""
        return int(self.prompts.max() + self.outputs.max())


def lengths_of(workload: WorkloadSpec | None, data: WorkloadData, max_model_len: int) -> Lengths:
    """Return the lengths of a workload, each class by its share; without one, of a made-up spread workload.

    Requests longer than ``max_model_len`` are cut to it.
    """
    if workload is None:
        mean = max(2, max_model_len // 16)
        anything = Lognormal(mean=mean, cv=1.0, max=float(max_model_len // 2))
        classes = [ClassSpec(prompt_tokens=anything, output_tokens=anything)]
    else:
        classes = list(workload.classes.values())
    total = sum(each.share for each in classes)
    prompts, outputs = [], []
    for each in classes:
        count = max(1, round(_LENGTHS * each.share / total))
        quantiles = (np.arange(count) + 0.5) / count
        prompts.append(sample_tokens(each.prompt_tokens, quantiles, data))
        outputs.append(sample_tokens(each.output_tokens, quantiles[::-1], data))
    prompt = np.clip(np.concatenate(prompts), 1, max_model_len - 2)
    return Lengths(prompts=prompt, outputs=np.clip(np.concatenate(outputs), 1, max_model_len - prompt))


# ----------------------------------------------------------------------------------------------- what points tell


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A point with what it would tell.

    Attributes:
        works: shape (rows, 6), all its iterations, alike ones in a row as one.
        iterations: shape (rows,), how many each is the mean of.
        tells: shape (rows,), which of them have a cycle to observe: not those that follow an idle engine.
    """

    point: Point
    works: Floats
    iterations: Floats
    tells: NDArray[np.bool_]

    def seconds(self, fit: TermFit) -> float:
        """How long measuring it takes."""
        return POINT_OVERHEAD_S + float(fit.predict_s(self.works) @ self.iterations)


def candidate(point: Point, settings: EngineSettings) -> Candidate:
    """Run a point of steps or idle prompts through the simulated scheduler to see what it would tell."""
    engine: Engine[EngineRequest] = Engine(settings)
    batch_size = 1 if point.kind == "idle" else point.requests
    for _ in range(batch_size):
        engine.add(EngineRequest(point.prompt_tokens, point.output_tokens))
    late = [EngineRequest(point.late_tokens, 2) for _ in range(point.late)]
    rows: list[list[float]] = []
    counts: list[int] = []
    while (batch := engine.schedule()) is not None:
        work = engine.work(batch)
        engine.finish_run(1)
        if late and batch.decodes == batch_size and not batch.chunks:
            engine.add(late.pop())
        alike = rows and not work.prefill_chunks and not rows[-1][0] and rows[-1][4] == work.decodes
        if alike and counts[-1] < LONGEST_STRETCH:
            counts[-1] += 1
            rows[-1][5] += (work.decode_kv_tokens - rows[-1][5]) / counts[-1]
        else:
            rows.append([float(value) for value in work])
            counts.append(1)
    times = point.requests if point.kind == "idle" else 1
    return Candidate(
        point=point,
        works=np.array(rows),
        iterations=np.array(counts, dtype=np.float64) * times,
        tells=np.arange(len(rows)) > 0,
    )


def candidates(settings: EngineSettings, lengths: Lengths) -> list[Candidate]:
    """Return every batch worth thinking of, over sizes, contexts and late prompts."""
    most_tokens = settings.num_kv_blocks * settings.block_size
    longest = min(settings.max_model_len - DECODE_STEPS - 2 * LATE_PROMPTS - 2, lengths.longest_context)
    contexts = sorted({min(16, longest), min(lengths.mean_context, longest), longest})
    prompts = sorted({*(n for n in _powers(8, int(lengths.prompts.max()))), int(lengths.prompts.max())})
    steps = DECODE_STEPS + 2 * LATE_PROMPTS
    points = [
        Point(
            kind="steps",
            requests=batch,
            prompt_tokens=context,
            output_tokens=steps if late else DECODE_STEPS,
            late=LATE_PROMPTS if late else 0,
            late_tokens=late,
        )
        for batch in sorted({*_powers(1, settings.max_num_seqs), settings.max_num_seqs})
        for context in contexts
        for late in [0, *prompts]
        if batch + bool(late) <= settings.max_num_seqs
        and batch * _rounded_up(context + steps, settings.block_size) + _rounded_up(late + 2, settings.block_size)
        <= most_tokens
    ]
    return [candidate(point, settings) for point in points]


def idle_points(lengths: Lengths) -> list[Point]:
    """Return single prompts into an idle engine, which tell of the front end: short, usual and long ones."""
    prompts = sorted({int(value) for value in np.quantile(lengths.prompts, [0.0, 0.5, 0.9])})
    return [
        Point(kind="idle", requests=IDLE_REPEATS, prompt_tokens=tokens, output_tokens=IDLE_OUTPUT) for tokens in prompts
    ]


def first_design(settings: EngineSettings, lengths: Lengths) -> list[Point]:
    """Return the few points that are measured before anything is known, the cheap ones first, then the idle ones."""
    middle = max(1, min(int(np.median(lengths.prompts)), settings.max_num_batched_tokens // 2))
    batch = max(1, min(8, settings.max_num_seqs // 2))
    steps = DECODE_STEPS + 2 * LATE_PROMPTS
    points = [
        Point(kind="steps", requests=1, prompt_tokens=16, output_tokens=DECODE_STEPS),
        Point(
            kind="steps", requests=batch, prompt_tokens=16, output_tokens=steps, late=LATE_PROMPTS, late_tokens=middle
        ),
        Point(kind="steps", requests=settings.max_num_seqs, prompt_tokens=16, output_tokens=DECODE_STEPS),
    ]
    # Prompts that fill the token budget, and a batch with much KV: what a busy engine has.
    context = min(lengths.mean_context, settings.max_model_len - DECODE_STEPS)
    filling = max(2, -(-5 * settings.max_num_batched_tokens // (4 * context)))
    most = settings.num_kv_blocks * settings.block_size // _rounded_up(context + DECODE_STEPS, settings.block_size)
    points.append(
        Point(
            kind="steps",
            requests=max(1, min(filling, settings.max_num_seqs, most)),
            prompt_tokens=context,
            output_tokens=DECODE_STEPS,
        )
    )
    points += idle_points(lengths)
    return [point for point in points if point.prompt_tokens + point.output_tokens <= settings.max_model_len]


def closed_points(settings: EngineSettings, lengths: Lengths) -> list[Point]:
    """Return the loads kept aside as a check: few users, and as many as the engine runs at once, or its KV holds."""
    most_tokens = settings.num_kv_blocks * settings.block_size
    most = max(1, min(settings.max_num_seqs, most_tokens // max(1, lengths.longest_context)))
    return [Point(kind="closed", requests=3 * users, users=users) for users in sorted({min(4, most), most})]


def target_works(settings: EngineSettings, lengths: Lengths) -> Floats:
    """Return the iterations whose times matter, shape (n, 6): batches up to the largest, with prompts and without."""
    rows = []
    context = lengths.mean_context
    prompts = np.quantile(lengths.prompts, [0.1, 0.5, 0.9])
    for decodes in [0, *sorted({*_powers(1, settings.max_num_seqs), settings.max_num_seqs})]:
        if decodes:
            rows += [IterationWork(0, 0, 0.0, 0, decodes, decodes * context)] * 2
        for prompt in prompts:
            tokens = int(min(prompt, settings.max_num_batched_tokens - decodes))
            if tokens > 0:
                pairs = tokens * (tokens + 1) / 2
                rows.append(IterationWork(tokens, 1, pairs, tokens, decodes, decodes * context))
    return np.array(rows, dtype=np.float64)


# ------------------------------------------------------------------------------------------------------ the choice


class Choice:
    """What is known so far, as the covariance of a linear model around a fit.

    Attributes:
        fit: that times and terms are taken from.
    """

    def __init__(self, fit: TermFit, target: Floats, jitter_s: float):
        """Know nothing yet but roughly how long things take."""
        self.fit = fit
        self._jitter_s = jitter_s
        self._target = self._relative(target)
        # Before any measurement a term may account for all of the iteration it matters most in, a bend for a part.
        # What matters in none need not be known.
        most = np.abs(self._target).max(axis=0)
        share = np.where(np.arange(len(most)) < len(TERMS), 1.0, DOUBT)
        self._covariance = np.diag(np.where(most > 0, share / np.where(most > 0, most, 1.0), 0.0) ** 2)
        self._times: Counter[str] = Counter()
        self._moments = self._target.T @ self._target / len(self._target)

    @property
    def spread(self) -> float:
        """Root mean variance of the predictions that matter, as a share of their time."""
        return sqrt(float(np.sum(self._moments * self._covariance)))

    def learn(self, measured: Candidate) -> None:
        """Take in what one measured point told."""
        self._covariance = self._after(measured)
        self._times[measured.point.name] += 1

    def best(self, among: Iterable[Candidate], seconds_left: float) -> Candidate | None:
        """Return the candidate that narrows most a second; None when none fits into the time left."""
        best, most = None, 0.0
        before = float(np.sum(self._moments * self._covariance))
        for each in among:
            seconds = each.seconds(self.fit)
            if seconds > seconds_left:
                continue
            after = float(np.sum(self._moments * self._after(each)))
            # What the model lacks at a point stays, however often one looks: another place tells more.
            gain = (before - after) / seconds / (1 + self._times[each.point.name])
            if gain > most:
                best, most = each, gain
        return best

    def _relative(self, works: Floats) -> Floats:
        """Terms and bends of iterations, over their predicted times."""
        terms = design(works, self.fit.floor_tokens, self.fit.graph_sizes)
        tokens = works[:, :1] + works[:, 4:5]
        bends = np.maximum(tokens - np.array(KNOTS, dtype=np.float64), 0.0)
        predicted_s = np.maximum(self.fit.predict_s(works), 1e-6)
        return np.asarray(np.hstack([terms, bends]) / predicted_s[:, None])

    def _after(self, measured: Candidate) -> Floats:
        """Covariance after a point's observations, which share the spread of the point."""
        works, iterations = measured.works[measured.tells], measured.iterations[measured.tells]
        if not len(works):
            return self._covariance
        rows = self._relative(works)
        predicted_s = np.maximum(self.fit.predict_s(works), 1e-6)
        jitter = self._jitter_s * sqrt(2) / iterations / predicted_s
        noise = np.diag((SHARE_NOISE**2 + jitter**2) / np.maximum(1.0, np.sqrt(iterations))) + POINT_SPREAD**2
        known = self._covariance
        gain = np.linalg.solve(rows @ known @ rows.T + noise, rows @ known)
        return np.asarray(known - known @ rows.T @ gain)


def rough_fit() -> TermFit:
    """Return times to plan the first points with, of a small model on one core; soon replaced by measured ones."""
    values = dict(zip(TERMS, (1.5e-2, 4e-4, 4e-7, 2e-4, 3e-4, 2e-6), strict=True))
    return TermFit(terms=values, floor_tokens=0, graph_sizes=())


def _powers(first: int, most: int) -> list[int]:
    """``first`` doubled again and again, up to ``most``."""
    values = []
    while first <= most:
        values.append(first)
        first *= 2
    return values


def _rounded_up(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size) * block_size
