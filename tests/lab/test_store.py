import dataclasses
import json
import threading

from molegrad.gpt import paths
from molegrad.gpt.train import flags
from molegrad.gpt.train.config import BaseTrainConfig
from molegrad.lab import store
from molegrad.lab.peers import Peer
from molegrad.lab.store import Run


def run(**values):
    config = flags.make(BaseTrainConfig, num_iterations=5, **values)
    return Run("a", config, "corpus", "tokenizer")


def test_the_key_counts_what_changes_the_result_and_nothing_else():
    key = run().key
    same = [
        run(run="other", threads=3, eval_every=7, save_every=-2, data="a.txt", tokenizer="b"),
        run(streaming_seed=9),  # streaming is off
        dataclasses.replace(run(), label="b"),
        Run.from_dict(json.loads(json.dumps(run().to_dict()))),
    ]
    assert {r.key for r in same} == {key}
    others = [
        run(matrix_lr=0.5),
        run(seed=1),
        run(enable_streaming=True),
        run(enable_streaming=True, streaming_rank_k=5),
        dataclasses.replace(run(), corpus="b"),
        dataclasses.replace(run(), tokenizer="b"),
        dataclasses.replace(run(), peer=Peer("galore", 4)),
        dataclasses.replace(run(), peer=Peer("galore", 8)),
        dataclasses.replace(run(), peer=Peer("galore", 8, {"scale": 1.0})),
    ]
    assert len({key, *(r.key for r in others)}) == 1 + len(others)


def test_native_and_plain_kernels_are_different_runs(monkeypatch):
    keys = set()
    for native in (True, False):
        monkeypatch.setattr(store, "build_info", lambda native=native: {"native": native})
        keys.add(run().key)
    assert len(keys) == 2


def test_a_flag_that_is_new_keeps_old_records_and_a_changed_default_does_not(monkeypatch):
    old = run(enable_streaming=True).to_dict()
    del old["config"]["streaming_probes"]  # as if written before the flag existed
    assert store.key_of(old) == run(enable_streaming=True).key
    assert store.key_of(old) != run(enable_streaming=True, streaming_probes=1).key
    changed = {**store._defaults(), "momentum": 0.5}
    monkeypatch.setattr(store, "_defaults", lambda: changed)
    assert store.key_of(old) == run(enable_streaming=True).key  # the record says its momentum
    old["config"]["streaming_gone"] = 1
    assert store.key_of(old) is None
    old["config"]["enable_streaming"] = False
    assert store.key_of(old) is not None


def test_time_counts_neither_seed_nor_rate_nor_length():
    a, b = run(matrix_lr=0.1), run(seed=1, matrix_lr=0.2, streaming_seed=1)
    assert a.time_key == b.time_key != run(depth=3).time_key


def test_half_a_line_and_other_formats_are_left_out(home):
    path = paths.report_dir() / store.RUNS
    path.write_text('{"key": "old", "config": {}}\n{"format": 3}\n[3]\n{"format": 3, "conf')
    store.append(store.RUNS, {**run().to_dict(), "bpb": 1.0})
    store.append(store.RUNS, {**run().to_dict(), "bpb": 2.0})  # the newest counts
    (record,) = store.read(store.RUNS).values()
    assert record["bpb"] == 2.0 and len(path.read_text().splitlines()) == 6


def test_many_may_append_at_once(home):
    def write(i):
        for j in range(20):
            store.append(store.TIMES, {"format": 3, "key": f"{i}-{j}", "text": "x" * 5000})

    threads = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.read(store.TIMES)) == 80
