"""The tokenizer as transformers reads it: the same ids from the same text and conversation."""

import pytest

from molegrad.gpt.data.huggingface import huggingface_tokenizer, save_huggingface
from molegrad.gpt.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from tests.gpt.data.test_tokenizer import SAMPLES, VOCAB

TEXTS = [
    *SAMPLES[:4],
    "it's they'LL  here\n\n\n  x",
    "\r\n \x00",
    "Return the product of 12345678 matrices; naïve? 漢字漢 \n\n  times...\n" * 3,
    "ﬁ \u00a0\u2003 a\u0301 'RE +++///\n\n",
]


@pytest.fixture(scope="module")
def tokenizer():
    text = "Return the product of the matrices; it's 12345 naïve 漢字 \n\n  times.\n"
    return Tokenizer.train((text * 9 + f"word{i}" for i in range(40)), VOCAB)


def test_the_tokenizer_gives_the_same_ids(tokenizer):
    pytest.importorskip("tokenizers")
    theirs = huggingface_tokenizer(tokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert theirs.decode(ids) == text
    assert {name: theirs.token_to_id(name) for name in SPECIAL_TOKENS} == tokenizer.special_tokens
    assert theirs.get_vocab_size() == tokenizer.vocab_size


def test_transformers_renders_a_conversation_as_we_do(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", minversion="5.0")
    save_huggingface(tokenizer, tmp_path, 24)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.model_max_length) == (tokenizer.bos, 24)
    assert theirs.encode(TEXTS[-2]) == tokenizer.encode(TEXTS[-2])
    plain = theirs("a <|bos|> b", split_special_tokens=True)["input_ids"]
    assert plain == tokenizer.encode("a <|bos|> b")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What is\n1 + 1? "},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ]
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == tokenizer.render_for_completion({"messages": messages})
    messages.append({"role": "assistant", "content": "Yes"})
    ids = theirs.apply_chat_template(messages, return_dict=False)
    assert ids == tokenizer.render_conversation({"messages": messages})[0]


def test_without_the_package_nothing_is_written(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert save_huggingface(tokenizer, tmp_path, 24) == [] and not list(tmp_path.iterdir())
    assert "only its ids are portable" in capsys.readouterr().out
