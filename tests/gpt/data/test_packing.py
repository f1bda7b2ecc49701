"""Packed conversations: masks, shapes, order, resuming, batches without a target."""

import pytest
import torch

from molegrad.gpt.data.packing import ConversationLoader, held_out_batches, pack, render
from molegrad.gpt.data.tokenizer import Tokenizer

PAD = 0


def talks(lengths, first=10):
    """Conversations of these lengths; the second half of each is the assistant's."""
    return [([first + i] * n, [0] * (n - n // 2) + [1] * (n // 2)) for i, n in enumerate(lengths)]


def test_packing_keeps_every_conversation_whole_and_once():
    lengths = [7, 3, 5, 5, 2, 9, 1, 4, 8]
    rows = pack(lengths, range(len(lengths)), 10)
    assert sorted(i for row in rows for i in row) == list(range(9))
    assert all(sum(lengths[i] for i in row) <= 10 for row in rows)
    assert len(rows) == 5  # 44 tokens cannot take fewer rows of 10


def test_a_long_stream_is_packed_through_the_buffer():
    lengths = [1 + i % 13 for i in range(2000)]
    rows = pack(lengths, range(2000), 20)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    assert sum(lengths) / (20 * len(rows)) > 0.97


def test_only_the_assistant_is_a_target():
    tokenizer = Tokenizer.train(["spell the word cat as c a t"] * 3, 270)
    talk = {
        "messages": [
            {"role": "user", "content": "spell cat"},
            {"role": "assistant", "content": "c a t"},
        ]
    }
    rendered = render([talk, talk], tokenizer, 60)
    ((inputs, targets),) = held_out_batches(rendered, 1, 60, tokenizer.bos, 10**6)
    wanted = [*tokenizer.encode("c a t"), tokenizer.special("<|assistant_end|>")]
    assert targets[targets >= 0].tolist() == 2 * wanted
    said = 2 * rendered[0][0]
    assert inputs[0].tolist() == said + [tokenizer.bos] * (60 - len(said))
    assert (targets[0, len(said) - 1 :] == -1).all()


def test_batches_predict_the_next_token():
    loader = ConversationLoader(talks([4, 6, 5, 3]), 2, 9, PAD)
    inputs, targets = loader.next_batch()
    assert inputs.shape == targets.shape == (2, 9)
    assert inputs.dtype == targets.dtype == torch.int64
    seen = targets >= 0
    following = torch.cat([inputs[:, 1:], torch.full((2, 1), -2)], 1)
    last = torch.zeros_like(seen)
    last[:, -1] = True
    assert torch.equal(following[seen & ~last], targets[seen & ~last])
    assert seen.sum() == 2 + 3 + 2 + 1


def test_an_epoch_has_every_conversation_and_epochs_differ():
    loader = ConversationLoader(talks([9] * 12), 3, 9, PAD, seed=3)
    epochs = []
    for epoch in range(2):
        first = [loader.next_batch()[0][:, 0] for _ in range(4)]
        epochs.append(torch.cat(first).tolist())
        assert loader.epoch == epoch
        assert sorted(epochs[-1]) == list(range(10, 22))
    assert epochs[0] != epochs[1]


def test_ranks_share_the_rows():
    parts = [ConversationLoader(talks([9] * 12), 3, 9, PAD, rank=r, world_size=2) for r in (0, 1)]
    seen = [loader.next_batch()[0][:, 0].tolist() for loader in parts for _ in range(2)]
    assert sorted(sum(seen, [])) == list(range(10, 22))


def test_a_loaded_position_gives_the_same_batches():
    loader = ConversationLoader(talks([3, 8, 5, 6, 2, 7, 4]), 2, 9, PAD, seed=1)
    for _ in range(5):
        loader.next_batch()
    state = loader.state_dict()
    expected = [loader.next_batch() for _ in range(6)]
    other = ConversationLoader(talks([3, 8, 5, 6, 2, 7, 4]), 2, 9, PAD, seed=1)
    other.load_state_dict(state)
    for pair in expected:
        for one, two in zip(pair, other.next_batch(), strict=True):
            assert torch.equal(one, two)
    assert other.epoch == loader.epoch > 0
    with pytest.raises(ValueError, match="seed=1, this loader 2"):
        ConversationLoader(talks([3, 8, 5, 6, 2, 7, 4]), 2, 9, PAD, seed=2).load_state_dict(state)


def test_rows_without_a_target_are_skipped_and_counted():
    mute = [([5] * 9, [0] * 9)] * 6
    loader = ConversationLoader([*mute, *talks([9, 9])], 2, 9, PAD)
    for _ in range(2):  # two epochs
        assert (loader.next_batch()[1] >= 0).any(dim=1).all()
    assert 6 <= loader.skipped <= 12
    assert loader.state_dict()["skipped"] == loader.skipped


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_the_order_of_rows_does_not_depend_on_the_batch_size(rows):
    mute = [([5] * 9, [0] * 9)] * 5
    rendered = [*mute, *talks([3, 8, 5, 9, 2, 7, 4, 9, 9])]

    def loader(batch_size):
        return ConversationLoader(rendered, batch_size, 9, PAD, seed=2)

    def rows_of(one, batches):
        pairs = [torch.stack(one.next_batch(), 1) for _ in range(batches)]
        return torch.cat(pairs).tolist()

    whole, part = loader(3), loader(rows)
    assert rows_of(part, 12 // rows) == rows_of(whole, 4)
    assert part.state_dict() == whole.state_dict() and whole.skipped > 0
    later = loader(3)
    later.load_state_dict(part.state_dict())
    assert rows_of(later, 2) == rows_of(whole, 2)


@pytest.mark.parametrize(
    ("rendered", "options", "phrase"),
    [
        ([([5] * 4, [0] * 4)], {}, "none of the 1 conversations has a token to learn"),
        (talks([11]), {}, "a conversation has 11 tokens, a row 10"),
        (talks([4]), {"rank": 1, "world_size": 2}, "nothing to learn for process 1 of 2"),
        (talks([4]), {"batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_data_is_named(rendered, options, phrase):
    with pytest.raises(ValueError, match=phrase):
        ConversationLoader(rendered, **{"batch_size": 2, "seq_len": 9, "pad": PAD, **options})


def test_held_out_batches_are_one_pass_split_over_ranks():
    rendered = talks([9] * 7)
    whole = list(held_out_batches(rendered, 2, 9, PAD, 10**6))
    assert [b[0].size(0) for b in whole] == [2, 2, 2, 1]
    parts = [list(held_out_batches(rendered, 2, 9, PAD, 10**6, "cpu", r, 2)) for r in (0, 1)]
    seen = [i for part in parts for inputs, _ in part for i in inputs[:, 0].tolist()]
    assert sorted(seen) == list(range(10, 17))
    assert sum(b[0].size(0) for b in held_out_batches(rendered, 2, 9, PAD, 27)) == 3
