"""Write ``short_trace.csv``: a made-up trace in the format of Azure's LLM inference traces.

    python examples/traces/make_short_trace.py > examples/traces/short_trace.csv

A "day" is squeezed into ten minutes: the rate of a Poisson process swings between a night and a noon, with two short
bursts on top. Lengths are lognormal. Nothing in it is copied from a real trace.
"""

import math
import random
import sys
from datetime import datetime, timedelta

SEED = 2404
START = datetime(2024, 4, 24, 9, 0, 0)
DAY_S = 600.0
PEAK_RPS = 4.0


def rate_rps(time_s: float) -> float:
    """Requests per second at a time of the squeezed day: low at its ends, high in the middle, two bursts."""
    daily = 0.2 + 1.0 * math.sin(math.pi * time_s / DAY_S) ** 2
    burst = 2.5 if 200 <= time_s < 215 or 430 <= time_s < 440 else 0.0
    return daily + burst


def tokens(rng: random.Random, median: float, sigma: float, most: int) -> int:
    """One lognormal length."""
    return min(most, max(1, round(rng.lognormvariate(math.log(median), sigma))))


def main() -> None:
    """Draw arrivals by thinning a process of the peak rate and write them as CSV."""
    rng = random.Random(SEED)
    sys.stdout.write("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    time_s = rng.expovariate(PEAK_RPS)
    while time_s < DAY_S:
        if rng.random() < rate_rps(time_s) / PEAK_RPS:
            stamp = START + timedelta(seconds=time_s)
            row = f"{tokens(rng, 800, 0.9, 8000)},{tokens(rng, 120, 0.8, 1500)}"
            sys.stdout.write(f"{stamp:%Y-%m-%d %H:%M:%S.%f}0,{row}\n")
        time_s += rng.expovariate(PEAK_RPS)


if __name__ == "__main__":
    main()
