"""What tests of real users share: a tokenizer, a corpus, fleet files, and a token server in a process of its own."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sim.fleet_file import LoadedFleetFile, parse_fleet

ROOT = Path(__file__).parents[1]

TEXTS = {
    "code": [
        "Write a function that reverses a linked list in place and explain why it needs no extra memory.",
        "My loop never ends when the list is empty; which condition did I forget to test before the first step?",
        "Sort these records by their date, then by their name, and keep equal ones in the order they came.",
        "Explain what this regular expression matches, and give three strings that it should not match.",
        "Turn the nested callbacks in this small program into functions that can be tested one by one.",
    ],
    "chat": [
        "I had a long week and would like to talk about something that has nothing to do with work.",
        "What could I cook tonight with two eggs, some rice and half a cabbage, without going out again?",
        "My neighbour plays the drums every evening. How do I ask for quiet without starting a quarrel?",
        "Tell me about a place by the sea where it is warm in spring and not too many people go.",
        "Is it better to learn an instrument alone at home or with a teacher from the very beginning?",
    ],
}


def train_tokenizer(*, by_words: bool = True) -> Any:
    """A byte-level BPE with a BOS token; not ``by_words`` lets merges cross blanks, so that words do not add up."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)
    trainer = trainers.BpeTrainer(
        vocab_size=700 if by_words else 350,
        special_tokens=["<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for texts in TEXTS.values() for text in texts], trainer)
    begin = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", begin)])
    return tokenizer


def train_marking_tokenizer() -> Any:
    """A tokenizer that marks word beginnings, the first one too, as SentencePiece does."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=300,
        special_tokens=["<unk>"],
        unk_token="<unk>",
        initial_alphabet=list("0123456789"),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text for texts in TEXTS.values() for text in texts], trainer)
    return tokenizer


def write_checkpoint(folder: Path) -> Path:
    """A folder with nothing but a tokenizer."""
    folder.mkdir()
    train_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def write_corpus(path: Path) -> Path:
    rows = [{"class": name, "text": text} for name, texts in TEXTS.items() for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def fleet_text(checkpoint: Path, load: str, run: str = "{requests: 30, replications: 1}", router: str = "null") -> str:
    return f"""
name: small
workload:
  classes:
    code:
      share: 0.5
      prompt_tokens: {{distribution: uniform, min: 20, max: 80}}
      output_tokens: {{distribution: uniform, min: 2, max: 12}}
    chat: {{share: 0.5, prompt_tokens: 40, output_tokens: 6}}
  load: {load}
fleets:
  alone:
    router: {router}
    experts:
      one: {{model: laptop-16m, gpu: CPU, checkpoint: {checkpoint}}}
run: {run}
"""


def fleet_file(checkpoint: Path, load: str, **parts: str) -> LoadedFleetFile:
    return parse_fleet(fleet_text(checkpoint, load, **parts))


@contextmanager
def token_server(**settings: Any) -> Iterator[str]:
    """Yield the URL of a token server with these settings."""
    port = free_port()
    command = [sys.executable, "-m", "tests.kit.token_server", str(port), json.dumps({"model": "one", **settings})]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield f"http://127.0.0.1:{port}"
        finally:
            server.kill()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def cli(arguments: Sequence[str]) -> list[str]:
    """The command line that runs ``expert-router`` from this checkout."""
    return [sys.executable, "-c", "from sim.cli import main; main()", *arguments]
