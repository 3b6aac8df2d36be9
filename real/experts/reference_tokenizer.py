"""A byte-level BPE tokenizer in Llama 3's manner, trained offline, for reference models of any vocabulary size.

The text is what every installation has: the project's prompt corpus and the Python language reference and docstrings
that come with the interpreter. Equal text gives equal bytes. Where it yields fewer tokens than the vocabulary has,
reserved ones fill it up, so that the embedding and the LM head have the true shape.
"""

import ast
import hashlib
import importlib.util
import json
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from real.router.labelled_prompts import read_packaged_prompts

# Llama 3's last 256 tokens, in its order; the rest of them are reserved.
_NAMED_SPECIAL_TOKENS = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    4: "<|finetune_right_pad_id|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    8: "<|eom_id|>",
    9: "<|eot_id|>",
    10: "<|python_tag|>",
}
_SPECIAL_TOKENS = 256

BEGIN_OF_TEXT, END_OF_TEXT, END_OF_TURN = (_NAMED_SPECIAL_TOKENS[place] for place in (0, 1, 9))

# How text is cut before merging: Llama 3's expression (words, up to three digits, punctuation, white space).
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim }}{{- '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
"""Llama 3's: each message between headers, then the assistant's header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceTokenizer:
    """A trained tokenizer.

    Attributes:
        text: ``tokenizer.json``.
        vocab_size: tokens in all.
        learned_tokens: bytes and merges that the text yielded; the others are reserved.
        text_sha256: of the text it was trained on.
        special_ids: the special tokens' ids, by name.
    """

    text: str
    vocab_size: int
    learned_tokens: int
    text_sha256: str
    special_ids: dict[str, int]


@cache  # a fleet's experts mostly have one vocabulary
def train_tokenizer(vocab_size: int) -> ReferenceTokenizer:
    """Train a tokenizer of exactly this many tokens.

    Raises:
        ValueError: too few for the bytes and the special tokens.
        ModuleNotFoundError: the ``tokenizers`` package is missing.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    smallest = 256 + _SPECIAL_TOKENS
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be >= {smallest} (256 bytes, {_SPECIAL_TOKENS} special), got {vocab_size}")
    ordinary = vocab_size - _SPECIAL_TOKENS
    texts = training_texts()
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.pre_tokenizer = split
    trainer = trainers.BpeTrainer(
        vocab_size=ordinary,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = tokenizer.get_vocab_size()
    tokenizer = Tokenizer(models.BPE(*_padded(tokenizer.to_str(), ordinary)))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    names = special_tokens()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    special_ids = {name: ordinary + place for place, name in enumerate(names)}
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BEGIN_OF_TEXT} $A",
                pair=f"{BEGIN_OF_TEXT} $A {BEGIN_OF_TEXT}:1 $B:1",
                special_tokens=[(BEGIN_OF_TEXT, special_ids[BEGIN_OF_TEXT])],
            ),
        ]
    )
    return ReferenceTokenizer(
        text=tokenizer.to_str(pretty=True) + "\n",
        vocab_size=tokenizer.get_vocab_size(),
        learned_tokens=learned,
        text_sha256=hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        special_ids=special_ids,
    )


def special_tokens() -> list[str]:
    """Return Llama 3's 256 special tokens in their order."""
    names: list[str] = []
    for place in range(_SPECIAL_TOKENS):
        reserved = sum(name.startswith("<|reserved") for name in names)
        names.append(_NAMED_SPECIAL_TOKENS.get(place, f"<|reserved_special_token_{reserved}|>"))
    return names


@cache
def training_texts() -> tuple[str, ...]:
    """Return the texts a tokenizer is trained on: prompts, the language reference, docstrings of the library."""
    return (*read_packaged_prompts().texts, *_language_reference(), *_docstrings())


def _language_reference() -> list[str]:
    """The chapters that ``help("topics")`` shows; some builds of Python leave them out."""
    if importlib.util.find_spec("pydoc_data") is None:
        return []
    from pydoc_data.topics import topics

    return [text for _, text in sorted(topics.items())]


def _docstrings() -> list[str]:
    """The docstrings of the standard library's top-level modules, read from their source, never imported."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        try:
            tree = ast.parse(path.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    found.append(text)
    return found


def _padded(trained: str, size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The trained vocabulary and merges, the vocabulary filled up with tokens that no text is cut into."""
    model = json.loads(trained)["model"]
    vocabulary: dict[str, int] = model["vocab"]
    merges = [(first, second) for first, second in model["merges"]]
    for number in range(len(vocabulary), size):
        vocabulary[f"<|unused_{number}|>"] = number
    return vocabulary, merges
