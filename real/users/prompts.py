"""Prompts of real text: of a class, of an exact number of tokens, and each distinct from its first tokens on.

A prompt is ``[what its class shares] [three numbers that no other prompt begins with] [text of the class]``, text that
is joined from the corpus, begins where a text of it begins, and is cut after a word; where the next word has too many
tokens, words of one token fill the gap. The numbers keep prefix caching from finding what nobody meant to share; the
router's classifier takes all numbers for one. Prompts too short for numbers, which are below a block of the cache
anyway, are text alone.

Tokens of words add up in the tokenizers at hand (a word with the blank before it is a pre-token), so making a prompt
is two look-ups and a slice. That they do is checked on the first prompts of each class; if they do not, each prompt is
counted and mended.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from real.experts.reference_models import ensure_reference_model
from real.router.labelled_prompts import read_packaged_prompts, read_prompts
from sim.mistakes import did_you_mean
from sim.spec import ExpertSpec

CHECKED = 64  # prompts of a class that are counted before its word counts are trusted
MENDING_ROUNDS = 4
SHORTEST_NUMBERED = 17  # tokens; a shorter prompt fills no block of 16 but its last, which the cache never gives back
NUMBERS = 1000  # each of the three
_SCRAMBLE = 387_420_489  # odd and no multiple of five, so multiplying by it permutes the numbers below 10**9


class PromptRequest(NamedTuple):
    """What a prompt must be.

    Attributes:
        tokens: its length, special tokens that the server adds included.
        number: unlike any other prompt's.
        text: any number; equal ones begin with the same text of the corpus.
        prefix: (number, tokens) of a beginning that prompts of this number share; None: what the class shares.
    """

    tokens: int
    number: int
    text: int
    prefix: tuple[int, int] | None = None


class Prompt(NamedTuple):
    """A prompt and the tokens counted in it."""

    text: str
    tokens: int


def read_corpus(path: Path | None = None) -> dict[str, list[str]]:
    """Return the texts of each class from a file of JSON lines ``{"class", "text"}``; None: the packaged one.

    Raises:
        ValueError: it cannot be read, or a line is something else.
    """
    given = read_packaged_prompts() if path is None else read_prompts(path)
    if given.labels is None:
        raise ValueError(f"{path}: class is missing, and users send prompts of a class; give one in every line")
    texts: dict[str, list[str]] = {}
    for name, text in zip(given.labels, given.texts, strict=True):
        texts.setdefault(name, []).append(" ".join(text.split()))
    return texts


def texts_of_classes(corpus: Mapping[str, list[str]], classes: Iterable[str]) -> dict[str, list[str]]:
    """Return the texts of these classes.

    Raises:
        ValueError: the corpus has none of a class.
    """
    missing = [name for name in classes if name not in corpus]
    if missing:
        raise ValueError(
            f"workload.classes.{missing[0]}: the prompt corpus has no text of this class"
            f"{did_you_mean(missing[0], corpus)}; rename the class to one of {', '.join(corpus)}"
        )
    return {name: list(corpus[name]) for name in classes}


def load_tokenizer(expert: ExpertSpec) -> Any:
    """Return the ``tokenizers.Tokenizer`` of an expert's checkpoint.

    Raises:
        ValueError: it has none.
    """
    if expert.checkpoint is None:
        folder = ensure_reference_model(expert.model, expert.quantization)[0].folder
    else:
        folder = Path(expert.checkpoint).expanduser()
        if not folder.exists():
            try:
                return Tokenizer.from_pretrained(expert.checkpoint)
            except Exception as error:  # the hub's client raises a dozen kinds
                raise ValueError(
                    f"checkpoint {expert.checkpoint}: neither a folder nor a model whose tokenizer could be fetched "
                    f"({type(error).__name__})"
                ) from None
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"checkpoint {folder} has no tokenizer.json, which prompts of an exact length need")
    return Tokenizer.from_file(str(file))


class PromptWriter:
    """Writes prompts of one class for one tokenizer."""

    def __init__(self, texts: Sequence[str], tokenizer: Any, *, shared_prefix_tokens: int = 0, nonce: int = 0):
        """Prepare the text of a class.

        Args:
            texts: of the class.
            tokenizer: a ``tokenizers.Tokenizer``.
            shared_prefix_tokens: leading tokens that all prompts of the class share, special ones included.
            nonce: of the run, so that the same prompts sent again to a server still differ from what it has cached.
        """
        self._tokenizer = tokenizer
        self._special = tokenizer.num_special_tokens_to_add(False)
        self._nonce = nonce
        self._shared_prefix_tokens = shared_prefix_tokens
        starts: list[int] = []
        words: list[str] = []
        for text in texts:
            starts.append(len(words))
            words += text.split(" ")
        self._starts = np.array(starts, np.int64)
        self._words = words
        self._text = " " + " ".join(words)
        lengths = np.array([len(word) + 1 for word in words], np.int64)
        self._at = np.concatenate(([0], np.cumsum(lengths)))  # of each word's blank in the text
        self._after = np.concatenate(([0], np.cumsum(self._counts_within([f" {word}" for word in words]))))
        self._total = int(self._after[-1])
        distinct = list(dict.fromkeys(words))
        one = self._counts_within([f" {word}" for word in distinct]) == 1
        # Where no word is a single token, some digit or letter is.
        self._fillers = [f" {word}" for word, is_one in zip(distinct, one, strict=True) if is_one and word.isalpha()]
        self._fillers = self._fillers or [f" {letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
        self._number_tokens = self._counts_within([f" {number:03}" for number in range(NUMBERS)])
        self._blank_tokens = self._leading_blank()
        self._prefixes: dict[tuple[int, int], str] = {}
        self._to_check = CHECKED
        self._adds_up = True

    def write(self, requests: Sequence[PromptRequest]) -> list[Prompt]:
        """Return the prompts; ``tokens`` is what was asked for, or the real count where that cannot be hit."""
        texts = [self._draft(request, request.tokens) for request in requests]
        counts = [request.tokens for request in requests]
        if self._adds_up and not self._to_check:
            return [Prompt(text, tokens) for text, tokens in zip(texts, counts, strict=True)]
        to_count = len(requests) if not self._adds_up else min(len(requests), self._to_check)
        counted = self._counts(texts[:to_count], special=True)
        self._to_check -= min(to_count, self._to_check)
        wrong = [place for place in range(to_count) if counted[place] != requests[place].tokens]
        if not wrong:
            return [Prompt(text, tokens) for text, tokens in zip(texts, counts, strict=True)]
        self._adds_up = False
        if to_count < len(requests):
            rest = self._counts(texts[to_count:], special=True)
            counted = np.concatenate((counted, rest))
        for place, request in enumerate(requests):
            if counted[place] != request.tokens:
                texts[place], counted[place] = self._mended(request, texts[place], int(counted[place]))
        return [Prompt(text, int(tokens)) for text, tokens in zip(texts, counted, strict=True)]

    def _draft(self, request: PromptRequest, tokens: int) -> str:
        """A prompt of this many tokens if words add up."""
        left = max(0, tokens - self._special)
        key, shared = request.prefix or (-1, self._shared_prefix_tokens)
        head = ""
        if shared > self._special:
            if tokens <= shared:
                return self._finished(self._body(key, left))
            head = self._prefix(key, shared)
            left = tokens - shared
        if tokens >= SHORTEST_NUMBERED:
            number = (request.number * _SCRAMBLE + self._nonce) % NUMBERS**3
            for part in (number // NUMBERS**2, number // NUMBERS % NUMBERS, number % NUMBERS):
                if self._number_tokens[part] > left:
                    break  # little is left behind a shared beginning
                head += f" {part:03}"
                left -= int(self._number_tokens[part])
        return self._finished(head + self._body(request.text, left))

    def _finished(self, text: str) -> str:
        """The prompt without the blank before its first word, when that changes no count."""
        return text[self._blank_tokens :]

    def _prefix(self, key: int, shared: int) -> str:
        text = self._prefixes.get((key, shared))
        if text is None:
            if len(self._prefixes) > 100_000:
                self._prefixes.clear()
            text = self._prefixes[key, shared] = self._body(key, shared - self._special)
        return text

    def _body(self, text: int, tokens: int) -> str:
        """Text of the class from the beginning of one of its texts, cut to this many tokens."""
        if tokens <= 0:
            return ""
        first = int(self._starts[text % len(self._starts)])
        before = int(self._after[first])
        parts = []
        whole, rest = divmod(before + tokens, self._total)
        last = int(np.searchsorted(self._after, rest, side="right")) - 1
        if not whole:
            parts.append(self._slice(first, last))
        else:
            parts.append(self._slice(first, len(self._words)))
            parts += [self._text] * (whole - 1)
            parts.append(self._slice(0, last))
        missing = rest - int(self._after[last])
        parts += [self._fillers[(text + place) % len(self._fillers)] for place in range(missing)]
        return "".join(parts)

    def _slice(self, first: int, last: int) -> str:
        return self._text[self._at[first] : self._at[last]]

    def _mended(self, request: PromptRequest, text: str, counted: int) -> tuple[str, int]:
        """Ask for more or less, first in proportion, then by what it is off; keep what is nearest."""
        asked = request.tokens
        best = text, counted
        for attempt in range(MENDING_ROUNDS):
            off = request.tokens - counted
            asked = max(1, round(asked * request.tokens / counted) if not attempt else asked + off)
            text = self._draft(request, asked)
            counted = int(self._counts([text], special=True)[0])
            if abs(counted - request.tokens) < abs(best[1] - request.tokens):
                best = text, counted
            if counted == request.tokens:
                break
        return best

    def _counts(self, texts: Sequence[str], special: bool = False) -> NDArray[np.int64]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=special)
        return np.array([len(each) for each in encoded], np.int64)

    def _counts_within(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Tokens of each text behind other text: some tokenizers put a mark of their own before the first word."""
        before = "a"
        return self._counts([before + text for text in texts]) - self._counts([before])

    def _leading_blank(self) -> int:
        """1 where a text without its leading blank has as many tokens as with it, for every word a text begins with."""
        sample = [f" {self._words[start]}" for start in self._starts[:256]] + [f" {n:03}" for n in range(NUMBERS)]
        return int((self._counts_within(sample) == self._counts([text[1:] for text in sample])).all())
