"""How a sketch is cut up, which path its products take, what cuBLASLt's algorithms are kept by."""

import pytest
import torch

from tests.cuda import build


@pytest.fixture
def rules(emulated):
    if build.ON_GPU:
        pytest.skip("plain C++: for the CPU")
    return emulated


def test_parts_fill_the_device_once(rules):
    def parts(tiles, units, slots, overhead=3, most=64):
        return rules.value("rule_best_parts", tiles, units, overhead, slots, most)

    assert parts(64, 100, 264) == 4  # 256 blocks of 264
    assert parts(25, 64, 264) == 10
    assert parts(1000, 64, 132) == 1
    assert parts(1, 0, 132) == 1 and parts(1, 1, 132) == 1
    assert parts(1, 1000, 132, most=8) == 8
    assert parts(1, 6, 132) <= 6


def test_chunks_fit_the_cache_and_are_of_one_size(rules):
    def chunk(tokens, bytes_=12800, l2=50 << 20):
        return rules.value("rule_chunk_tokens", tokens, bytes_, l2)

    for tokens in (1, 127, 128, 129, 2000, 8192, 100_000):
        size = chunk(tokens)
        count = -(-tokens // size)
        assert size % 128 == 0 and size > 0
        assert size * 12800 <= (50 << 20) * 0.6
        assert tokens > (count - 1) * size and count * size - tokens < count * 128
    assert chunk(8192) == 2048
    assert chunk(0) == 0
    assert chunk(1000, 10**9) == 128  # not even one tile fits


@pytest.mark.parametrize("shape", [(8192, 1280, 5120), (1, 3, 5), (300, 64, 4000), (129, 5000, 8)])
@pytest.mark.parametrize("ranks", [(32, 32), (1, 128), (0, 17), (64, 0)])
@pytest.mark.parametrize("processors", [1, 132])
def test_a_plan_covers_everything_once(rules, shape, ranks, processors):
    (t, n, m), (kv, ku) = shape, ranks
    out = torch.zeros(33, dtype=torch.int64)
    for chunk in (128, 2048):
        assert rules.value("rule_plan", t, n, m, kv, ku, chunk, processors, out) == 33
        rank, tiles, parts, per_part, gather_tiles, splits, per_split, tickets, total = out[:9]
        in_chunk = tiles * 128
        assert rank >= max(kv, ku) and (tiles - 1) * 128 < min(t, chunk) <= in_chunk
        assert (splits - 1) * per_split < in_chunk <= splits * per_split and per_split % 32 == 0
        columns = 64 if rank <= 32 else 32
        halves = [h for h in out[9:].view(2, 12).tolist() if h[0] > 0]
        sizes = [(n, m)] * (kv > 0) + [(m, n)] * (ku > 0)
        steps = first_tile = 0
        pieces = [(int(tickets), int(2 * tiles * 4))]
        for half, (x, z) in zip(halves, sizes, strict=True):
            k, mine, first, first_part, my_parts, my_tiles, my_first_tile, *offsets = half
            assert first == steps and my_first_tile == first_tile
            assert (mine - 1) * columns < x <= mine * columns
            assert (my_tiles - 1) * 256 < z <= my_tiles * 256
            assert first_part == first // per_part
            assert first_part + my_parts == -(-(first + mine) // per_part)
            steps, first_tile = steps + mine, first_tile + my_tiles
            row = int(rank) * 4
            bytes_ = [mine * columns * row, int(in_chunk) * row, int(tiles) * 4]
            bytes_ += [my_parts * int(in_chunk * rank) * 4 if my_parts > 1 else 0]
            bytes_ += [int(splits * rank) * z * 4]
            pieces += list(zip(offsets, bytes_, strict=True))
        assert gather_tiles == first_tile and (parts - 1) * per_part < steps <= parts * per_part
        pieces = sorted(piece for piece in pieces if piece[1] > 0)
        assert all(start % 256 == 0 for start, _ in pieces)
        ends = [start + size for start, size in pieces]
        assert all(e <= s for e, (s, _) in zip(ends, pieces[1:], strict=False))
        assert ends[-1] <= total


def test_the_path(rules):
    auto, own, library, fused = range(4)
    f32, f64, bf16, f16 = range(4)

    def path(wanted, dtype, rank=32):
        return rules.value("rule_path", wanted, dtype, rank)

    assert [path(auto, dtype) for dtype in range(4)] == [library, library, own, own]
    assert path(auto, bf16, 128) == own and path(auto, bf16, 129) == library
    assert all(path(own, dtype, 200) == own for dtype in range(4))
    assert [path(library, dtype) for dtype in range(4)] == [library] * 3 + [own]
    assert [path(fused, dtype) for dtype in range(4)] == [library, library, fused, own]


def wanted(rules, text, n=768, m=3072, tokens=8192, rank=32):
    characters = torch.tensor([*text.encode(), 0], dtype=torch.uint8)
    return rules.value("rule_wanted", characters, n, m, tokens, rank)


def test_a_path_by_name(rules):
    names = ("null", "", "auto", "own", "cublaslt", "fused", "OWN", "own ", ",", "own,")
    assert [wanted(rules, x) for x in names] == [0, 0, 0, 1, 2, 3, -1, -1, -1, -1]


def test_a_path_by_rules(rules):
    auto, own, library, fused = range(4)
    text = "768x3072x8192x32=fused,768x3072=cublaslt,64x64x10=own"
    assert wanted(rules, text) == fused
    assert wanted(rules, text, tokens=10_000, rank=16) == fused
    assert wanted(rules, text, tokens=8191) == library and wanted(rules, text, rank=33) == library
    assert wanted(rules, text, 3072, 768) == fused and wanted(rules, text, 3072, 769) == auto
    assert wanted(rules, text, 64, 64, 10) == own and wanted(rules, text, 64, 64, 9) == auto
    assert wanted(rules, text + ",fused", 64, 64, 9) == fused
    assert wanted(rules, "768x3072=own,768x3072=fused") == own  # the first that fits
    assert wanted(rules, "768x3072=auto,own") == auto


@pytest.mark.parametrize(
    "text",
    ["768=own", "768x=own", "x3072=own", "768x3072x1x1x1=own", "-1x3=own", "768x3072=fast", "=own",
     "768x3072=", "own,768x3072=own", "own,fused", "768x3072=own,,own", "768 x 3072=own"],
)  # fmt: skip
def test_malformed_rules_are_refused_whatever_the_call(rules, text):
    assert wanted(rules, text) == wanted(rules, text, 1, 1, 1, 1) == -1


def test_sums_are_cut_where_tiles_are_few(rules):
    def parts(rows, cols, depth, processors=132):
        return rules.value("rule_split_k", rows, cols, depth, processors)

    assert parts(5120, 64, 8192) == 3 and parts(1280, 64, 8192) == 13
    assert parts(8192, 5120, 8192) == 1 and parts(64, 64, 500) == 1
    assert parts(64, 64, 10**6) == 32 and parts(0, 64, 64) == 1


def test_alignment(rules):
    addresses = (0, 256, 512 + 128, 48, 6, 7)
    expected = [256, 256, 128, 16, 2, 1]
    assert [rules.value("rule_alignment", address) for address in addresses] == expected


def test_an_algorithm_is_kept_by_all_it_depends_on(rules):
    fields = torch.zeros(1, dtype=torch.int64)
    others = rules.value("rule_other_keys", fields)
    assert others == fields.item() == 16


def test_threads_agree_on_what_is_remembered(rules):
    assert rules.value("rule_memory", 8, 200) == 200


MIB = 1 << 20
GROUPS = {
    "same": [(1024, 768, 3072, 32, 32)] * 24,
    "mixed": [(512, 768, 3072, 20, 32), (4096, 300, 200, 32, 1), (1, 7, 5, 17, 3)] * 8,
    "one wide": [(100, 64, 64, 4, 4), (9000, 1280, 5120, 16, 16), (128, 64, 64, 4, 4)],
    "a full table": [(130, 40 + i, 50 - i, 128, 90) for i in range(31)],
}


def grouped_plan(rules, layers, limit, processors):
    """The numbers of the group, and those of each chunk with its pieces."""
    sizes = torch.tensor(layers, dtype=torch.int64)
    out = torch.zeros(200_000, dtype=torch.int64)
    used = rules.value("rule_grouped_plan", sizes, len(layers), limit, processors, out)
    group, rest, chunks = out[:7].tolist(), out[7:used].tolist(), []
    while rest:
        chunk, rest = rest[:7], rest[7:]
        pieces, rest = rest[: 11 * chunk[0]], rest[11 * chunk[0] :]
        chunks.append((chunk, [pieces[i : i + 11] for i in range(0, len(pieces), 11)]))
    return group, chunks


@pytest.mark.parametrize("layers", GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("limit", [1, MIB, 28 * MIB, 1000 * MIB])
@pytest.mark.parametrize("processors", [1, 132])
def test_a_group_is_covered_once_and_in_order(rules, layers, limit, processors):
    group, chunks = grouped_plan(rules, layers, limit, processors)
    rank, count, per_part, per_split, tickets, bases_end, total = group
    assert count == len(chunks) and rank >= max(max(layer[3:]) for layer in layers)
    done = [0] * len(layers)
    columns = 64 if rank <= 32 else 32
    for (_, tiles, project, gather, q, scale, end), pieces in chunks:
        assert 2 * tiles <= tickets and bases_end <= q <= scale <= end <= total
        row, at = rank * 4, [0, 0, 0]
        spans = [(q, 2 * tiles * 128 * row), (scale, 2 * tiles * 4)]
        for layer, first, length, first_tile, its_tiles, *rest in pieces:
            t, n, m, *_ = layers[layer]
            assert done[layer] == first and first % 128 == 0 and length > 0
            assert all(done[i] == layers[i][0] for i in range(layer))  # one after the other
            done[layer] += length
            assert [first_tile, *rest[:2]] == at and (
                its_tiles - 1
            ) * 128 < length <= its_tiles * 128
            of_a, of_b = -(-n // columns), -(-m // columns)
            splits = -(-length // per_split)
            at[0] += its_tiles
            at[1] += its_tiles * -(-(of_a + of_b) // per_part)
            at[2] += splits * (-(-n // 256) + -(-m // 256))
            for h, (begin, end_, rows) in enumerate(((0, of_a, m), (of_a, of_a + of_b, n))):
                parts = (end_ - 1) // per_part - begin // per_part + 1
                spans.append((rest[2 + h], parts * its_tiles * 128 * rank * 4 if parts > 1 else 0))
                spans.append((rest[4 + h], splits * rows * rank * 4))
        assert at == [tiles, project, gather]
        spans = sorted(span for span in spans if span[1] > 0)
        assert all(start % 256 == 0 for start, _ in spans)
        ends = [start + size for start, size in spans]
        assert all(e <= s for e, (s, _) in zip(ends, spans[1:], strict=False)) and ends[-1] <= end
    assert done == [layer[0] for layer in layers]


def test_chunks_of_a_group_are_as_few_as_their_size_allows(rules):
    """24 layers of 7.9 MB, 28 MB of which stay in L2: 25 launches, 96 one by one."""
    for limit, least, most in ((28 * MIB, 7, 8), (1000 * MIB, 1, 1), (8 * MIB, 24, 24)):
        group, chunks = grouped_plan(rules, GROUPS["same"], limit, 132)
        assert least <= group[1] <= most and 1 + 3 * len(chunks) <= 4 * len(chunks)
        for (_, tiles, *_), _ in chunks:
            assert tiles * 128 * 3840 * 2 <= limit * 1.13
    group, chunks = grouped_plan(rules, GROUPS["same"], 28 * MIB, 132)
    cut = [p for _, pieces in chunks for p in pieces if p[2] < 1024]
    assert all(piece[2] * 3840 * 2 > 28 * MIB / 8 - 128 * 3840 * 2 for piece in cut)  # no slivers


def test_what_takes_part_in_a_group(rules):
    auto, together, single = range(3)
    f32, f64, bf16, f16 = range(4)

    def takes(wanted, dtype, sketch=0, rank=32, bytes_=10, chunk=20):
        return rules.value("rule_takes_group", wanted, sketch, dtype, rank, bytes_, chunk)

    assert [takes(auto, dtype) for dtype in range(4)] == [0, 0, 1, 1]
    assert not takes(auto, bf16, bytes_=21) and takes(together, bf16, bytes_=21)
    assert not takes(single, bf16) and not takes(together, bf16, rank=129)
    assert [takes(together, bf16, sketch=path) for path in range(4)] == [1, 1, 0, 0]
    assert all(takes(together, f16, sketch=path) for path in range(4))
    assert [rules.value("rule_parse_grouped", i) for i in range(6)] == [0, 0, 0, 1, 2, -1]
