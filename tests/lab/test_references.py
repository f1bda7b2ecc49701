"""LDAdam, MoFaSGD and Dion against their papers' formulas, written out densely."""

import io

import pytest
import torch

from molegrad.lab import references
from molegrad.lab.references import Dion, LDAdam, MoFaSGD
from tests.samples import orthonormal, randn

F64 = torch.float64
KINDS = {"ldadam": LDAdam, "mofasgd": MoFaSGD, "dion": Dion}
SHAPES = [(6, 10), (10, 6), (8, 8)]


def parameter(m, n, dtype=F64):
    return torch.nn.Parameter(randn(m, n, seed=50, dtype=dtype))


def gradients(m, n, steps, rank=None, dtype=F64):
    """Random ones; of one column and row space of dimension `rank` where it is given."""
    if rank is None:
        return [randn(m, n, seed=i, dtype=dtype) for i in range(steps)]
    left, right = orthonormal(m, rank, 3, dtype), orthonormal(n, rank, 4, dtype)
    return [left @ randn(rank, rank, seed=i, dtype=dtype) @ right.mT for i in range(steps)]


def run(optimizer, p, grads):
    """Step through `grads`; the change of the weight at each step, divided by −lr."""
    changes = []
    for g in grads:
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
        changes.append((before - p.detach()) / optimizer.param_groups[0]["lr"])
    return changes


def wide(x):
    return x if x.shape[0] <= x.shape[1] else x.mT


# LDAdam


@pytest.mark.parametrize("shape", SHAPES)
def test_ldadam_of_full_rank_in_a_fixed_basis_is_adam_in_that_basis(shape, monkeypatch):
    monkeypatch.setattr(references, "block_power_iteration", lambda target, basis: basis)
    p = parameter(*shape)
    optimizer = LDAdam([p], lr=0.01, rank=min(shape), betas=(0.9, 0.95), weight_decay=0.1)
    grads = gradients(*shape, 6)
    start = wide(p.detach()).clone()
    run(optimizer, p, grads)
    state = optimizer.state[p]
    basis = state["basis"]  # (d, d), orthogonal
    turned = torch.nn.Parameter(basis.mT @ start)
    adam = torch.optim.AdamW([turned], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for g in grads:
        turned.grad = basis.mT @ wide(g)
        adam.step()
    torch.testing.assert_close(wide(p.detach()), basis @ turned.detach())
    for moment in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[moment], adam.state[turned][moment])
    torch.testing.assert_close(state["error"], torch.zeros(*shape, dtype=F64))


@pytest.mark.parametrize("shape", SHAPES)
def test_ldadam_of_full_rank_carries_its_momentum_through_every_turn(shape):
    p, beta = parameter(*shape), 0.9
    optimizer = LDAdam([p], rank=min(shape), betas=(beta, 0.95))
    dense, bases = torch.zeros(*shape, dtype=F64), []
    for g in gradients(*shape, 6):
        run(optimizer, p, [g])
        state = optimizer.state[p]
        dense = beta * dense + (1 - beta) * g
        torch.testing.assert_close(state["basis"] @ state["exp_avg"], wide(dense))
        bases.append(state["basis"])
    assert (bases[-1] - bases[-2]).norm() > 0.1  # it did turn


@pytest.mark.parametrize("shape", SHAPES)
def test_ldadams_error_feedback_loses_nothing(shape):
    """β₁ Mₜ₋₁ + (1 − β₁)(G + Eₜ₋₁) = Mₜ + (1 − β₁) Eₜ with M = P m, whatever the rank."""
    p, beta = parameter(*shape), 0.8
    optimizer = LDAdam([p], rank=2, betas=(beta, 0.95))
    old_m = old_e = torch.zeros(*wide(p).shape, dtype=F64)
    for g in gradients(*shape, 5):
        run(optimizer, p, [g])
        state = optimizer.state[p]
        m, e = state["basis"] @ state["exp_avg"], wide(state["error"]).clone()
        assert e.norm() > 0.1
        torch.testing.assert_close(
            m + (1 - beta) * e, beta * old_m + (1 - beta) * (wide(g) + old_e)
        )
        old_m, old_e = m, e


def test_ldadams_step_is_the_papers():
    """The second step in the paper's order, on matrices of full size where it has projections."""
    shape, r, (b1, b2), rho, eps = (6, 10), 3, (0.9, 0.95), 0.7, 1e-3
    p, (g1, g2) = parameter(*shape), gradients(6, 10, 2)
    optimizer = LDAdam([p], rank=r, betas=(b1, b2), rho=rho, eps=eps, error_feedback=False)
    first, second = run(optimizer, p, [g1, g2])
    p1 = torch.linalg.svd(g1)[0][:, :r]
    low = p1.mT @ g1
    torch.testing.assert_close(first, p1 @ (low / (low.abs() + eps)))
    target = rho * p1 @ low + (1 - rho) * g2
    p2 = torch.linalg.qr(target @ target.mT @ p1)[0]
    turn = p2.mT @ p1
    # t = 1: both moments, corrected for bias, are those of one gradient, whose variance is zero
    m = b1 * (1 - b1) * (turn @ low) + (1 - b1) * (p2.mT @ g2)
    v = b2 * (1 - b2) * (turn @ low).square() + (1 - b2) * (p2.mT @ g2).square()
    expected = p2 @ ((m / (1 - b1**2)) / ((v / (1 - b2**2)).sqrt() + eps))
    torch.testing.assert_close(second, expected)
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], v)
    assert "error" not in optimizer.state[p]


def test_ldadam_turns_variances_by_squared_cosines():
    """Third step: the variance m̂² does not explain goes through Q∘Q (not Q, not its 4th power)."""
    p, grads = parameter(6, 10), gradients(6, 10, 3)
    b1, b2 = 0.9, 0.95
    optimizer = LDAdam([p], rank=3, betas=(b1, b2), error_feedback=False)
    run(optimizer, p, grads[:2])
    old = {k: v.clone() for k, v in optimizer.state[p].items() if k != "step"}
    run(optimizer, p, grads[2:])
    new = optimizer.state[p]
    turn = new["basis"].mT @ old["basis"]
    m_hat, v_hat = old["exp_avg"] / (1 - b1**2), old["exp_avg_sq"] / (1 - b2**2)
    moved = turn**2 @ (v_hat - m_hat**2) + (turn @ m_hat) ** 2
    expected = b2 * (1 - b2**2) * moved.abs() + (1 - b2) * (new["basis"].mT @ grads[2]) ** 2
    torch.testing.assert_close(new["exp_avg_sq"], expected)


def test_block_power_iteration_finds_the_leading_left_vectors():
    left, right = orthonormal(12, 12, 1, F64), orthonormal(20, 12, 2, F64)
    target = left @ torch.diag(0.5 ** torch.arange(12.0, dtype=F64)) @ right.mT
    basis = orthonormal(12, 3, 7, F64)
    for _ in range(25):
        basis = references.block_power_iteration(target, basis)
    torch.testing.assert_close(basis @ basis.mT, left[:, :3] @ left[:, :3].mT)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3, dtype=F64))


# MoFaSGD


def factored(state):
    return state["left"] @ state["sigma"].diag() @ state["right"].mT


@pytest.mark.parametrize(("shape", "rank", "space"), [((6, 10), 6, None), ((12, 9), 3, 3)])
def test_mofasgds_momentum_is_the_dense_one_where_the_rank_suffices(shape, rank, space):
    p, beta = parameter(*shape), 0.9
    optimizer = MoFaSGD([p], rank=rank, momentum=beta)
    grads = gradients(*shape, 6, space)
    dense = grads[0].clone()  # it begins at the first gradient, not at zero
    for g in grads:
        (change,) = run(optimizer, p, [g])
        dense = beta * dense + (1 - beta) * g
        torch.testing.assert_close(factored(optimizer.state[p]), dense)
        left, _, right = torch.linalg.svd(dense)
        torch.testing.assert_close(change, left[:, :rank] @ right[:rank])


@pytest.mark.parametrize("shape", SHAPES)
def test_mofasgds_update_is_the_truncation_of_the_projected_average(shape):
    p, beta, r = parameter(*shape), 0.9, 2
    optimizer = MoFaSGD([p], rank=r, momentum=beta)
    first, *rest = gradients(*shape, 4)
    run(optimizer, p, [first])
    left, sigma, right = torch.linalg.svd(first)
    start = left[:, :r] @ sigma[:r].diag() @ right[:r]
    torch.testing.assert_close(factored(optimizer.state[p]), start)
    for g in rest:
        state = optimizer.state[p]
        pu, pv = state["left"] @ state["left"].mT, state["right"] @ state["right"].mT
        average = beta * factored(state) + (1 - beta) * (pu @ g + g @ pv - pu @ g @ pv)
        (change,) = run(optimizer, p, [g])
        left, sigma, right = torch.linalg.svd(average)
        expected = left[:, :r] @ sigma[:r].diag() @ right[:r]
        torch.testing.assert_close(factored(optimizer.state[p]), expected)
        torch.testing.assert_close(change, left[:, :r] @ right[:r])


def test_mofasgd_moves_nothing_in_directions_that_have_no_momentum():
    p = parameter(8, 12)
    (change,) = run(MoFaSGD([p], rank=5), p, gradients(8, 12, 1, rank=2))
    torch.testing.assert_close(
        torch.linalg.svdvals(change), torch.tensor([1.0] * 2 + [0.0] * 6, dtype=F64)
    )


def test_the_factor_by_shape():
    for kind in (MoFaSGD, Dion):
        p, q = parameter(4, 16), parameter(4, 16)
        (plain,) = run(kind([p], rank=3, adjust_lr="none"), p, gradients(4, 16, 1))
        (scaled,) = run(kind([q], rank=3, adjust_lr="spectral"), q, gradients(4, 16, 1))
        torch.testing.assert_close(scaled, 0.5 * plain)
    assert Dion([p], rank=3).param_groups[0]["adjust_lr"] == "spectral"  # as in their papers
    assert MoFaSGD([p], rank=3).param_groups[0]["adjust_lr"] == "none"


# Dion


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [2, 6])
def test_dions_error_feedback_loses_nothing(shape, rank):
    """M + (1 − μ) P Rᵀ is the old M plus G, and the update is √(m/n) P Qᵀ."""
    p, mu = parameter(*shape), 0.9
    optimizer = Dion([p], rank=rank, momentum=mu)
    first, *rest = gradients(*shape, 4)
    run(optimizer, p, [first])
    old = optimizer.state[p]["momentum"].clone()
    for g in rest:
        q_old = optimizer.state[p]["q"].clone()
        (change,) = run(optimizer, p, [g])
        left = torch.linalg.qr((old + g) @ q_old)[0]
        right = (old + g).mT @ left
        q = right / right.norm(dim=0)
        state = optimizer.state[p]
        torch.testing.assert_close(state["q"], q)
        torch.testing.assert_close(change, (shape[0] / shape[1]) ** 0.5 * left @ q.mT)
        torch.testing.assert_close(state["momentum"] + (1 - mu) * left @ right.mT, old + g)
        old = state["momentum"].clone()


def test_dion_of_full_rank_is_heavy_ball_momentum_whose_update_becomes_polar():
    p, mu = parameter(6, 9), 0.5
    optimizer = Dion([p], rank=6, momentum=mu, adjust_lr="none")
    left, right = orthonormal(6, 6, 1, F64), orthonormal(9, 6, 2, F64)
    g = left @ torch.diag(torch.tensor([32.0, 16, 8, 4, 2, 1], dtype=F64)) @ right.mT
    momentum = torch.zeros(6, 9, dtype=F64)
    for _ in range(40):
        (change,) = run(optimizer, p, [g])
        momentum = mu * (momentum + g)
        torch.testing.assert_close(optimizer.state[p]["momentum"], momentum)
    torch.testing.assert_close(change, left @ right.mT, rtol=1e-6, atol=1e-6)


def test_dion_keeps_its_directions_through_a_gradient_of_zero():
    p = parameter(6, 9)
    optimizer = Dion([p], rank=3)
    run(optimizer, p, gradients(6, 9, 1))
    optimizer.state[p]["momentum"].zero_()
    q = optimizer.state[p]["q"].clone()
    (change,) = run(optimizer, p, [torch.zeros(6, 9, dtype=F64)])
    assert torch.equal(change, torch.zeros_like(change))
    assert torch.equal(optimizer.state[p]["q"], q)


# All


@pytest.mark.parametrize(
    ("name", "rank", "options", "rates"),
    [
        ("ldadam", 2, {}, 0.1),
        ("ldadam", 6, {"error_feedback": False}, 0.1),
        ("mofasgd", 6, {}, 0.2),
        ("dion", 2, {"momentum": 0.8}, 0.2),
        ("dion", 6, {}, 0.2),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_quadratic_is_minimised(name, rank, options, rates, shape):
    """½‖W − W*‖² from far away, at full and (with error feedback) at low rank."""
    p, goal = parameter(*shape), randn(*shape, seed=9, dtype=F64)
    optimizer = KINDS[name]([p], lr=rates, rank=rank, **options)
    start = (p.detach() - goal).norm()
    for i in range(300):
        optimizer.param_groups[0]["lr"] = rates * (1 - i / 300)
        run(optimizer, p, [p.detach() - goal])
    assert (p.detach() - goal).norm() < 0.02 * start


@pytest.mark.parametrize("name", KINDS)
def test_rank_matters_and_low_rank_steps_are_low_rank(name):
    p = parameter(8, 12)
    for change in run(KINDS[name]([p], rank=3), p, gradients(8, 12, 3)):
        assert torch.linalg.matrix_rank(change, rtol=1e-9) == 3


@pytest.mark.parametrize("name", KINDS)
def test_a_learning_rate_of_zero_changes_nothing(name):
    p = parameter(6, 10)
    before = p.detach().clone()
    optimizer = KINDS[name]([p], lr=0.0, rank=3, weight_decay=0.5)
    for g in gradients(6, 10, 3):
        p.grad = g
        optimizer.step()
    assert torch.equal(p.detach(), before)


@pytest.mark.parametrize("name", KINDS)
def test_weight_decay_is_decoupled(name):
    p, q = parameter(6, 10), parameter(6, 10)
    plain, decayed = (KINDS[name]([x], lr=0.1, rank=3, weight_decay=w) for x, w in ((p, 0), (q, 2)))
    (change,), (both,) = (run(o, x, gradients(6, 10, 1)) for o, x in ((plain, p), (decayed, q)))
    torch.testing.assert_close(both, change + 2 * parameter(6, 10).detach())


@pytest.mark.parametrize("name", KINDS)
def test_a_first_gradient_of_zero_waits(name):
    p, q = parameter(6, 10), parameter(6, 10)
    grads = gradients(6, 10, 3)
    run(KINDS[name]([p], rank=3), p, grads)
    optimizer = KINDS[name]([q], rank=3)
    run(optimizer, q, [torch.zeros(6, 10, dtype=F64)])
    assert not optimizer.state[q] and torch.equal(q.detach(), parameter(6, 10).detach())
    run(optimizer, q, grads)
    assert torch.equal(p.detach(), q.detach())


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_state_dict_resumes_bit_exactly_with_weights_only(name, shape):
    grads = gradients(*shape, 6, dtype=torch.float32)
    p = parameter(*shape, dtype=torch.float32)
    optimizer = KINDS[name]([p], rank=3)
    run(optimizer, p, grads[:3])
    file = io.BytesIO()
    torch.save({"p": p.detach(), "optimizer": optimizer.state_dict()}, file)
    run(optimizer, p, grads[3:])
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    q = torch.nn.Parameter(loaded["p"])
    resumed = KINDS[name]([q], lr=0.5, rank=3)
    resumed.load_state_dict(loaded["optimizer"])
    run(resumed, q, grads[3:])
    assert torch.equal(p.detach(), q.detach())


@pytest.mark.parametrize("name", KINDS)
def test_state_lies_in_rows(name):
    """A checkpoint writes rows: any other layout would change the last bit after a resume."""
    for shape in SHAPES:
        p = parameter(*shape)
        optimizer = KINDS[name]([p], rank=3)
        run(optimizer, p, gradients(*shape, 2))
        for value in optimizer.state[p].values():
            if isinstance(value, torch.Tensor):
                assert value.is_contiguous()
                assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dion", {"rank": 7}, "rank 7 is more than a matrix of shape"),
        ("dion", {"rank": 0}, "rank must be an integer of at least 1"),
        ("mofasgd", {"rank": 2.5}, "rank must be an integer of at least 1"),
        ("dion", {"lr": -1.0}, "lr must be at least 0"),
        ("dion", {"momentum": 1.0}, "momentum must be at least 0 and below 1"),
        ("mofasgd", {"adjust_lr": "x"}, "adjust_lr must be one of"),
        ("ldadam", {"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ("ldadam", {"rho": 1.0}, "rho must be at least 0 and below 1"),
        ("ldadam", {"eps": -1.0}, "eps must be at least 0"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(ValueError, match=message):
        KINDS[name]([parameter(6, 10)], **{"rank": 3, **options})


@pytest.mark.parametrize("name", KINDS)
def test_only_matrices_of_full_precision(name):
    for bad in (torch.zeros(5), torch.zeros(5, 5, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="matrices of float32 or float64"):
            KINDS[name]([torch.nn.Parameter(bad)], rank=1)
