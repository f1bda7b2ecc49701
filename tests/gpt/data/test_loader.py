import json
from collections import Counter

import numpy as np
import pytest
import torch

from molegrad.gpt.data.loader import PackedLoader, validation_batches
from molegrad.gpt.data.tokens import TokenShard

BOS = 0


class Shards:
    """Shards of documents in memory, in place of CorpusTokens; knows which were asked for ahead."""

    bos = BOS

    def __init__(self, *shards):
        self.num_shards, self.prefetched = len(shards), []
        self.fingerprint = str(hash(str(shards)))
        self._shards = [
            TokenShard(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))
            for documents in shards
        ]

    def shard(self, index) -> TokenShard:
        return self._shards[index]

    def prefetch(self, index):
        self.prefetched.append(index)


def documents(count, low=2, high=30, first=1, seed=0):
    """Documents whose tokens are all different, so that each can be recognised."""
    rng = np.random.default_rng(seed)
    result, token = [], first
    for length in rng.integers(low, high, count):
        result.append([BOS, *range(token, token + int(length))])
        token += int(length)
    return result


@pytest.fixture
def source():
    return Shards(documents(200))


def rows_of(loader, batches):
    rows = []
    for _ in range(batches):
        inputs, targets = loader.next_batch()
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        rows += torch.cat([inputs, targets[:, -1:]], dim=1).tolist()
    return rows


def same(a, b, batches=30):
    return all(
        torch.equal(x, y)
        for _ in range(batches)
        for x, y in zip(a.next_batch(), b.next_batch(), strict=True)
    )


def test_shapes_and_types(source):
    inputs, targets = PackedLoader(source, 3, 16).next_batch()
    for tensor in (inputs, targets):
        assert tensor.shape == (3, 16) and tensor.dtype == torch.int64
        assert tensor.is_contiguous()


def test_every_row_begins_with_bos_and_holds_beginnings_of_documents(source):
    whole = {tuple(d[1:]) for d in documents(200)}
    begins = {d[1]: tuple(d[1:]) for d in documents(200)}
    complete = cropped = 0
    for row in rows_of(PackedLoader(source, 4, 40), 25):
        assert len(row) == 41 and row[0] == BOS
        starts = [i for i, token in enumerate(row) if token == BOS]
        for at, end in zip(starts, [*starts[1:], len(row)], strict=True):
            piece = tuple(row[at + 1 : end])
            if not piece:
                assert at == len(row) - 1, "a lone <|bos|> only where a row's last place is left"
                continue
            assert begins[piece[0]][: len(piece)] == piece
            complete += piece in whole
            cropped += piece not in whole
            assert piece in whole or end == len(row), "only the last piece of a row is cropped"
    assert complete > 5 * cropped > 0


def test_one_epoch_shows_every_document_once():
    # Lengths that fill rows exactly: nothing is cropped, so a pass must be a partition.
    docs = [[BOS, *range(1 + 7 * i, 8 + 7 * i)] for i in range(60)]
    loader = PackedLoader(Shards(docs), 1, 7)
    for _ in range(3):
        seen = Counter(row[1] for row in rows_of(loader, 60))
        assert sum(seen.values()) == 60
    total = Counter(row[1] for row in rows_of(PackedLoader(Shards(docs), 1, 7), 600))
    assert set(total) == {d[1] for d in docs} and max(total.values()) - min(total.values()) <= 2


def test_long_documents_are_cut_into_pieces_and_not_lost():
    long = [BOS, *range(1, 101)]
    loader = PackedLoader(Shards([long]), 1, 9)
    tokens = []
    for row in rows_of(loader, 12):
        assert row[0] == BOS
        tokens += [token for token in row if token != BOS]
    # Eleven rows of nine tokens and a piece of one: the first pass in full, in order by length.
    assert set(range(1, 101)) <= set(tokens)
    first = sorted(tokens[:99])
    assert first == list(range(1, 100))


def test_order_depends_on_seed_and_epoch_alone(source):
    assert same(PackedLoader(source, 2, 16, seed=5), PackedLoader(source, 2, 16, seed=5))
    assert not same(PackedLoader(source, 2, 16, seed=5), PackedLoader(source, 2, 16, seed=6), 1)
    docs = [[BOS, i] for i in range(1, 101)]
    loader = PackedLoader(Shards(docs), 1, 1)
    first = [row[1] for row in rows_of(loader, 100)]
    second = [row[1] for row in rows_of(loader, 100)]
    assert first != second and sorted(first) == sorted(second) == list(range(1, 101))
    assert first != sorted(first)


def test_packing_does_not_depend_on_the_batch_size(source):
    assert rows_of(PackedLoader(source, 1, 16), 12) == rows_of(PackedLoader(source, 4, 16), 3)


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_position_holds_for_every_batch_size(source, rows):
    options = {"rank": 1, "world_size": 2, "seed": 3}
    loader = PackedLoader(source, 4, 16, **options)
    rows_of(loader, 9)
    other = PackedLoader(source, rows, 16, **options)
    other.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert rows_of(other, 24 // rows) == rows_of(loader, 6)


@pytest.mark.parametrize("before", [0, 1, 7, 61])
def test_state_restores_the_position_exactly(source, before):
    loader = PackedLoader(source, 2, 16, seed=3)
    rows_of(loader, before)
    state = json.loads(json.dumps(loader.state_dict()))
    other = PackedLoader(source, 2, 16, seed=3)
    rows_of(other, 5)
    other.load_state_dict(state)
    assert other.epoch == loader.epoch
    assert same(loader, other, 100)
    assert loader.state_dict() == other.state_dict()


def test_state_across_shards_and_prefetch():
    source = Shards(*(documents(40, first=1 + 2000 * i, seed=i) for i in range(3)))
    loader = PackedLoader(source, 2, 16)
    for _ in range(40):
        loader.next_batch()
        state = json.loads(json.dumps(loader.state_dict()))
        other = PackedLoader(source, 2, 16)
        other.load_state_dict(state)
        assert same(loader, other, 3)
    order = loader.permutation(3, 0)
    assert source.prefetched[0] == order[1], "the shard after the first one is asked for ahead"
    assert loader.epoch >= 1


@pytest.mark.parametrize(
    ("options", "name"),
    [({"seq_len": 8}, "seq_len"), ({"seed": 1}, "seed"), ({"world_size": 2}, "world_size")],
)
def test_state_of_another_loader_is_refused(source, options, name):
    state = PackedLoader(source, 2, 16).state_dict()
    arguments = {"batch_size": 2, "seq_len": 16, **options}
    with pytest.raises(ValueError, match=f"has {name}="):
        PackedLoader(source, **arguments).load_state_dict(state)
    other = PackedLoader(Shards(documents(200, seed=1)), 2, 16)
    with pytest.raises(ValueError, match="fingerprint.*same data"):
        other.load_state_dict(state)


def test_ranks_share_the_documents():
    docs = [[BOS, i] for i in range(1, 91)]
    seen = []
    for rank in range(3):
        loader = PackedLoader(Shards(docs), 1, 1, rank=rank, world_size=3)
        seen.append({row[1] for row in rows_of(loader, 30)})
    assert [len(s) for s in seen] == [30, 30, 30]
    assert set.union(*seen) == set(range(1, 91))


def test_epochs_are_counted():
    loader = PackedLoader(Shards([[BOS, i] for i in range(1, 101)]), 1, 1)
    epochs = []
    for _ in range(250):
        loader.next_batch()
        epochs.append(loader.epoch)
    assert epochs == sorted(epochs) and epochs[0] == 0 and epochs[-1] == 2


def test_too_few_tokens():
    source = Shards([[BOS, 1, 2], [BOS, 3]])
    with pytest.raises(ValueError, match="holds 5 tokens, one batch needs 18"):
        PackedLoader(source, 2, 8)
    PackedLoader(source, 1, 4).next_batch()
    with pytest.raises(ValueError, match=r"world_size 2 x batch_size 1 x \(seq_len 4 \+ 1\)"):
        PackedLoader(source, 1, 4, world_size=2)


def test_no_usable_document_is_an_error_not_a_hang():
    with pytest.raises(ValueError, match="no document with at least two tokens"):
        PackedLoader(Shards([[BOS]] * 50), 1, 4).next_batch()
    one = Shards([[BOS, *range(1, 100)]])
    with pytest.raises(ValueError, match="rank 1 of 2 finds no document"):
        PackedLoader(one, 1, 4, rank=1, world_size=2).next_batch()


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"seq_len": 0}, {"rank": 1}, {"world_size": 0}, {"seed": -1}],
)
def test_bad_arguments(source, options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        PackedLoader(source, **{"batch_size": 2, "seq_len": 8, **options})


def test_validation_batches_are_always_the_same(source):
    first = list(validation_batches(source, 2, 16, 5))
    again = list(validation_batches(source, 2, 16, 5))
    assert len(first) == 5
    for x, y in zip(first, again, strict=True):
        assert torch.equal(x[0], y[0]) and torch.equal(x[1], y[1])
    assert len(list(validation_batches(source, 8, 64, 50))) == 50  # more than one pass
