"""Questions with a known answer, for base and fine-tuned models.

    four_way     which of four summaries belongs to this name: chance is 25%
    arithmetic   "What is 12 + 7?" must be answered by exactly "12 + 7 = 19"
    spelling     "Spell apple" must be answered by exactly "a p p l e"

Everything is drawn from held-out modules, words and operands (`gpt.data.conversations`) by a
seed, so that two models are asked the same questions. Every score comes with the number of
questions and its standard error: sqrt(p (1 - p) / N).
"""

import math
from collections.abc import Iterable, Sequence
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
        ValueError: there are fewer than four pairs.
    """
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


def choice_ids(
    question: FourWay, choice: str, tokenizer: Tokenizer, fine_tuned: bool
) -> tuple[list[int], int]:
    """(ids, number of leading ids that are context) of a name with one of its choices.

    A base model reads the choice as the first sentence of a docstring, after the beginning of the
    object's document as base training saw its like; a fine-tuned one as its own answer to the
    question that fine-tuning asks (<|assistant_end|> is not scored).
    """
    pair = question.pair
    if fine_tuned:
        context = tokenizer.render_for_completion(summary_conversation(pair))
    else:
        head = {"class": "class {}", "function": "def {}()", "module": "module {}"}
        text = head.get(pair.kind, "{}").format(pair.name) + "\n\n"
        context = [tokenizer.bos, *tokenizer.encode(text)]
    return [*context, *tokenizer.encode(choice)], len(context)


@torch.no_grad()
def log_likelihoods(
    model, sequences: Sequence[tuple[list[int], int]], batch_size: int = 32
) -> list[float]:
    """log p(ids[context:] | ids[:context]) in nats of each (ids, context); neither part is empty.

    Sequences are batched by length and padded on the right, which causal attention does not see.
    One that is longer than the model's context loses the beginning of its context, and, where the
    continuation alone is too long, that one's end.
    """
    limit = model.config.max_seq_len + 1
    fitted = []
    for ids, context in sequences:
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
    total = values.view(-1, CHOICES)
    sizes = torch.tensor([[len(c.encode()) for c in q.choices] for q in questions])
    answers = torch.tensor([q.answer for q in questions])
    return {
        **score(_hits(total / sizes, answers), len(questions)),
        "accuracy_total": _hits(total, answers) / len(questions),
        "chance": 1 / CHOICES,
    }


def _hits(values: Tensor, answers: Tensor) -> int:
    """Rows of (N, 4) in which the answer has the largest value; NaN never has."""
    best = values.nan_to_num(nan=-math.inf).max(1)
    return int(((best.indices == answers) & best.values.isfinite()).sum())


def exercises(conversations: Iterable[dict], limit: int) -> dict[str, str]:
    """The first `limit` different questions of endless conversations with their answers (fewer
    where a hundred times `limit` conversations do not hold as many)."""
    found: dict[str, str] = {}
    for conversation in islice(conversations, 100 * limit):
        question, answer = (message["content"] for message in conversation["messages"])
        found.setdefault(question, answer)
        if len(found) == limit:
            break
    return found


def held_out_exercises(name: str, corpus: Corpus, limit: int, seed: int = 0) -> dict[str, str]:
    """Exercises "arithmetic" or "spelling" that fine-tuning has not seen, with their answers."""
    if name == "arithmetic":
        return exercises(arithmetic_conversations("val", seed), limit)
    return exercises(spelling_conversations(common_words(corpus), "val", seed), limit)


def run_exact_match(model, tokenizer: Tokenizer, asked: dict[str, str]) -> dict:
    """The share of questions whose greedy answer is the right one character by character.

    With three examples of question, answer given and answer expected.
    """
    end = tokenizer.special("<|assistant_end|>")
    right, shown = 0, []
    for question, expected in asked.items():
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.render_for_completion({"messages": messages})
        given = None
        if len(prompt) <= model.config.max_seq_len:
            longest = 2 * len(tokenizer.encode(expected)) + 8
            ids = engine.generate(model, prompt, longest, temperature=0.0, stop_tokens=[end])
            given = tokenizer.decode(ids)
        right += given == expected
        shown.append({"question": question, "given": given, "expected": expected})
    return {**score(right, len(asked)), "examples": shown[:3]}


def score(right: int, count: int) -> dict:
    """accuracy, its standard error and the number of questions."""
    share = right / count
    error = math.sqrt(share * (1 - share) / count)
    return {"accuracy": share, "standard_error": error, "questions": count}
