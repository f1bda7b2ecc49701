"""Chat: streamed characters, the conversation's state, overflow, interrupts, the command."""

import re

import pytest
import torch

from molegrad.gpt import runs as stages
from molegrad.gpt.chat.terminal import (
    Chat,
    ChatConfig,
    PromptTooLong,
    chat_cli,
    main,
    stream_text,
)
from molegrad.gpt.data.tokenizer import Tokenizer
from molegrad.gpt.model import engine
from molegrad.gpt.model.engine import answer


@pytest.fixture(scope="module")
def opened(tiny_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLEGRAD_HOME", str(tiny_folder))
        return {stage: stages.open_stage("tiny", stage) for stage in ("base", "sft")}


def talk(opened, stage="sft", **options):
    o = opened[stage]
    settings = {"max_new_tokens": 8, "notice": lambda line: None, **options}
    return Chat(o.model, o.tokenizer, stage == "sft", **settings)


def terminal(*lines):
    """(read, write, what was written): the lines are typed, then the input ends."""
    typed, written = list(lines), []

    def read(prompt):
        written.append(prompt)
        if not typed:
            raise EOFError
        line = typed.pop(0)
        if isinstance(line, BaseException):
            raise line
        return line

    return read, written.append, written


def test_characters_spread_over_tokens_come_whole():
    tokenizer = Tokenizer.train(["aa bb"] * 3, 266)
    text = "naïve 東京 🙂!"
    tokens = [b for b in text.encode()]  # ids below 256 are bytes, in some order
    single = {tokenizer.decode_bytes([i]): i for i in range(256)}
    tokens = [single[bytes([b])] for b in tokens]
    pieces = list(stream_text(tokens, tokenizer))
    assert pieces == list(text)
    assert list(stream_text(tokens[:-3], tokenizer))[-1] == "\ufffd"  # a cut emoji
    wrong = [single[b"\xff"], single[b"a"]]
    assert "".join(stream_text(wrong, tokenizer)) == "\ufffda"


def test_pieces_are_given_as_they_are_made(opened, monkeypatch):
    made = []
    real = engine.generate

    def counting(*args, **kwargs):
        for token in real(*args, **kwargs):
            made.append(token)
            yield token

    monkeypatch.setattr(engine, "generate", counting)
    pieces = talk(opened, temperature=1.0).reply("hello")
    next(pieces)
    first = len(made)
    next(pieces)
    assert 0 < first < len(made) <= first + 4


def test_the_conversation_is_remembered_and_cleared(opened):
    chat = talk(opened)
    said = ["".join(chat.reply(text)) for text in ("one", "two")]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in chat.messages] == ["one", said[0], "two", said[1]]
    chat.clear()
    assert chat.messages == []
    assert "".join(chat.reply("one")) == said[0]  # the seeds begin anew


def test_the_model_sees_the_earlier_turns(opened, monkeypatch):
    seen = []
    monkeypatch.setattr(engine, "generate", lambda model, ids, *a: seen.append(ids) or iter(()))
    chat, tokenizer = talk(opened), opened["sft"].tokenizer
    list(chat.reply("one"))
    list(chat.reply("two"))
    messages = [("user", "one"), ("assistant", ""), ("user", "two")]
    messages = [{"role": r, "content": c} for r, c in messages]
    assert seen[1] == tokenizer.render_for_completion({"messages": messages})


def test_seeds_and_temperature(opened):
    def once(**options):
        return "".join(talk(opened, max_new_tokens=20, **options).reply("hello there"))

    assert once(seed=1, temperature=1.0) == once(seed=1, temperature=1.0)
    assert len({once(seed=s, temperature=1.5, top_k=0) for s in range(5)}) > 1
    greedy = {once(seed=s, temperature=0.0) for s in range(3)}
    o = opened["sft"]
    assert greedy == {answer(o.model, o.tokenizer, "hello there", max_tokens=20)}


def test_the_oldest_turns_are_dropped_and_it_is_said_once(opened):
    notices = []
    chat = talk(opened, notice=notices.append)
    texts = [f"message number {i} of the talk" for i in range(8)]
    for text in texts:
        list(chat.reply(text))
    assert len(notices) == 1 and "context of 64 tokens" in notices[0]
    kept = [m["content"] for m in chat.messages if m["role"] == "user"]
    assert kept == texts[-len(kept) :] and 1 <= len(kept) < 8
    assert chat.messages[0]["role"] == "user"


@pytest.mark.parametrize("stage", ["base", "sft"])
def test_a_message_that_does_not_fit_changes_nothing(opened, stage):
    chat = talk(opened, stage)
    list(chat.reply("hello"))
    before = list(chat.messages)
    with pytest.raises(PromptTooLong, match="this message has .* shorten it"):
        list(chat.reply("word " * 80))
    assert chat.messages == before


def test_a_closed_answer_counts_as_said(opened):
    chat = talk(opened, temperature=1.0)
    pieces = chat.reply("hello")
    first = next(pieces)
    pieces.close()
    assert chat.messages[1]["content"] == first


def test_a_base_model_continues_text(opened):
    chat = talk(opened, "base", temperature=0.0)
    o = opened["base"]
    ids = [o.tokenizer.bos, *o.tokenizer.encode("Return the")]
    stop = o.tokenizer.special_tokens.values()
    expected = o.tokenizer.decode(engine.generate(o.model, ids, 8, 0.0, stop_tokens=stop))
    assert "".join(chat.reply("Return the")) == expected and chat.messages == []


def test_a_conversation_in_the_terminal(tiny):
    read, write, written = terminal("hello", "", "/clear", "/help", "again", "/quit", "never")
    assert chat_cli(ChatConfig(run="tiny", max_new_tokens=5), read, write) == 0
    text = "".join(written)
    assert text.startswith("tiny/sft step 200 on CPU")
    assert text.count("model> ") == 2 and "forgotten" in text and "there is no /help" in text
    assert "base model" not in text and text.count("you> ") == 6


def test_ctrl_c_stops_the_answer_and_not_the_program(tiny, monkeypatch):
    def interrupted(model, prompt, *options):
        yield prompt[-2]
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "generate", interrupted)
    read, write, written = terminal("hello", KeyboardInterrupt(), "more", "/quit")
    assert chat_cli(ChatConfig(run="tiny"), read, write) == 0
    text = "".join(written)
    assert text.count("(stopped)") == 2 and "(/quit leaves)" in text


def test_a_too_long_message_is_told_in_the_terminal(tiny):
    read, write, written = terminal("word " * 80, "hi")
    chat_cli(ChatConfig(run="tiny", max_new_tokens=3), read, write)
    text = "".join(written)
    assert "shorten it" in text and text.count("model> ") == 2


def test_a_base_model_is_announced(tiny):
    read, write, written = terminal("/quit")
    chat_cli(ChatConfig(run="tiny", stage="base"), read, write)
    assert "not fine-tuned" in "".join(written)


def test_one_prompt(tiny, capsys):
    words = ["--run=tiny", "--prompt=What is 12 + 7?", "--temperature=0", "--max-new-tokens=12"]
    assert main(words) == 0
    out, err = capsys.readouterr()
    o = stages.open_stage("tiny", "sft")
    assert out == answer(o.model, o.tokenizer, "What is 12 + 7?", max_tokens=12) + "\n"
    assert err == ""
    assert main([*words, "--stage=base"]) == 0
    assert "not fine-tuned" in capsys.readouterr().err
    assert main(["--run=tiny", f"--prompt={'word ' * 80}"]) == 2


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        (["--run=none"], "no run 'none'"),
        (["--run=tiny", "--step=3"], "has steps 200, not a checkpoint of step 3"),
        (["--run=tiny", "--model-tag=x"], "has no base-x .it has: base, sft"),
    ],
)
def test_what_is_missing_is_named(tiny, words, phrase, capsys):
    assert main(words) == 2
    assert re.search(phrase, capsys.readouterr().err)


@pytest.mark.parametrize("word", ["--temperature=-1", "--max-new-tokens=0", "--stage=x"])
def test_wrong_flags_end_with_code_2(word):
    with pytest.raises(SystemExit) as caught:
        main([word])
    assert caught.value.code == 2


def test_weights_are_converted_for_the_device(tiny):
    low = stages.open_stage("tiny", "sft", dtype=torch.bfloat16)
    assert {p.dtype for p in low.model.parameters()} == {torch.bfloat16}
    assert low.model.cos.dtype == torch.float32
    chat = Chat(low.model, low.tokenizer, max_new_tokens=4)
    assert isinstance("".join(chat.reply("hello")), str)
