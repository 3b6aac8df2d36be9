import json
from itertools import islice

from calibrate.check.taken_for import taken_for
from real.router.classifier import load_classifier
from real.users.prepared_requests import PreparedRequests, closed_loop_requests
from real.users.prompts import read_corpus, texts_of_classes
from real.users.run import prompt_writers
from sim.fleet_file import load_fleet
from sim.measuring import replication_seed
from sim.resolve import resolve_fleet
from sim.run import simulate
from sim.traffic import ClosedLoopTraffic, WorkloadData

FILE = load_fleet("examples/laptop.yaml", ["workload.load.users=6", "run.duration_s=30", "run.warm_up_s=2"])
USERS = 6
SEED = replication_seed(FILE.run.seed, 0)


def test_requests_are_taken_for_what_the_prompts_that_are_really_sent_are_taken_for() -> None:
    classes = list(FILE.workload.classes)
    guess = taken_for(FILE, "laptop")
    assert guess is not None
    texts = texts_of_classes(read_corpus(), classes)
    writers = prompt_writers(FILE, resolve_fleet(FILE, "laptop"), texts, nonce=123_456_789)
    traffic = ClosedLoopTraffic(FILE.workload, USERS, SEED, WorkloadData())
    prepared = PreparedRequests(
        closed_loop_requests(traffic, USERS), writers, model="laptop", seed=SEED, first_number=10**6
    )
    classifier = load_classifier(FILE.serve.classifier, classes)
    requests = [request for request, _ in islice(closed_loop_requests(traffic, USERS), 300)]
    sent = [prepared.take(number) for number in range(300)]
    real = [classifier.classify(json.loads(each.body)["prompt"]) for each in sent if each is not None]
    guessed = [guess(request) for request in requests]
    same = sum(a == b for a, b in zip(real, guessed, strict=True))
    assert same >= 297, "leading numbers alone may differ"
    assert len(set(guessed)) == 2
    wrong = sum(guess != request.class_index for guess, request in zip(guessed, requests, strict=True))
    assert wrong > 10, "or this test would not see a difference"


def test_a_simulation_sends_each_request_where_its_prompt_goes() -> None:
    guess = taken_for(FILE, "laptop")
    assert guess is not None
    result = simulate(FILE, taken_for=guess, replications=1)
    rows = result.runs[0].requests
    known = rows["routed_class_index"][rows["router_end_s"] > 0]
    assert (known != rows["class_index"][rows["router_end_s"] > 0]).any()
    assert simulate(FILE, replications=1).runs[0].requests["routed_class_index"].tolist() != known.tolist()


def test_one_class_or_a_policy_without_classes_needs_no_classifier() -> None:
    blind = load_fleet("examples/laptop.yaml", ["fleets.laptop.router.policy=round_robin"])
    assert taken_for(blind, "laptop") is None
