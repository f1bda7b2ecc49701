"""The emulation itself: what each instruction of csrc/cuda/device.cuh does to plain memory."""

import pytest
import torch

from tests.cuda import build
from tests.samples import randn

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def probe(emulated):
    if build.ON_GPU:
        pytest.skip("a GPU does not promise what the emulation does")
    return emulated


@pytest.mark.parametrize("threads", [1, 33, 96])
def test_barriers(probe, order, threads):
    blocks, rounds = 3, 5
    out = torch.full((blocks, threads), -1, dtype=torch.int32)
    probe.probe_neighbours(blocks, threads, rounds, out)
    i = torch.arange(threads)
    expected = sum((i + r) % threads * r for r in range(1, rounds + 1))
    expected = torch.where(i % 3 == 0, -1, expected).expand(blocks, threads)
    assert torch.equal(out.long(), expected)


def test_shuffles_and_votes(probe, order):
    n = 64
    out = torch.zeros(6, n, dtype=torch.int32)
    votes, sums = torch.zeros(n, dtype=torch.int32), torch.zeros(n, dtype=torch.float64)
    probe.probe_shuffles(n, out, votes, sums)
    x = (100 + torch.arange(n)).view(2, 32)
    lane = torch.arange(32)
    pairs = torch.where(lane < 16, x[:, lane ^ 1], 0)
    expected = [
        x[:, (lane * 7 + 3) % 32],
        x[:, lane ^ 5],
        x[:, torch.where(lane < 3, lane, lane - 3)],
        x[:, torch.where(lane > 27, lane, lane + 4)],
        x[:, lane // 8 * 8 + 2],
        pairs,
    ]
    assert torch.equal(out.long().view(6, 2, 32), torch.stack(expected))
    assert torch.equal(sums.view(2, 32), x.sum(1, keepdim=True).double().expand(2, 32))
    bits = ((x % 3 == 0).long() << lane).sum(1, keepdim=True).expand(2, 32)
    assert torch.equal(votes.view(2, 32).long() & 0xFFFFFFFF, bits)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_products_of_16_bits(probe, order, dtype):
    a, b, d = randn(16, 16, dtype=dtype), randn(16, 8, dtype=dtype), torch.zeros(16, 8)
    probe.probe_product_16(dtype, a, b, d)
    torch.testing.assert_close(d, (a.double() @ b.double() + 1).float(), rtol=1e-6, atol=1e-6)


def test_a_product_from_loaded_matrices(probe, order):
    a, b, d = randn(16, 16, dtype=BF16), randn(16, 8, dtype=BF16), torch.zeros(16, 8)
    probe.probe_product_loaded(a, b, d)
    torch.testing.assert_close(d, (a.double() @ b.double()).float(), rtol=1e-6, atol=1e-6)


def to_tf32(x, rounded):
    bits = x.view(torch.int32).long()
    return ((bits + 0x1000 if rounded else bits) & ~0x1FFF).to(torch.int32).view(F32)


@pytest.mark.parametrize("rounded", [False, True])
def test_products_in_tf32(probe, order, rounded):
    a, b, d = randn(16, 8), randn(8, 8), torch.zeros(16, 8)
    probe.probe_product_tf32(rounded, a, b, d)
    expected = to_tf32(a, rounded).double() @ to_tf32(b, rounded).double() + 1
    torch.testing.assert_close(d, expected.float(), rtol=1e-6, atol=1e-6)


def test_copies_arrive_when_they_are_waited_for(probe, order):
    n = 40
    source = randn(2 * n, 4)
    out = torch.zeros(4, n)
    probe.probe_copies(n, source, out)
    even = torch.arange(n) % 2 == 0
    assert (out[0] == -1).all() and (out[2] == -2).all()
    assert torch.equal(out[1], source[:n, 0])
    assert torch.equal(out[3], torch.where(even, source[n:, 0], 0))


def test_conversions(probe):
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, 448, 464, 480, 1e-9, 2**-9, 2**-10])
    bits = torch.arange(0, 2**32, 2**32 // 65526).to(torch.int32)
    x = torch.cat([special, bits.view(F32)])[:65536].contiguous()
    n = len(x)
    out = torch.zeros(7, n, dtype=torch.int32)
    probe.probe_conversions(x, out, n)

    def halves(row, dtype, width):
        low = out[row].long() & (2**width - 1)
        high = out[row].long() >> width & (2**width - 1)
        integer = torch.int16 if width == 16 else torch.uint8
        return (part.to(integer).view(dtype).float() for part in (low, high))

    def same(got, expected):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)

    for row, dtype in ((0, BF16), (1, F16)):
        low, high = halves(row, dtype, 16)
        same(low, x.to(dtype).float())
        same(high, (-x).to(dtype).float())
    for row, dtype in ((2, torch.float8_e4m3fn), (3, torch.float8_e5m2)):
        low, high = halves(row, dtype, 8)
        most = torch.finfo(dtype).max
        same(low, x.clamp(-most, most).to(dtype).float())
        same(high, (-x).clamp(-most, most).to(dtype).float())
    finite = x.isfinite()
    same(out[4].view(F32)[finite], to_tf32(x, True)[finite])
    codes = torch.arange(n)
    pairs = codes.to(torch.uint16)
    low, high = halves(5, F16, 16)
    same(low, (pairs.to(torch.int64) & 255).to(torch.uint8).view(torch.float8_e4m3fn).float())
    same(high, (pairs.to(torch.int64) >> 8).to(torch.uint8).view(torch.float8_e4m3fn).float())
    same(out[6].view(F32), codes.to(torch.int16).view(F16).float())


@pytest.mark.parametrize(
    "kind, message",
    [
        (0, "deadlock: threads wait"),
        (1, "lanes of a warp meet in different instructions"),
        (2, "lanes of a warp meet with different masks"),
        (3, "a lane takes part in an exchange that its mask leaves out"),
    ],
)
def test_threads_that_never_meet_end_the_process(probe, kind, message):
    done = build.run_check(f"from tests.cuda import build\nbuild.load().probe_stuck({kind})")
    assert done.returncode != 0 and f"emulation: {message}" in done.stderr
