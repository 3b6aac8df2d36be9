"""The ``serve`` part of a fleet file: how the gateway and its experts run for real.

``simulate`` reads of it what decides the fate of requests when a replica dies: ``health`` and ``limits.retry_share``.
"""

from typing import Annotated, Literal

from pydantic import Field

from sim.spec_base import PositiveInt, PositiveSeconds, Probability, Spec

Port = Annotated[int, Field(ge=1, le=65535)]


class TfidfClassifier(Spec):
    """TF-IDF, SVD and k-means as in the paper, from a file that ``expert-router router fit`` wrote."""

    kind: Literal["tfidf"] = "tfidf"
    file: str | None = Field(None, description="none: the packaged one")


class EmbeddingClassifier(Spec):
    """The nearest cluster of a sentence embedding, from a file that ``expert-router router fit`` wrote."""

    kind: Literal["embedding"] = "embedding"
    file: str


class RuleClassifier(Spec):
    """The first class one of whose regular expressions is found in the prompt."""

    kind: Literal["rules"] = "rules"
    rules: dict[str, Annotated[list[str], Field(min_length=1)]]
    otherwise: str = Field(description="class of a prompt that no rule matches")


Classifier = Annotated[TfidfClassifier | EmbeddingClassifier | RuleClassifier, Field(discriminator="kind")]


class TimeoutSpec(Spec):
    """How long the gateway waits, each for its own thing."""

    connect_s: PositiveSeconds = 1.0
    queue_s: PositiveSeconds = Field(30.0, description="for a place among an expert's requests in flight; then 429")
    first_byte_s: PositiveSeconds = Field(120.0, description="from the request sent to the expert's first byte")
    idle_s: PositiveSeconds = Field(60.0, description="between two chunks of an answer")
    total_s: PositiveSeconds = Field(1800.0, description="from the request's arrival to the answer's end")
    request_s: PositiveSeconds = Field(10.0, description="for a client to send headers and body")
    slow_reader_s: PositiveSeconds = Field(60.0, description="for a client that stopped reading its answer")


class LimitSpec(Spec):
    """What the gateway takes on at most; with several workers each has its even share."""

    max_in_flight_per_replica: PositiveInt = 4096
    max_queued_per_expert: Annotated[int, Field(ge=0)] = 1024
    max_body_bytes: PositiveInt = 4 * 2**20
    retry_share: Probability = Field(0.1, description="retries at a time, as a share of the requests in flight")


class HealthSpec(Spec):
    """How the gateway finds replicas that do not answer, and lets them back."""

    interval_s: PositiveSeconds = 1.0
    healthy_after: PositiveInt = Field(2, description="good answers in a row that bring a replica back")
    unhealthy_after: PositiveInt = Field(2, description="missed answers in a row that take it out")
    reopen_s: PositiveSeconds = Field(1.0, description="first wait of a replica that failed; doubles up to 30 s")


class ServeSpec(Spec):
    """How ``expert-router serve`` runs a fleet of this file."""

    host: str = Field("127.0.0.1", description="beyond loopback an API key is required")
    port: Port = 8080
    metrics_port: Port = 8081
    expert_port: Port = Field(8100, description="of the first replica; the others count up from it")
    api_key_env: str | None = Field(None, description="environment variable with the API keys, commas between them")
    classifier: Classifier = TfidfClassifier()
    timeouts: TimeoutSpec = TimeoutSpec()
    limits: LimitSpec = LimitSpec()
    health: HealthSpec = HealthSpec()
    drain_s: PositiveSeconds = Field(30.0, description="for answers in flight when told to stop")
