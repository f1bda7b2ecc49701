"""Bits per byte against the formula written out; special tokens and ignored targets left out."""

import math

import pytest
import torch
import torch.nn.functional as F

from molegrad.gpt.model.bpb import bits_per_byte
from tests.gpt.model.test_gpt import small, stirred, tokens


def test_equals_the_formula():
    model = stirred(small()).train()
    sizes = torch.arange(61) % 5  # tokens 0, 5, 10, ... have no bytes
    batches = [tokens(seed=s) for s in (1, 2)]
    nats = total = 0.0
    for idx, targets in batches:
        logp = F.log_softmax(model(idx), -1)
        for row, wanted in zip(logp.flatten(0, 1), targets.flatten(), strict=True):
            if wanted >= 0 and sizes[wanted] > 0:
                nats -= row[wanted].item()
                total += sizes[wanted].item()
    value = bits_per_byte(model, batches, sizes)
    assert value == pytest.approx(nats / math.log(2) / total, rel=1e-5)
    assert model.training


def test_a_uniform_model_needs_log2_of_the_vocabulary():
    model = small()
    torch.nn.init.zeros_(model.lm_head.weight)
    idx, targets = tokens()
    ones = torch.ones(61, dtype=torch.int64)
    assert bits_per_byte(model, [(idx, targets)], ones) == pytest.approx(math.log2(61), rel=1e-6)


def test_nothing_to_measure_is_nan():
    idx, targets = tokens()
    ones = torch.ones(61, dtype=torch.int64)
    assert math.isnan(bits_per_byte(small(), [(idx, torch.full_like(targets, -1))], ones))
