import json
import logging
from collections import Counter
from itertools import islice

import pytest

from molegrad.gpt.data import conversations as conv
from molegrad.gpt.data.conversations import conversation_mixture, first_sentence, summary_pairs
from molegrad.gpt.data.corpus import Corpus, open_corpus
from molegrad.gpt.data.sources import Part

WORDS = ["apple", "basket", "candle", "dragon", "ember", "forest", "garden", "hammer", "island"]
MANY = [a + b for a in WORDS for b in WORDS]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (Part(path, "jsonl", 0, path.stat().st_size),)


def record(module, name, doc):
    return module, f"{module}.{name}", "function", f"def {module}.{name}(x)", doc


@pytest.fixture
def corpus(tmp_path):
    train = [
        record("a", f"f{i}", f"Compute the {a} of a {b}.\n\nMore about the {a}.")
        for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS)
    ]
    train += [
        record("a", "twin1", "The same sentence for two objects."),
        record("a", "twin2", "The same sentence for two objects."),
        record("a", "leak", "A sentence that is also held out."),
        record("a", "__init__", "The constructor of something big."),
    ]
    val = [
        record("b", "g", "A sentence that is also held out."),
        record("b", "h", "Only the validation split says this."),
    ]
    return Corpus(write(tmp_path / "t", train), write(tmp_path / "v", val), {})


@pytest.mark.parametrize(
    ("doc", "sentence"),
    [
        ("Return the sum. And more.", "Return the sum."),
        ("Return the\n  sum of all things\n\nMore.", "Return the sum of all things"),
        ("abs(input, *, out=None) -> Tensor\n\nComputes the value.", "Computes the value."),
        ("Uses a cache, e.g. of files. Then more.", "Uses a cache, e.g. of files."),
        ("See :func:`~torch.abs` and ``x`` there.", "See torch.abs and x there."),
        ("Takes version 1.2 of it. Done.", "Takes version 1.2 of it."),
        (">>> f(1)\n2", ""),
        ("Short.", ""),
        ("1 2 3 4 5 6 7 8 9 = % $ # 10 11 12 13", ""),
        ("word " * 60, ""),
        ("", ""),
    ],
)
def test_first_sentence(doc, sentence):
    assert first_sentence(doc) == sentence


def test_summary_pairs_are_unambiguous_and_disjoint(corpus):
    train, val = summary_pairs(corpus, "train"), summary_pairs(corpus, "val")
    assert len(train) == len(WORDS) ** 2
    assert [pair.name for pair in val] == ["b.g", "b.h"]
    assert not {p.summary for p in train} & {p.summary for p in val}
    assert train[0] == conv.SummaryPair("a.f0", "Compute the apple of a apple.", "a", "function")


def test_plain_text_has_no_summaries(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("Some text here.\n\nMore of the text.\n\n" * 50)
    assert summary_pairs(open_corpus(str(path)), "train") == []


def test_summary_conversation():
    pair = conv.SummaryPair("m.f", "Does it.", "m", "function")
    conversation = conv.summary_conversation(pair)
    question, answer = conversation["messages"]
    assert "m.f" in question["content"] and answer == {"role": "assistant", "content": "Does it."}
    assert conversation == conv.summary_conversation(pair)


def test_spelling():
    train = list(islice(conv.spelling_conversations(MANY, "train", 1), 300))
    val = list(islice(conv.spelling_conversations(MANY, "val", 1), 300))
    for conversation in train + val:
        question, answer = (m["content"] for m in conversation["messages"])
        assert answer.replace(" ", "") in question and " " in answer
    spelled = [{c["messages"][1]["content"] for c in part} for part in (train, val)]
    assert len(spelled[0]) > len(spelled[1]) > 0 and not spelled[0] & spelled[1]
    assert train == list(islice(conv.spelling_conversations(MANY, "train", 1), 300))
    with pytest.raises(ValueError, match="no words for the val split among 0"):
        next(conv.spelling_conversations([], "val"))


def operands(conversation):
    term = conversation["messages"][1]["content"].partition(" = ")[0]
    left, sign, right = term.split()
    return int(left), sign, int(right)


def test_arithmetic_is_right_and_splits_are_disjoint():
    pairs = {}
    for split in ("train", "val"):
        stream = conv.arithmetic_conversations(split, seed=4)
        items = list(islice(stream, 2000))
        for conversation in items:
            left, sign, right = operands(conversation)
            value = left + right if sign == "+" else left - right
            assert value >= 0 and 0 <= left < 100 and 0 <= right < 100
            assert conversation["messages"][1]["content"] == f"{left} {sign} {right} = {value}"
            assert f"{left} {sign} {right}" in conversation["messages"][0]["content"]
        pairs[split] = {tuple(sorted(operands(c)[::2])) for c in items}
        assert {operands(c)[1] for c in items} == {"+", "-"}
    assert not pairs["train"] & pairs["val"] and len(pairs["val"]) > 200


def test_chatter_of_a_folder(tmp_path):
    long = "\n".join(f"  - turn {i}" for i in range(31)).replace("  -", "- -", 1)
    (tmp_path / "a.yml").write_text(
        "categories:\n- x\nconversations:\n"
        + "".join(f"- - Question {i}?\n  - Answer   {i}\n" for i in range(60))
        + "- - Question 1?\n  - Another answer\n- - Question 2?\n  - Answer 2\n"
        + "- - Alone\n- - three\n  - of\n  - them\n- - Number\n  - 42\n"
        + long
        + "\n"
    )
    (tmp_path / "empty.yml").write_text("")
    found = {split: conv.read_chatter(tmp_path, split) for split in ("train", "val")}
    every = found["train"] + found["val"]
    assert len(every) == 64
    first = {s: {c["messages"][0]["content"] for c in found[s]} for s in found}
    assert first["train"] and first["val"] and not first["train"] & first["val"]
    for conversation in every:
        roles = [message["role"] for message in conversation["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(roles) <= conv.MAX_MESSAGES
    answers = {c["messages"][1]["content"] for c in every}
    assert {"Answer 5", "Another answer", "42", "of"} <= answers


def test_chatter_of_the_installed_package():
    pytest.importorskip("chatterbot_corpus")
    train, val = conv.chatter_conversations("train"), conv.chatter_conversations("val")
    assert len(train) + len(val) > 800 and len(train) > 5 * len(val) > 0


def test_chatter_without_the_package(monkeypatch, caplog):
    monkeypatch.setattr(conv.importlib.util, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert conv.chatter_conversations("train") == []
    assert "pip install chatterbot-corpus" in caplog.text


def test_mixture_follows_seed_and_weights(corpus):
    weights = {"summary": 3, "arithmetic": 1}
    mixture = conversation_mixture(corpus, "train", 800, seed=1, weights=weights)
    assert mixture == conversation_mixture(corpus, "train", 800, seed=1, weights=weights)
    assert mixture != conversation_mixture(corpus, "train", 800, seed=2, weights=weights)
    counts = Counter(conversation["source"] for conversation in mixture)
    assert counts.keys() == {"summary", "arithmetic"} and 540 < counts["summary"] < 660
    questions = Counter(c["messages"][0]["content"] for c in mixture if c["source"] == "summary")
    assert len(questions) == len(WORDS) ** 2, "a finite source goes round before it repeats"
    assert max(questions.values()) - min(questions.values()) <= 1
    json.dumps(mixture)


def test_mixtures_of_the_splits_are_disjoint(corpus):
    weights = {"summary": 1, "arithmetic": 1, "chatter": 1}
    both = [conversation_mixture(corpus, s, 600, weights=weights) for s in ("train", "val")]
    asked = [{c["messages"][0]["content"] for c in part} for part in both]
    assert not asked[0] & asked[1]
    with pytest.raises(ValueError, match="'test' is not one of"):
        conversation_mixture(corpus, "test", 5)


@pytest.mark.parametrize(
    ("source", "maker"), [("chatter", "chatter_conversations"), ("spelling", "common_words")]
)
def test_a_source_without_conversations_is_left_out(source, maker, corpus, monkeypatch, caplog):
    monkeypatch.setattr(conv, maker, lambda of: [])
    with caplog.at_level(logging.WARNING):
        mixture = conversation_mixture(corpus, "train", 50, weights={source: 9, "summary": 1})
    assert {c["source"] for c in mixture} == {"summary"} and repr(source) in caplog.text
    with pytest.raises(ValueError, match="leave no source"):
        conversation_mixture(corpus, "train", 50, weights={source: 1})
