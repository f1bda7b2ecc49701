"""What the plan of a run says."""

import json

import pytest

from molegrad.gpt.train.flags import make
from molegrad.memory import plan as memory_plan
from molegrad.memory.plan import PlanConfig, card_bytes
from tests.memory.test_simulate import FACTORED, SMALL, preset


@pytest.mark.parametrize(
    "card, size",
    [
        *((name, 32 * 2**30) for name in ("32", "32GB", "rtx 5090", "rtx5090", "GeForce RTX-5090")),
        *((name, 40 * 2**30) for name in ("NVIDIA A100 40GB", "NVIDIA A100-SXM4-40GB")),
        *((name, 80 * 2**30) for name in ("A100", "NVIDIA A100-SXM4-80GB")),
        ("0.5 GiB", 2**29),
        ("RTX 5090 Laptop GPU 24GB", 24 * 2**30),
    ],
)
def test_cards(card, size):
    assert card_bytes(card) == size


@pytest.mark.parametrize(
    "values, phrase",
    [
        ({"card": "5090"}, "would have 5,090 GiB, .* or its name, 'RTX 5090'"),
        ({"card": "0"}, "would have 0 GiB, and 0 to 512 are wanted"),
        ({"card": "RTX 5090 Laptop GPU"}, "laptops' cards have other sizes .*: give GiB"),
        ({"card": "Voodoo"}, "card='Voodoo' is neither a number"),
        ({"reserve_gib": 40}, "reserve_gib=40 must lie between 0 and the 32 GiB"),
    ],
)
def test_bad_values_are_named(values, phrase):
    with pytest.raises(ValueError, match=phrase):
        PlanConfig(**values)


def names(**values) -> list[str]:
    return list(memory_plan.variants(make(PlanConfig, **SMALL, **values)))


def test_columns_go_from_dense_to_what_is_asked_for():
    levers = ["", " + chunks", " + chunks + recompute", " + chunks + recompute + offload"]
    assert names() == ["dense", *(f"balanced{lever}" for lever in levers)]
    assert names(**preset("minimal"))[2] == "sampled, momentum + chunks"
    given = names(**preset("balanced"), recompute="selective")
    assert given == ["dense", "sampled, momentum", "sampled, momentum + levers given"]
    assert names(optimizer="adamw")[1] == "dense + chunks"
    assert names(recompute="block") == ["dense", "dense + levers given"]
    assert names(compile=True)[-1] == "balanced + chunks + recompute"
    power = names(**FACTORED, streaming_method="power", total_batch_size=512)
    assert not [name for name in power if "chunks" in name] and len(power) == 4
    columns = memory_plan.variants(make(PlanConfig, **SMALL, head_rank=8))
    assert [column.head_rank for column in columns.values()] == [0, 8, 8, 8, 8]
    assert "balanced + head_rank" in columns and not columns["dense"].enable_streaming


def test_the_command(capsys):
    arguments = [f"--{k}={v}" for k, v in SMALL.items()]
    arguments += ["--vocab-size=512", "--card=1", "--reserve-gib=0.5", "--recompute=block"]
    assert memory_plan.main([*arguments, "--json"]) == 0
    *text, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert any("keys and values" in line for line in text) and "fits" in text[-1]
    assert result["budget_bytes"] == 2**29 and len(result["rows"]) == 2
    for row in result["rows"]:
        assert row["peak"] == sum(row["parts"].values()) == row["phases"][row["phase"]]
        assert row["fits"] and row["peak"] > 2**20
    with pytest.raises(SystemExit):
        memory_plan.main(["--card=none"])
    assert "neither a number of GiB" in capsys.readouterr().err
