import random
from pathlib import Path

from tests.kit.chaos import CHAOS_TIMEOUTS, Chaos
from tests.kit.client import Client
from tests.kit.processes import open_files, until
from tests.kit.scene import scene

ROUNDS, ROUND_S = 3, 3.0


def test_g16_after_any_trouble_every_request_is_accounted_for(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"G16: seed {seed}")
    limits = {"max_in_flight_per_replica": 20, "max_queued_per_expert": 20}
    with scene(
        tmp_path,
        {"code": 2, "talk": 2},
        {"ttft_s": 0.02, "itl_s": 0.01},
        timeouts=CHAOS_TIMEOUTS,
        limits=limits,
    ) as fleet:

        async def story(client: Client) -> None:
            chaos = Chaos(fleet, client, seed)
            worker = fleet.gateway.workers()[0]
            await chaos.load()
            await chaos.quiet()
            before = open_files(worker), fleet.gateway.resident_mb()
            for _ in range(ROUNDS):
                await chaos.round(ROUND_S)
            client.close()
            assert fleet.gateway.workers() == [worker]
            await until(lambda: open_files(worker) <= before[0])
            after = open_files(worker), fleet.gateway.resident_mb()
            print(f"G16: {dict(chaos.done)}")
            print(f"G16: files {before[0]} -> {after[0]}, RSS {before[1]:.0f} -> {after[1]:.0f} MB")
            assert after[1] < before[1] + 20

        fleet.play(story)
        print(f"G16: {dict(fleet.check_ledger())}, unaccounted 0")
