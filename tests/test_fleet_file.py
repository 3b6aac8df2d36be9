"""A fleet file is read as written, and every mistake in it is told in one line of the file's own words."""

import json
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
import yaml

from sim.fleet_file import FleetFileError, LoadedFleetFile, fleet_file_schema, load_fleet, parse_fleet
from sim.spec import ClosedLoop, Fixed, Lognormal, Trace

ROOT = Path(__file__).parent.parent
SHIPPED = [*sorted((ROOT / "examples").glob("*.yaml")), ROOT / "sim" / "data" / "quickstart.yaml"]

GOOD = """\
name: two fleets
x-expert: &expert {model: llama-3-8b, gpu: H100-SXM}
workload:
  classes:
    chat: {prompt_tokens: 512, output_tokens: {distribution: lognormal, mean: 128, cv: 5e-1, max: 1e3}}
  load: {kind: closed_loop, users: [1, 10]}
fleets:
  routed:
    router: {workers: 4}
    experts:
      chat: {<<: *expert, replicas: 8}
  direct:
    extends: routed
    router: null
    experts:
      chat: {replicas: 1, engine: {enable_prefix_caching: off}}
run: {seed: 3}
"""


def mistakes(text: str, *overrides: str) -> list[str]:
    with pytest.raises(FleetFileError) as caught:
        parse_fleet(text, overrides)
    assert str(caught.value) == "\n".join(caught.value.mistakes)
    return list(caught.value.mistakes)


def mistakes_after(before: str, after: str) -> list[str]:
    assert before in GOOD
    return mistakes(GOOD.replace(before, after))


# ---------------------------------------------------------------------------------------------- what a file may say


def test_numbers_in_any_notation_are_numbers() -> None:
    chat = parse_fleet(GOOD).workload.classes["chat"]

    assert chat.prompt_tokens == Fixed(value=512)
    assert chat.output_tokens == Lognormal(mean=128, cv=0.5, max=1000)


def test_merge_keys_fill_in_what_is_not_given() -> None:
    expert = parse_fleet(GOOD).fleets["routed"].experts["chat"]

    assert (expert.model, expert.gpu, expert.replicas) == ("llama-3-8b", "H100-SXM", 8)


def test_extends_lays_mappings_over_each_other_and_null_removes() -> None:
    direct = parse_fleet(GOOD).fleets["direct"]

    assert direct.router is None
    assert direct.experts["chat"].model == "llama-3-8b"
    assert direct.experts["chat"].replicas == 1
    assert direct.experts["chat"].engine.enable_prefix_caching is False
    assert direct.extends is None, "what was inherited is spelled out"


def test_extends_reaches_through_a_fleet_that_extends_another_and_does_not_change_it() -> None:
    file = parse_fleet(GOOD + "", ["fleets.third={extends: direct, experts: {chat: {gpu: L4}}}"])

    assert file.fleets["third"].experts["chat"].gpu == "L4"
    assert file.fleets["third"].experts["chat"].replicas == 1
    assert file.fleets["direct"].experts["chat"].gpu == "H100-SXM"


def test_words_that_yaml_1_1_takes_for_booleans_can_name_classes_and_experts() -> None:
    text = GOOD.replace("chat:", "on:").replace("routed", "no").replace("direct", "2")

    file = parse_fleet(text)

    assert list(file.workload.classes) == ["on"]
    assert list(file.fleets) == ["no", "2"]


@pytest.mark.parametrize("word", ["true", "True", "on", "yes"])
def test_booleans_are_read_where_a_field_is_one(word: str) -> None:
    file = parse_fleet(GOOD, [f"fleets.direct.experts.chat.engine.enforce_eager={word}"])

    assert file.fleets["direct"].experts["chat"].engine.enforce_eager is True


def test_leading_zeros_are_decimal_and_underscores_group_digits() -> None:
    assert parse_fleet(GOOD, ["run.seed=010"]).run.seed == 10
    assert parse_fleet(GOOD, ["run.seed=1_000"]).run.seed == 1000


def test_a_loaded_file_tells_where_each_value_was_written() -> None:
    file = parse_fleet(GOOD, ["run.seed=4"])

    assert file.where(("fleets", "routed", "experts", "chat", "replicas")).text == "line 11"
    assert file.where(("fleets", "routed", "experts", "chat", "gpu")).text == "line 2", "where the anchor has it"
    assert file.where(("fleets", "routed", "router", "policy")).text == "line 9", "left out: the nearest that is there"
    assert file.where(("run", "seed")).text == "--set"


# ----------------------------------------------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("run.seed=7", lambda file: file.run.seed == 7),
        ("slo={ttft_ms: 200}", lambda file: file.slo.ttft_ms == 200),
        ("workload.load.users=[5, 50]", lambda file: file.workload.load.users == [5, 50]),
        ("workload.load.users.1=20", lambda file: file.workload.load.users == [1, 20]),
        ("workload.load.users[0]=2", lambda file: file.workload.load.users == [2, 10]),
        ("workload.load.think_time_s=1e-3", lambda file: file.workload.load.think_time_s == Fixed(value=0.001)),
        ("fleets.routed.router.policy=random", lambda file: file.fleets["routed"].router.policy == "random"),
        ("fleets.direct.experts.chat.engine.block_size=32", lambda file: block_sizes(file) == [None, 32]),
        ("fleets.routed.experts.chat.engine.block_size=32", lambda file: block_sizes(file) == [32, 32]),
    ],
)
def test_an_override_acts_as_if_the_file_had_been_edited(
    override: str, read: Callable[[LoadedFleetFile], bool]
) -> None:
    assert read(parse_fleet(GOOD, [override]))


def block_sizes(file: LoadedFleetFile) -> list[int | None]:
    return [fleet.experts["chat"].engine.block_size for fleet in file.fleets.values()]


def test_overrides_can_be_a_mapping_and_the_later_one_wins() -> None:
    assert parse_fleet(GOOD, {"run.seed": "7"}).run.seed == 7
    assert parse_fleet(GOOD, ["run.seed=7", "run.seed=8"]).run.seed == 8


def test_an_override_finds_names_that_contain_dots_and_spaces() -> None:
    text = GOOD.replace("routed", "8 x llama-3.1 8B")

    file = parse_fleet(text, ["fleets.8 x llama-3.1 8B.experts.chat.replicas=4"])

    assert file.fleets["8 x llama-3.1 8B"].experts["chat"].replicas == 4


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("run.seed", "--set 'run.seed': expected PATH=VALUE, e.g. run.seed=7"),
        ("run.sede=7", "run.sede: unknown field (--set), did you mean 'seed'?"),
        ("rnu.seed=7", "rnu: unknown field (--set), did you mean 'run'?"),
        ("run.seed=many", "run.seed: expected a whole number, got 'many' (--set)"),
        ("fleets.ruted.router.workers=2", "fleets.ruted: not in this file (--set), did you mean 'routed'?"),
        (
            "fleets.direct.experts.code.replicas=2",
            "fleets.direct.experts.code: not in this file (--set), known: chat",
        ),
        ("workload.load.users.2=5", "workload.load.users: has entries 0 to 1, got '2' (--set)"),
        (
            "workload.classes.chat.prompt_tokens.mean=5",
            "workload.classes.chat.prompt_tokens: has no fields to set, it is 512 (--set), set the whole of it",
        ),
        (
            "workload.load.users=[1, 2",
            "workload.load.users: not valid YAML: expected ',' or ']', but got '<stream end>' "
            "while parsing a flow sequence (--set)",
        ),
    ],
)
def test_a_mistake_in_an_override_is_one_line(override: str, line: str) -> None:
    assert mistakes(GOOD, override) == [line]


# ---------------------------------------------------------------------------------------------- mistakes, in words


@pytest.mark.parametrize(
    ("before", "after", "line"),
    [
        ("seed: 3", "sede: 3", "run.sede: unknown field (line 17), did you mean 'seed'?"),
        ("seed: 3", "seed: three", "run.seed: expected a whole number, got 'three' (line 17)"),
        ("seed: 3", "seed: true", "run.seed: expected a whole number, got 'true' (line 17)"),
        ("seed: 3", "replications: 2.5", "run.replications: expected a whole number, got 2.5 (line 17)"),
        ("seed: 3", "seed: -1", "run.seed: must be >= 0, got -1 (line 17)"),
        ("seed: 3", "warm_up_s: .inf", "run.warm_up_s: must be a finite number, got inf (line 17)"),
        (
            "seed: 3",
            "duration_s: 10, requests: 5",
            "run: give either duration_s or requests / requests_per_user, not both (line 17)",
        ),
        ("name: two fleets", "name: 70", "name: expected text, got the number 70 (line 1), put it in quotes"),
        (
            "workers: 4",
            "policy: clas",
            "fleets.routed.router.policy: unknown value 'clas' (line 9), did you mean 'class'?",
        ),
        (
            "workers: 4",
            "replica_policy: nearest",
            "fleets.routed.router.replica_policy: unknown value 'nearest' (line 9), "
            "known: random, round_robin, least_outstanding, power_of_two_choices",
        ),
        (
            "workers: 4",
            "confusion: {chat: {chat: -1}}",
            "fleets.routed.router.confusion.chat.chat: must be >= 0, got -1 (line 9)",
        ),
        (
            "enable_prefix_caching: off",
            "enable_prefix_caching: maybe",
            "fleets.direct.experts.chat.engine.enable_prefix_caching: expected true or false, got 'maybe' (line 16)",
        ),
        ("users: [1, 10]", "users: [1, x]", "workload.load.users[1]: expected a whole number, got 'x' (line 6)"),
        ("users: [1, 10]", "users: 0", "workload.load.users: must be >= 1, got 0 (line 6)"),
        ("users: [1, 10]", "users: []", "workload.load.users: is empty, needs at least one entry (line 6)"),
        (
            "users: [1, 10]",
            "users: many",
            "workload.load.users: expected a whole number, a list of whole numbers or a mapping with start, stop, "
            "points, got 'many' (line 6)",
        ),
        (
            "users: [1, 10]",
            "users: {start: 1, stop: 10}",
            "workload.load.users.points: missing (line 6), expected a whole number",
        ),
        (
            "kind: closed_loop",
            "kind: close_loop",
            "workload.load.kind: unknown value 'close_loop' (line 6), did you mean 'closed_loop'?",
        ),
        (
            "kind: closed_loop, ",
            "",
            "workload.load.kind: missing (line 6), expected one of closed_loop, open_loop, trace",
        ),
        (
            "prompt_tokens: 512",
            "prompt_tokens: -3",
            "workload.classes.chat.prompt_tokens: must be >= 0, got -3 (line 5)",
        ),
        (
            "prompt_tokens: 512",
            "prompt_tokens: long",
            "workload.classes.chat.prompt_tokens: expected a number or a mapping with 'distribution' "
            "(fixed, uniform, exponential, lognormal, empirical), got 'long' (line 5)",
        ),
        (
            "prompt_tokens: 512",
            "prompt_tokens: {mean: 3}",
            "workload.classes.chat.prompt_tokens.distribution: missing (line 5), "
            "expected one of fixed, uniform, exponential, lognormal, empirical",
        ),
        (
            "distribution: lognormal",
            "distribution: logn",
            "workload.classes.chat.output_tokens.distribution: unknown value 'logn' (line 5), "
            "did you mean 'lognormal'?",
        ),
        ("cv: 5e-1", "cv: 0", "workload.classes.chat.output_tokens.cv: must be > 0, got 0 (line 5)"),
        (
            "max: 1e3",
            "min: 9, max: 3",
            "workload.classes.chat.output_tokens: max must be >= min, got min 9 and max 3 (line 5)",
        ),
        (
            "prompt_tokens: 512, ",
            "",
            "workload.classes.chat.prompt_tokens: missing (line 5), expected a number or a mapping with 'distribution' "
            "(fixed, uniform, exponential, lognormal, empirical)",
        ),
        (
            "run: {seed: 3}",
            "run:",
            "run: expected a mapping with requests, requests_per_user, duration_s, warm_up_requests, warm_up_s, seed, "
            "replications, got nothing (line 17)",
        ),
        (
            "extends: routed",
            "extends: routd",
            "fleets.direct.extends: unknown fleet 'routd' (line 13), did you mean 'routed'?",
        ),
        ("extends: routed", "extends: direct", "fleets.direct: extends in a circle: direct -> direct (line 12)"),
        (
            "router: {workers: 4}",
            "extends: direct",
            "fleets.direct: extends in a circle: direct -> routed -> direct (line 12)",
        ),
        ("seed: 3", "seed: 3, seed: 4", "duplicate key 'seed', first given on line 17 (line 17)"),
        ("seed: 3", "seed: !env SEED", "tag '!env' is not supported (line 17)"),
        ("<<: *expert", "<<: 3", "'<<' needs a mapping, or a list of mappings (line 11)"),
        ("run: {seed: 3}", "run: &run {seed: *run}", "an anchor that contains itself (line 17)"),
    ],
)
def test_a_mistake_is_one_line(before: str, after: str, line: str) -> None:
    assert mistakes_after(before, after) == [line]


def test_all_mistakes_are_told_at_once() -> None:
    assert mistakes_after("seed: 3", "seed: x, warm: 3, warm_up_s: -1") == [
        "run.warm_up_s: must be >= 0, got -1 (line 17)",
        "run.seed: expected a whole number, got 'x' (line 17)",
        "run.warm: unknown field (line 17), did you mean 'warm_up_s'?",
    ]


def test_a_mistake_in_an_anchor_is_told_once_however_often_it_is_used() -> None:
    assert mistakes_after("gpu: H100-SXM", "gpu: H100-SXM, replica: 2") == [
        "fleets.routed.experts.chat.replica: unknown field (line 2), did you mean 'replicas'?"
    ]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "the fleet file is empty, expected at least 'workload' and 'fleets'"),
        ("# nothing yet\n", "the fleet file is empty, expected at least 'workload' and 'fleets'"),
        ("[1, 2]", "expected a mapping with 'workload' and 'fleets', got a list (line 1)"),
        ("hello", "expected a mapping with 'workload' and 'fleets', got 'hello' (line 1)"),
        (
            "run:\n\tseed: 1",
            "not valid YAML: line 2, column 1: found character '\\t' that cannot start any token "
            "while scanning for the next token (indent with spaces, not tabs)",
        ),
        (
            "name: a: b",
            "not valid YAML: line 1, column 8: mapping values are not allowed here "
            "(put text that contains ': ' in quotes)",
        ),
        ("run: *base", "not valid YAML: line 1, column 6: found undefined alias 'base'"),
        ("a: 1\x00", "not valid YAML: character 4: special characters are not allowed"),
        ("[" * 5000, "not readable: nested too deeply"),
    ],
)
def test_text_that_is_no_fleet_file_is_told_in_one_line(text: str, line: str) -> None:
    assert mistakes(text) == [line]


def test_a_file_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("run: *base")
    with pytest.raises(FleetFileError, match=r"mine\.yaml: not valid YAML: line 1, column 6"):
        load_fleet(tmp_path / "mine.yaml")


def test_aliases_cannot_blow_up_memory() -> None:
    text = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 10)}]\n" for n in range(8)
    )

    assert mistakes(text) == ["not readable: its aliases expand to more than 200,000 values"]


def test_missing_parts_are_named() -> None:
    assert mistakes("name: nothing else") == [
        "workload: missing, expected a mapping with classes, load",
        "fleets: missing, expected a mapping",
    ]


# ------------------------------------------------------------------------------------------------------------ files


def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    binary = tmp_path / "fleet.yaml"
    binary.write_bytes(bytes(range(256)))
    expected = {
        tmp_path / "none.yaml": f"{tmp_path}/none.yaml: no such file",
        tmp_path: f"{tmp_path}: is a directory, expected a fleet file (YAML)",
        binary: f"{binary}: not a text file (byte 128 is not UTF-8)",
    }
    for path, line in expected.items():
        with pytest.raises(FleetFileError) as caught:
            load_fleet(path)
        assert caught.value.mistakes == (line,)


def test_files_named_in_a_fleet_file_are_found_beside_it(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n")
    (tmp_path / "profile.json").write_text("{}")
    text = GOOD.replace("{kind: closed_loop, users: [1, 10]}", "{kind: trace, format: azure, file: trace.csv}")
    text = text.replace("replicas: 8", "profile: profile.json")
    (tmp_path / "fleet.yaml").write_text(text)

    file = load_fleet(tmp_path / "fleet.yaml")

    assert isinstance(file.workload.load, Trace)
    assert file.workload.load.file == str(tmp_path / "trace.csv")
    assert file.fleets["routed"].experts["chat"].profile == str(tmp_path / "profile.json")


def test_a_missing_file_is_named_with_the_line_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(
        GOOD.replace("512", "{distribution: empirical, file: lengths.csv, column: prompt}")
    )

    with pytest.raises(FleetFileError) as caught:
        load_fleet(tmp_path / "fleet.yaml")

    assert caught.value.mistakes == (
        f"workload.classes.chat.prompt_tokens.file: no such file '{tmp_path}/lengths.csv' (line 5)",
    )


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_bytes(b"\xef\xbb\xbf" + GOOD.encode())

    assert isinstance(load_fleet(tmp_path / "fleet.yaml").workload.load, ClosedLoop)


# ---------------------------------------------------------------------------------------------------------- schema


def test_the_committed_schema_is_up_to_date() -> None:
    committed = json.loads((ROOT / "docs" / "fleet.schema.json").read_text(encoding="utf-8"))

    assert committed == fleet_file_schema(), "run: python -m sim.fleet_file > docs/fleet.schema.json"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_validates_against_the_schema(path: Path) -> None:
    jsonschema.validate(yaml.safe_load(path.read_text(encoding="utf-8")), fleet_file_schema())


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("seed: 3", "sede: 3"),
        ("workers: 4", "workers: many"),
        ("gpu: H100-SXM", "gpu: 100"),
        ("replicas: 1", "replica: 1"),
    ],
)
def test_the_schema_refuses_what_the_reader_refuses(before: str, after: str) -> None:
    text = GOOD.replace("5e-1", "0.5").replace("1e3", "1000")  # PyYAML's YAML 1.1 takes these for text
    schema = fleet_file_schema()
    jsonschema.validate(yaml.safe_load(text), schema)

    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text.replace(before, after)), schema)


def test_a_checkpoint_beside_the_file_is_a_folder_and_any_other_name_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for name, place in (("weights", str(tmp_path / "weights")), ("meta-llama/Llama-3-8B", "meta-llama/Llama-3-8B")):
        expert = f"{{model: llama-3-8b, gpu: H100-SXM, checkpoint: {name}}}"
        file = parse_fleet(GOOD.replace("{model: llama-3-8b, gpu: H100-SXM}", expert), directory=tmp_path)
        assert file.fleets["routed"].experts["chat"].checkpoint == place
