import random
from pathlib import Path

from tests.kit.chaos import Chaos, chaos_scene
from tests.kit.client import Client

ROUNDS, ROUND_S = 3, 3.0


def test_g16_after_any_trouble_every_request_is_accounted_for(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    print(f"G16: seed {seed}")
    with chaos_scene(tmp_path) as fleet:

        async def story(client: Client) -> None:
            chaos = Chaos(fleet, client, seed)
            before, after = await chaos.life(ROUNDS, ROUND_S)
            print(f"G16: {dict(chaos.done)}")
            print(f"G16: {before} -> {after}")
            assert after.resident_mb < before.resident_mb + 20

        fleet.play(story)
        print(f"G16: {dict(fleet.check_ledger())}, unaccounted 0")
