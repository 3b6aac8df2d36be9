"""Replicas killed in a simulated and in a real fleet at the same moments: ``python -m benchmarks.outage_truth``.

Real users send what simulated ones send, through the real gateway, to engines that are the simulator's own in real time
(``tests.kit.engine_expert``), whose processes are killed and started again. Compared are the requests by what became of
them. They can differ by those for which the moment decides: a first or last token, or a choice of a replica, near the
kill, and what is sent around the check that lets a replica back.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from calibrate.check.taken_for import taken_for
from real.users.run import run
from sim.fleet_file import LoadedFleetFile, load_fleet
from sim.records import COMPLETED, FAILED, RunRecord
from sim.report import BOX, wide_console
from sim.run import simulate
from tests.kit.engine_fleet import engine_fleet

FILE = Path(__file__).parent / "outage_truth.yaml"
FLEET = "mocks"
NEAR_S = 0.01
SENT, TRIED_AGAIN = "sent", "tried again"
FAILURES = {200: "answer broke off", 502: "HTTP 502", 503: "HTTP 503"}
KINDS = (SENT, *FAILURES.values(), TRIED_AGAIN)


@dataclass(frozen=True, slots=True)
class Fates:
    """What became of requests.

    Attributes:
        ambiguous: for how many of them the moment decides.
        notes: of the real run.
    """

    simulated: Mapping[str, int]
    measured: Mapping[str, int]
    ambiguous: int
    notes: tuple[str, ...]

    @property
    def agree(self) -> bool:
        """Whether all counts are equal but for the ambiguous ones."""
        return all(abs(self.simulated[kind] - self.measured[kind]) <= self.ambiguous for kind in KINDS)


def fates(folder: Path, near_s: float = NEAR_S) -> Fates:
    """Simulate the outages of the file, make them for real, and count."""
    file = load_fleet(FILE)
    predicted = simulate(file, taken_for=taken_for(file, FLEET), workers=1)
    with engine_fleet(FILE, file, FLEET, folder) as fleet:
        measured = run(file, url=fleet.url, replica_urls=fleet.replica_urls, kill=fleet.kill)
        tries = [json.loads(line)["tries"] for line in fleet.request_log.read_text().splitlines()]
    (simulated,), (real,) = predicted.runs, measured.runs
    assert simulated.router is not None
    return Fates(
        simulated=_counts(simulated, int(simulated.router.second_tries)),
        measured=_counts(real, sum(count > 1 for count in tries)),
        ambiguous=_ambiguous(simulated, file, near_s),
        notes=real.notes,
    )


def _counts(record: RunRecord, second_tries: int) -> dict[str, int]:
    failed = record.requests["http_status"][record.requests["status"] == FAILED]
    counts = {name: int((failed == status).sum()) for status, name in FAILURES.items()}
    return {SENT: len(record.requests["status"]), **counts, TRIED_AGAIN: second_tries}


def _ambiguous(record: RunRecord, file: LoadedFleetFile, near_s: float) -> int:
    """How many requests for an expert have a turn near the death of its replica, or are sent while it is let back."""
    requests, health = record.requests, file.serve.health
    found = np.zeros(len(requests["status"]), np.bool_)
    for outage in file.fleets[FLEET].outages:
        near = np.zeros(len(found), np.bool_)
        for name in ("router_end_s", "first_token_s"):
            near |= np.abs(requests[name] - outage.at_s) <= near_s
        near |= (requests["status"] == COMPLETED) & (np.abs(requests["last_token_s"] - outage.at_s) <= near_s)
        if outage.for_s is not None:
            # Either side's checks fall anywhere within an interval.
            first_s = outage.at_s + outage.for_s + (health.healthy_after - 1) * health.interval_s
            sent_s = requests["sent_s"]
            near |= (sent_s >= first_s - near_s) & (sent_s <= first_s + health.interval_s + near_s)
        # Here an expert serves the class of its own name.
        found |= near & (requests["routed_class_index"] == record.class_names.index(outage.expert))
    return int(found.sum())


def main() -> None:
    """Kill, count, and print."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = fates(Path(name))
    table = Table("what became of them", "simulated", "measured", title="requests", box=BOX, title_justify="left")
    for kind in KINDS:
        table.add_row(kind, str(found.simulated[kind]), str(found.measured[kind]))
    console: Console = wide_console()
    console.print(table)
    verdict = "PASS" if found.agree else "FAIL"
    console.print(f"{verdict}: the moment decides for {found.ambiguous} requests", highlight=False)
    for note in found.notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
