"""Tasks: the questions are fair and repeatable, the scores are right."""

import math

import pytest
import torch

from molegrad.gpt import runs
from molegrad.gpt.data.conversations import (
    SummaryPair,
    arithmetic_conversations,
    summary_pairs,
)
from molegrad.gpt.data.packing import ConversationLoader, render
from molegrad.gpt.evaluate import tasks
from molegrad.gpt.evaluate.tasks import (
    choice_ids,
    exercises,
    four_way_questions,
    log_likelihoods,
    run_exact_match,
    run_four_way,
)
from tests.gpt.model.test_gpt import small, stirred


def pairs(count=40, kinds=("function", "class")):
    return [
        SummaryPair(f"m.name{i}", f"Summary number {i} of it.", "m", kinds[i % len(kinds)])
        for i in range(count)
    ]


class Oracle:
    """A tokenizer stand-in: bytes are ids."""

    bos = 256

    def encode(self, text):
        return list(text.encode())


def learn(model, loader):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        model(*loader.next_batch()).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_questions_are_seeded_and_fair():
    given = pairs(400)
    questions = four_way_questions(given, 300, seed=1)
    assert questions == four_way_questions(given, 300, seed=1)
    assert questions != four_way_questions(given, 300, seed=2)
    assert len({q.pair.name for q in questions}) == 300
    kind = {p.summary: p.kind for p in given}
    for q in questions:
        assert len(set(q.choices)) == 4 and q.choices[q.answer] == q.pair.summary
        assert {kind[c] for c in q.choices} == {q.pair.kind}
    places = [sum(q.answer == i for q in questions) for i in range(4)]
    assert min(places) > 45  # 75 expected, standard deviation 7.5


def test_a_rare_kind_borrows_from_the_others():
    given = [*pairs(6, ("function",)), SummaryPair("m", "The module itself.", "m", "module")]
    by_name = {q.pair.name: q for q in four_way_questions(given, 99)}
    assert len(by_name) == 7 and len(set(by_name["m"].choices)) == 4


def test_too_few_pairs_are_named():
    with pytest.raises(ValueError, match="3 held-out summaries are too few"):
        four_way_questions(pairs(3), 5)


def test_log_likelihoods_equal_those_of_one_sequence_at_a_time():
    model = stirred(small(), std=0.3).eval()
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 12, 7, 25, 9, 4]
    sequences = [
        (torch.randint(0, 61, (n,), generator=generator).tolist(), 1 + n // 3) for n in lengths
    ]
    expected = []
    for ids, context in sequences:
        logp = model(torch.tensor([ids[:-1]])).log_softmax(-1)[0]
        expected.append(sum(logp[i - 1, ids[i]].item() for i in range(context, len(ids))))
    for batch_size in (1, 4, 99):
        assert log_likelihoods(model, sequences, batch_size) == pytest.approx(expected, rel=1e-4)


def test_a_sequence_beyond_the_context_keeps_its_continuation():
    model = stirred(small(), std=0.3).eval()  # 24 tokens: 25 ids
    ids = [(7 * i) % 61 for i in range(40)]
    whole = log_likelihoods(model, [(ids, 30)])
    assert whole == pytest.approx(log_likelihoods(model, [(ids[15:], 15)]), rel=1e-5)
    long = log_likelihoods(model, [(ids, 2)])  # 38 ids to score: one of context, 24 scored
    assert long == pytest.approx(log_likelihoods(model, [(ids[1:26], 1)]), rel=1e-5)


def test_four_way_counts_by_byte_and_in_total(monkeypatch):
    questions = [
        tasks.FourWay(pairs()[0], ("a", "bb", "cccc", "dddddddd"), answer) for answer in (0, 3, 1)
    ]
    # Per byte: -4, -3, -2, -1 each; in total: -4, -6, -8, -8.
    values = [-4.0, -6.0, -8.0, -8.0] * 3
    monkeypatch.setattr(tasks, "log_likelihoods", lambda *a: values)
    result = run_four_way(None, Oracle(), questions, fine_tuned=False)
    assert result["accuracy"] == pytest.approx(1 / 3)  # the second: longest
    assert result["accuracy_total"] == pytest.approx(1 / 3)  # the first: shortest
    assert result["chance"] == 0.25 and result["questions"] == 3
    assert result["standard_error"] == pytest.approx(math.sqrt(2 / 27))


def test_a_model_of_nan_is_never_right(monkeypatch):
    questions = [tasks.FourWay(pairs()[0], ("a", "b", "c", "d"), 0)] * 5
    monkeypatch.setattr(tasks, "log_likelihoods", lambda *a: [math.nan] * 20)
    assert run_four_way(None, Oracle(), questions, False)["accuracy"] == 0


def test_an_untrained_model_is_at_chance(tiny):
    opened = runs.open_stage("tiny", "base")
    corpus = runs.named_corpus({"data": "embedded", "data_max_bytes": 150_000})
    questions = four_way_questions(summary_pairs(corpus, "val"), 500)
    with torch.no_grad():  # same probability for every token: only the number of tokens decides
        opened.model.lm_head.weight.zero_()
    accuracy = run_four_way(opened.model, opened.tokenizer, questions, False)["accuracy"]
    assert abs(accuracy - 0.25) < 4 * math.sqrt(0.1875 / len(questions))


def test_the_name_is_followed_by_the_choice(tiny):
    tokenizer = runs.open_stage("tiny", "sft").tokenizer
    question = four_way_questions(pairs(), 1)[0]
    name = question.pair.name
    begins = (f"<|bos|>def {name}()\n\n", f"<|bos|>class {name}\n\n")
    for fine_tuned in (False, True):
        ids, context = choice_ids(question, question.choices[0], tokenizer, fine_tuned)
        assert tokenizer.decode(ids[context:]) == question.choices[0]
        read = tokenizer.decode(ids[:context])
        assert read.startswith("<|bos|><|user_start|>" if fine_tuned else begins) and name in read
        assert (ids[context - 1] == tokenizer.special("<|assistant_start|>")) == fine_tuned


def test_exercises_are_different_and_held_out():
    found = exercises(arithmetic_conversations("val"), 50)
    assert len(found) == 50
    assert not found.keys() & exercises(arithmetic_conversations("train"), 2000).keys()
    for question, answer in found.items():
        term, value = answer.split(" = ")
        left, sign, right = term.split()
        assert int(value) == (int(left) + int(right) if sign == "+" else int(left) - int(right))
        assert term in question
    once = [{"messages": [{"content": "q"}, {"content": "a"}]}] * 30
    assert exercises(once, 10) == {"q": "a"}


def test_exact_match_is_exact(tiny, monkeypatch):
    opened = runs.open_stage("tiny", "sft")
    said = iter(["12 + 7 = 19", "12 + 7 = 19.", ""])

    def speak(model, prompt, *args, **kwargs):
        assert kwargs["temperature"] == 0.0
        return iter(opened.tokenizer.encode(next(said)))

    monkeypatch.setattr(tasks.engine, "generate", speak)
    asked = {f"What is {i}?": "12 + 7 = 19" for i in range(3)}
    result = run_exact_match(opened.model, opened.tokenizer, asked)
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert [e["given"] for e in result["examples"]] == ["12 + 7 = 19", "12 + 7 = 19.", ""]


def test_a_question_that_does_not_fit_is_wrong(tiny):
    opened = runs.open_stage("tiny", "sft")
    result = run_exact_match(opened.model, opened.tokenizer, {"word " * 80: "x"})
    assert result["accuracy"] == 0 and result["examples"][0]["given"] is None


def test_a_model_that_knows_the_summaries_chooses_them(tiny):
    opened = runs.open_stage("tiny", "base")
    model, tokenizer = opened.model.train(), opened.tokenizer
    words = ["add", "sort", "open", "close", "read", "write", "find", "drop", "join", "split"]
    known = [SummaryPair(w, f"Will {w} the {w}able {w}s.", "m", "function") for w in words]
    questions = four_way_questions(known, 10)
    right = [choice_ids(q, q.choices[q.answer], tokenizer, False) for q in questions]
    rendered = [(ids, [0] * context + [1] * (len(ids) - context)) for ids, context in right]
    learn(model, ConversationLoader(rendered, 5, 64, tokenizer.bos))
    result = run_four_way(model.eval(), tokenizer, questions, False)
    assert result["accuracy"] == result["accuracy_total"] == 1


def test_a_model_that_learnt_the_answers_gives_them(tiny):
    """Greedy generation and the chat format are the ones of fine-tuning."""
    opened = runs.open_stage("tiny", "sft")
    model, tokenizer = opened.model.train(), opened.tokenizer
    asked = {"Spell cat": "c a t", "1 + 2 = ?": "1 + 2 = 3"}
    roles = ("user", "assistant")
    talks = [
        {"messages": [{"role": r, "content": c} for r, c in zip(roles, pair, strict=True)]}
        for pair in asked.items()
    ]
    learn(model, ConversationLoader(render(talks, tokenizer, 64), 1, 64, tokenizer.bos))
    assert run_exact_match(model.eval(), tokenizer, asked)["accuracy"] == 1
