"""Two gloo processes on half a batch each give the update of one process on the whole batch."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from molegrad import MoleGradConfig, clip_grad_norm_, convert, ignored_by_ddp
from molegrad.optim import Muon, matrix_param_groups, other_params
from tests.models import TinyGPT

CONFIG = MoleGradConfig.of(
    method="tangent", rank_k=4, target_layers="all", gradient_mode="factors", probes=2
)


def build(config: MoleGradConfig):
    torch.manual_seed(0)
    model = convert(TinyGPT(depth=1).double(), config)
    groups = matrix_param_groups(model.h)
    return model, [Muon(groups), torch.optim.SGD(other_params(model, groups), lr=0.01)]


def train(model, module, optimizers, batches):
    for idx in batches:
        logits = module(idx[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx[:, 1:].flatten())
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        if not ignored_by_ddp(model):
            clip_grad_norm_(model, 0.5)
        for optimizer in optimizers:
            optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def batches():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(50, (6, 8), generator=generator) for _ in range(3)]


def worker(rank: int, port: int, config: MoleGradConfig, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        model, optimizers = build(config)
        names = ignored_by_ddp(model)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        module = DistributedDataParallel(model)
        halves = [idx[3 * rank : 3 * rank + 3] for idx in batches()]
        results[rank] = train(model, module, optimizers, halves)
    except RuntimeError as error:
        results[rank] = str(error)
    finally:
        dist.destroy_process_group()


def run_two_processes(config: MoleGradConfig):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(worker, args=(port, config, results), nprocs=2)
        return dict(results)


EXACT = MoleGradConfig.of(method="exact", gradient_mode="momentum", target_layers="all")


@pytest.mark.parametrize("config", [CONFIG, EXACT], ids=["factors", "momentum"])
def test_two_processes_give_the_update_of_one(config):
    results = run_two_processes(config)
    model, optimizers = build(config)
    expected = train(model, model, optimizers, batches())
    exact = config is CONFIG  # a momentum in float32, and its snapshot in int8, round
    tolerance = {"rtol": 1e-7, "atol": 1e-9} if exact else {"rtol": 1e-3, "atol": 1e-3}
    for ours, theirs, truth in zip(results[0], results[1], expected, strict=True):
        assert torch.equal(ours, theirs)
        torch.testing.assert_close(ours, truth, **tolerance)


def test_the_power_method_refuses_several_processes():
    assert "several processes" in run_two_processes(CONFIG.changed(method="power"))[0]
