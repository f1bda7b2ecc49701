import json

import numpy as np
import pytest
import torch

from molegrad.gpt.data.tokenizer import FILE, SPECIAL_TOKENS, Tokenizer

TEXT = "Return the product of the matrices; raise ValueError if n = 1234 differs.\n" * 50
VOCAB = 320


@pytest.fixture(scope="module")
def tokenizer():
    words = [f"{TEXT} number {i} and word{i * 7} in the text" for i in range(40)]
    return Tokenizer.train(iter(words), VOCAB)


SAMPLES = ["", "plain text", "naïve 漢字 😀\n\n\ttab", "1234567", "it's  <|bos|> here", "\r\n \x00"]


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < VOCAB - len(SPECIAL_TOKENS) for i in ids), "text gave a special token"


def test_arrays_agree_with_lists(tokenizer):
    expected = [tokenizer.encode(text) for text in SAMPLES]
    arrays = tokenizer.encode_arrays(SAMPLES)
    assert [array.tolist() for array in arrays] == expected
    assert {array.dtype for array in arrays} == {np.dtype(np.uint32)}


def test_it_compresses_what_it_has_seen(tokenizer):
    assert len(tokenizer.encode(TEXT)) < len(TEXT) / 2


def test_numbers_are_split_in_twos(tokenizer):
    assert all(len(tokenizer.decode([i])) <= 2 for i in tokenizer.encode("123456789"))


def test_ids_and_token_bytes(tokenizer):
    assert tokenizer.vocab_size == VOCAB
    assert [tokenizer.special(name) for name in SPECIAL_TOKENS] == list(range(VOCAB - 9, VOCAB))
    assert tokenizer.bos == tokenizer.special("<|bos|>")
    lengths = tokenizer.token_bytes()
    assert lengths.shape == (VOCAB,) and lengths.dtype == torch.int64
    assert lengths[-9:].eq(0).all() and lengths[:-9].min() >= 1
    ids = tokenizer.encode(SAMPLES[2])
    assert int(lengths[ids].sum()) == len(SAMPLES[2].encode())


def test_save_and_load(tokenizer, tmp_path):
    path = tokenizer.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    assert path.name == FILE and json.loads(path.read_text())["special_tokens"]
    assert [p.name for p in path.parent.iterdir()] == [FILE]
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
    assert loaded.special_tokens == tokenizer.special_tokens


def test_load_errors(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="scripts.tok_train"):
        Tokenizer.load(tmp_path)
    path = tokenizer.save(tmp_path)
    good = json.loads(path.read_text())
    bad = ["", "[]", "{}", json.dumps({**good, "format": "other"})]
    bad.append(json.dumps({**good, "special_tokens": ["<|bos|>"]}))
    bad.append(json.dumps({**good, "mergeable_ranks": ["!"]}))
    for text in bad:
        path.write_text(text)
        with pytest.raises(ValueError, match="is not a tokenizer file"):
            Tokenizer.load(tmp_path)


def test_fingerprint_depends_on_the_merges(tokenizer):
    other = Tokenizer.train(iter(["quite different words " * 100]), 270)
    assert other.fingerprint != tokenizer.fingerprint


def test_without_merges_every_byte_is_a_token():
    bytewise = Tokenizer.train(iter([TEXT]), 265)
    assert bytewise.vocab_size == 265 and len(bytewise.encode(TEXT)) == len(TEXT.encode())
    assert bytewise.decode(bytewise.encode(TEXT)) == TEXT
    assert bytewise.fingerprint == Tokenizer.train(iter(["other"]), 265).fingerprint


@pytest.mark.parametrize("size", [0, 256, 264])
def test_vocabulary_too_small(size):
    with pytest.raises(ValueError, match=f"vocab_size={size} is too small.*need 265"):
        Tokenizer.train(iter([TEXT]), size)


def test_too_little_text():
    with pytest.raises(ValueError, match="text is empty"):
        Tokenizer.train(iter([]), 300)
    with pytest.warns(UserWarning, match="vocabulary of .*, not 5000"):
        assert Tokenizer.train(iter(["abc abc"]), 5000).vocab_size < 300


def test_unknown_ids_and_names(tokenizer):
    with pytest.raises(ValueError, match="'<.nothing.>' is unknown"):
        tokenizer.special("<|nothing|>")
    with pytest.raises(ValueError, match=f"token id {VOCAB} is not in 0 .. {VOCAB - 1}"):
        tokenizer.decode([VOCAB])
    with pytest.raises(ValueError, match="token id -1"):
        tokenizer.decode([-1])


def user(text):
    return {"role": "user", "content": text}


def assistant(content):
    return {"role": "assistant", "content": content}


def test_conversation_ids_and_mask(tokenizer):
    ids, mask = tokenizer.render_conversation({"messages": [user("Hi"), assistant("Hello you")]})
    assert tokenizer.decode(ids) == (
        "<|bos|><|user_start|>Hi<|user_end|><|assistant_start|>Hello you<|assistant_end|>"
    )
    produced = [i for i, m in zip(ids, mask, strict=True) if m]
    assert tokenizer.decode(produced) == "Hello you<|assistant_end|>"


def test_system_message_joins_the_user(tokenizer):
    conversation = {"messages": [{"role": "system", "content": "Be brief."}, user("Hi")]}
    ids, mask = tokenizer.render_conversation(conversation)
    assert tokenizer.decode(ids) == "<|bos|><|user_start|>Be brief.\n\nHi<|user_end|>"
    assert not any(mask) and len(conversation["messages"]) == 2


def test_truncation(tokenizer):
    conversation = {"messages": [user("Hi"), assistant("Hello " * 50)]}
    full, full_mask = tokenizer.render_conversation(conversation)
    ids, mask = tokenizer.render_conversation(conversation, max_tokens=20)
    assert ids == full[:20] and mask == full_mask[:20]


def test_completion_prompt_is_a_prefix_of_the_training_example(tokenizer):
    conversation = {"messages": [user("Hi"), assistant("Hello")]}
    ids, mask = tokenizer.render_conversation(conversation)
    prompt = tokenizer.render_for_completion(conversation)
    assert prompt == ids[: mask.index(1)]
    assert tokenizer.render_for_completion({"messages": [user("Hi")]}) == prompt


@pytest.mark.parametrize(
    "messages", [[assistant("x")], [user("x"), user("y")], [{"role": "system", "content": "x"}]]
)
def test_roles_out_of_turn(tokenizer, messages):
    with pytest.raises(ValueError, match="message .* is from .*, expected"):
        tokenizer.render_conversation({"messages": messages})
