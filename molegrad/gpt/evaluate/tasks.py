"""Questions with a known answer, for base and fine-tuned models.

    four_way     which of four summaries belongs to this name: chance is 25%
    arithmetic   "What is 12 + 7?" must be answered by exactly "12 + 7 = 19"
    spelling     "Spell apple" must be answered by exactly "a p p l e"

Everything is drawn from held-out modules, words and operands (`gpt.data.conversations`) by a
seed, so that two models are asked the same questions. Every score comes with the number of
questions and its standard error: sqrt(p (1 - p) / N).
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from molegrad.gpt.data.conversations import (
    SummaryPair,
    arithmetic_conversations,
    common_words,
    spelling_conversations,
    summary_conversation,
    summary_pairs,
)
from molegrad.gpt.data.corpus import Corpus
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.model import engine

CHOICES = 4


@dataclass(frozen=True)
class FourWay:
    """A name, four summaries, and which of them is its own."""

    pair: SummaryPair
    choices: tuple[str, ...]
    answer: int


def four_way_questions(pairs: Sequence[SummaryPair], limit: int, seed: int = 0) -> list[FourWay]:
    """At most `limit` questions on `pairs`, in a seeded order.

    The three wrong summaries are those of other objects of the same kind (class, function,
    module) where there are enough, so that the kind gives nothing away; the place of the right one
    is drawn uniformly.

    Raises:
        ValueError: there are fewer than four pairs, or limit < 1.
    """
    if limit < 1:
        raise ValueError(f"limit={limit} must be >= 1")
    if len(pairs) < CHOICES:
        raise ValueError(
            f"{len(pairs)} held-out summaries are too few for questions of {CHOICES} choices: use "
            "a larger corpus (--data-max-bytes=0)"
        )
    rng = np.random.default_rng([seed, 3])
    by_kind: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        by_kind.setdefault(pair.kind, []).append(i)
    questions = []
    for i in rng.permutation(len(pairs))[:limit]:
        same = by_kind[pairs[i].kind]
        pool = [j for j in (same if len(same) >= CHOICES else range(len(pairs))) if j != i]
        wrong = rng.choice(pool, CHOICES - 1, replace=False)
        answer = int(rng.integers(CHOICES))
        texts = [pairs[j].summary for j in wrong]
        texts.insert(answer, pairs[i].summary)
        questions.append(FourWay(pairs[i], tuple(texts), answer))
    return questions


def document_prompt(pair: SummaryPair) -> str:
    """The beginning of the object's document as base training saw its like."""
    head = {"class": "class {}", "function": "def {}()", "module": "module {}"}
    return head.get(pair.kind, "{}").format(pair.name) + "\n\n"


def choice_ids(
    question: FourWay, choice: str, tokenizer: Tokenizer, fine_tuned: bool
) -> tuple[list[int], int]:
    """(ids, number of leading ids that are context) of a name with one of its choices.

    A base model reads the choice as the first sentence of a docstring; a fine-tuned one as its own
    answer to the question that fine-tuning asks (<|assistant_end|> is not scored).
    """
    if fine_tuned:
        conversation = {"messages": summary_conversation(question.pair)["messages"]}
        context = tokenizer.render_for_completion(conversation)
    else:
        context = [tokenizer.bos, *tokenizer.encode(document_prompt(question.pair))]
    return [*context, *tokenizer.encode(choice)], len(context)


@torch.no_grad()
def log_likelihoods(
    model, sequences: Sequence[tuple[list[int], int]], batch_size: int = 32
) -> list[float]:
    """log p(ids[context:] | ids[:context]) in nats of each (ids, context).

    Sequences are batched by length and padded on the right, which causal attention does not see.
    One that is longer than the model's context loses the beginning of its context, and, where the
    continuation alone is too long, that one's end.

    Raises:
        ValueError: a continuation is empty or has no context to follow.
    """
    limit = model.config.max_seq_len + 1
    fitted = []
    for ids, context in sequences:
        if not 0 < context < len(ids):
            raise ValueError(
                f"a sequence of {len(ids)} ids with {context} of context: both parts need one"
            )
        cut = min(max(0, len(ids) - limit), context - 1)
        fitted.append((ids[cut:][:limit], context - cut))
    result = [0.0] * len(fitted)
    order = sorted(range(len(fitted)), key=lambda i: len(fitted[i][0]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        longest = len(fitted[part[-1]][0])
        tokens = torch.zeros(len(part), longest, dtype=torch.int64)
        targets = torch.full((len(part), longest), -1, dtype=torch.int64)
        for row, i in enumerate(part):
            ids, context = fitted[i]
            tokens[row, : len(ids)] = torch.tensor(ids)
            targets[row, context : len(ids)] = tokens[row, context : len(ids)]
        inputs, targets = tokens[:, :-1].to(model.device), targets[:, 1:].to(model.device)
        nats = model(inputs, targets, loss_reduction="none").double().sum(1)
        for i, value in zip(part, nats.tolist(), strict=True):
            result[i] = -value
    return result


def run_four_way(
    model,
    tokenizer: Tokenizer,
    questions: Sequence[FourWay],
    fine_tuned: bool,
    batch_size: int = 32,
) -> dict:
    """The share of questions in which the right summary is the likeliest.

    By log-likelihood per byte ("accuracy", so that length does not decide) and in total
    ("accuracy_total").
    """
    sequences = [
        choice_ids(question, choice, tokenizer, fine_tuned)
        for question in questions
        for choice in question.choices
    ]
    values = torch.tensor(log_likelihoods(model, sequences, batch_size), dtype=torch.float64)
    sizes = torch.tensor([[len(c.encode()) for c in q.choices] for q in questions])
    total = values.view(-1, CHOICES)
    answers = torch.tensor([q.answer for q in questions])
    right = _hits(total / sizes, answers)
    right_total = _hits(total, answers)
    return {
        **score(right, len(questions)),
        "accuracy_total": right_total / len(questions),
        "chance": 1 / CHOICES,
    }


def _hits(values: Tensor, answers: Tensor) -> int:
    """Rows of (N, 4) in which the answer has the largest value; NaN never has."""
    best = values.nan_to_num(nan=-math.inf).max(1)
    return int(((best.indices == answers) & best.values.isfinite()).sum())


@dataclass(frozen=True)
class Exercise:
    """A question whose one right answer is known."""

    question: str
    answer: str


def exercises(conversations: Iterable[dict], limit: int) -> list[Exercise]:
    """The first `limit` different questions of endless conversations (fewer where a hundred
    times `limit` conversations do not hold as many)."""
    if limit < 1:
        raise ValueError(f"limit={limit} must be >= 1")
    found: dict[str, str] = {}
    for conversation in islice(conversations, 100 * limit):
        question, answer = (message["content"] for message in conversation["messages"])
        found.setdefault(question, answer)
        if len(found) == limit:
            break
    return [Exercise(*item) for item in found.items()]


def run_exact_match(model, tokenizer: Tokenizer, asked: Sequence[Exercise]) -> dict:
    """The share of questions whose greedy answer is the right one character by character.

    With three examples of question, answer given and answer expected.
    """
    end = tokenizer.special("<|assistant_end|>")
    right, shown = 0, []
    for exercise in asked:
        messages = [{"role": "user", "content": exercise.question}]
        prompt = tokenizer.render_for_completion({"messages": messages})
        if len(prompt) > model.config.max_seq_len:
            given = None
        else:
            longest = 2 * len(tokenizer.encode(exercise.answer)) + 8
            ids = engine.generate(model, prompt, longest, temperature=0.0, stop_tokens=[end])
            given = tokenizer.decode(ids)
        right += given == exercise.answer
        if len(shown) < 3:
            shown.append(
                {"question": exercise.question, "given": given, "expected": exercise.answer}
            )
    return {**score(right, len(asked)), "examples": shown}


def score(right: int, count: int) -> dict:
    """accuracy, its standard error and the number of questions."""
    share = right / count
    error = math.sqrt(share * (1 - share) / count)
    return {"accuracy": share, "standard_error": error, "questions": count}


def held_out_exercises(name: str, corpus: Corpus, limit: int, seed: int = 0) -> list[Exercise]:
    """Exercises "arithmetic" or "spelling" that fine-tuning has not seen."""
    sources: dict[str, Callable[[], Iterator[dict]]] = {
        "arithmetic": lambda: arithmetic_conversations("val", seed),
        "spelling": lambda: spelling_conversations(common_words(corpus), "val", seed),
    }
    if name not in sources:
        raise ValueError(f"exercise {name!r} is not one of {', '.join(sources)}")
    return exercises(sources[name](), limit)


def held_out_four_way(corpus: Corpus, limit: int, seed: int = 0) -> list[FourWay]:
    """Four-way questions on the corpus' held-out modules."""
    return four_way_questions(summary_pairs(corpus, "val"), limit, seed)
