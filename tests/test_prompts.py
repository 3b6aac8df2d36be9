"""Prompts for real users: exact in tokens, distinct from the first ones on, shared only where the workload says so."""

from pathlib import Path

import pytest

from real.users.prompts import CHECKED, SHORTEST_NUMBERED, PromptRequest, PromptWriter, read_corpus, texts_of_classes
from tests.real_fleet import TEXTS, train_marking_tokenizer, train_tokenizer, write_corpus

LENGTHS = [1, 2, 3, 7, 16, 17, 18, 25, 64, 200, 1000]


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return train_tokenizer()


def ids(tokenizer: object, text: str) -> list[int]:
    return list(tokenizer.encode(text).ids)  # type: ignore[attr-defined]


@pytest.mark.parametrize("shared", [0, 1, 20, 100])
def test_every_prompt_has_exactly_the_tokens_asked_for(tokenizer: object, shared: int) -> None:
    writer = PromptWriter(TEXTS["code"], tokenizer, shared_prefix_tokens=shared, nonce=5)
    asked = [PromptRequest(LENGTHS[n % len(LENGTHS)], n, 7 * n) for n in range(4 * CHECKED)]
    for request, prompt in zip(asked, writer.write(asked), strict=True):
        assert prompt.tokens == request.tokens == max(1, len(ids(tokenizer, prompt.text)))


def test_no_two_prompts_begin_with_the_same_block_of_the_prefix_cache(tokenizer: object) -> None:
    writer = PromptWriter(TEXTS["code"], tokenizer, nonce=5)
    same_run = writer.write([PromptRequest(SHORTEST_NUMBERED + n % 9, n, 0) for n in range(2000)])
    later = PromptWriter(TEXTS["code"], tokenizer, nonce=77).write([PromptRequest(40, n, 0) for n in range(200)])
    blocks = [tuple(ids(tokenizer, prompt.text)[:16]) for prompt in [*same_run, *later]]
    assert len(set(blocks)) == len(blocks)


def test_prompts_of_a_class_share_exactly_the_prefix_the_workload_states(tokenizer: object) -> None:
    writer = PromptWriter(TEXTS["chat"], tokenizer, shared_prefix_tokens=40)
    prompts = [ids(tokenizer, each.text) for each in writer.write([PromptRequest(90, n, n) for n in range(50)])]
    assert len({tuple(prompt[:40]) for prompt in prompts}) == 1
    assert len({tuple(prompt[:52]) for prompt in prompts}) == 50


def test_requests_of_a_trace_share_what_their_prefix_number_says(tokenizer: object) -> None:
    writer = PromptWriter(TEXTS["chat"], tokenizer)
    asked = [PromptRequest(60, n, n, (n % 2, 32)) for n in range(10)]
    prompts = [ids(tokenizer, each.text) for each in writer.write(asked)]
    assert [len(prompt) for prompt in prompts] == [60] * 10
    for prefix in range(2):
        assert len({tuple(prompt[:32]) for prompt in prompts[prefix::2]}) == 1
    assert prompts[0][:32] != prompts[1][:32]


def test_the_same_seed_and_nonce_give_the_same_prompts(tokenizer: object) -> None:
    asked = [PromptRequest(50, n, n * n) for n in range(20)]
    one, other = (PromptWriter(TEXTS["code"], tokenizer, nonce=3).write(asked) for _ in range(2))
    assert one == other


def test_a_prompt_is_text_of_its_class(tokenizer: object) -> None:
    prompt = PromptWriter(TEXTS["chat"], tokenizer).write([PromptRequest(100, 1, 2)])[0].text
    words = {word for text in TEXTS["chat"] for word in text.split()}
    assert all(word in words for word in prompt.split()[3:])
    assert TEXTS["chat"][2] in prompt


def test_prompts_are_exact_for_tokenizers_that_mark_the_beginnings_of_words() -> None:
    tokenizer = train_marking_tokenizer()
    asked = [PromptRequest(20 + n % 50, n, n) for n in range(3 * CHECKED)]
    prompts = PromptWriter(TEXTS["code"], tokenizer).write(asked)
    assert [len(ids(tokenizer, prompt.text)) for prompt in prompts] == [request.tokens for request in asked]


def test_where_words_do_not_add_up_prompts_are_counted_and_mended() -> None:
    tokenizer = train_tokenizer(by_words=False)
    writer = PromptWriter(TEXTS["code"], tokenizer)
    asked = [PromptRequest(30 + n % 20, n, n) for n in range(3 * CHECKED)]
    prompts = writer.write(asked)
    assert [prompt.tokens for prompt in prompts] == [len(ids(tokenizer, prompt.text)) for prompt in prompts]
    off = [abs(prompt.tokens - request.tokens) for request, prompt in zip(asked, prompts, strict=True)]
    assert max(off) <= 4
    assert sum(off) / len(off) < 1


def test_a_class_that_the_corpus_lacks_is_named_with_those_it_has(tmp_path: Path) -> None:
    corpus = read_corpus(write_corpus(tmp_path / "prompts.jsonl"))
    with pytest.raises(ValueError, match=r"workload\.classes\.cod: .*did you mean 'code'\?.*one of code, chat"):
        texts_of_classes(corpus, ["chat", "cod"])


def test_a_line_that_is_no_prompt_is_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"class": "code", "text": "a"}\n{"class": "code"}\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2: text is missing"):
        read_corpus(path)
