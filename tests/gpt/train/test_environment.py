"""The record of machine and software."""

import json
import platform

import torch

from molegrad.gpt.train.environment import machine_record


def test_the_record_is_complete_and_json_able():
    record = json.loads(json.dumps(machine_record(torch.device("cpu"), world_size=2)))
    assert record["torch"] == torch.__version__
    assert record["python"] == platform.python_version()
    assert record["processes"] == 2 and record["device"].startswith("CPU")
    assert record["molegrad_build"]["native"] in (True, False)
    assert record["packages"]["numpy"]
