"""The benchmarks run, compare like with like, and plan.py's model of memory is what a step takes."""

import json
import runpy
import sys

import pytest
import torch
from conftest import ROOT, script
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

sys.path.append(str(ROOT / "benchmarks"))
import harness  # noqa: E402
import plan  # noqa: E402

from model import SpeechLLM  # noqa: E402


def load(name: str) -> dict:
    """The names of a benchmark, which is called as a script of the repo is."""
    return runpy.run_path(str(ROOT / "benchmarks" / name), run_name="benchmark")


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    """A shape for tests in place of toy."""
    monkeypatch.setitem(harness.LLMS, "toy", (64, 128, 2, 4, 2, 500, False))
    monkeypatch.setitem(harness.WHISPERS, "toy", (80, 64, 2, 2))


@pytest.fixture(scope="module")
def trained() -> dict:
    return load("train.py")


def by_arm(path, *names: str) -> dict:
    return {tuple(row[name] for name in names): row for row in json.loads(path.read_text())["rows"]}


def test_train_tells_every_arm(tmp_path, capsys):
    path = tmp_path / "train.json"
    flags = "--pairs 1 --steps 1 --batch_size 2 --lengths aishell --json"
    script("benchmarks/train.py", *flags.split(), path)
    rows = by_arm(path, "arm")
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 2 and len(rows) == 8
    ours, then = rows["ours",], rows["2024",]
    assert then["times 2024"] == [1, 1, 1] and ours["times 2024"][0] > 0
    assert then["padding, encoder"] > 0.6 and ours["padding, encoder"] < 0.1
    assert then["padding, LLM"] > 0.6 and ours["padding, LLM"] < 0.1
    assert 0 < ours["peak MB"] < then["peak MB"]
    work = {arm: row["TFLOP/utterance"] for (arm,), row in rows.items()}
    assert (
        work["cached features"] < work["ours"] < min(work["with checkpointing"], work["no label-only head"])
    )
    assert max(work.values()) == work["2024"]


def test_recognize_tells_every_arm(tmp_path, capsys):
    path = tmp_path / "recognize.json"
    flags = "--pairs 1 --steps 1 --batch_size 2 --beams 1 2 --json"
    script("benchmarks/recognize.py", *flags.split(), path)
    rows = by_arm(path, "arm", "beams")
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 2 and len(rows) == 6
    for row in rows.values():
        assert row["times real time"] > row["utterances/s"] > 0 and row["peak MB"] > 0
    for beams in (1, 2):
        assert rows["batch 1", beams]["times batch 1"] == rows["same batches", beams]["times same batches"]
    work = {arm: row["TFLOP/utterance"] for arm, row in rows.items()}
    assert work["ours", 2] < work["same batches", 2] and work["ours", 1] < work["ours", 2]


@pytest.mark.parametrize("off", [{"head"}, {"memory"}, {"head", "memory"}, {"cache"}], ids=sorted)
def test_what_is_switched_off_changes_neither_loss_nor_gradients(trained, off):
    model, _ = trained["make_model"]("toy", "cpu")
    seconds, told = [1.0, 3.3, 2.1], []
    for switched in (set(), off):
        model.switch(switched)
        loss = model(**trained["make_batch"](model, seconds, switched, "cpu"))["loss"]
        told.append((loss.detach(), torch.autograd.grad(loss, list(model.projector.parameters()))))
    torch.testing.assert_close(told[1][0], told[0][0], rtol=1e-6, atol=0)
    for mine, other in zip(told[0][1], told[1][1]):
        assert (mine - other).norm() <= 1e-4 * mine.norm()


def test_a_batch_is_the_sum_of_plain_full_logits_one_by_one(trained):
    """The reference: no padding, no cut of the head, cross-entropy of transformers."""
    model, _ = trained["make_model"]("toy", "cpu")
    model.switch(set())
    seconds, parameters = [1.0, 3.3, 2.1], list(model.projector.parameters())
    loss = model(**trained["make_batch"](model, seconds, set(), "cpu"))["loss"]
    losses, counts = [], []
    for one in seconds:
        batch = trained["make_batch"](model, [one], set(), "cpu")
        labels = batch.pop("labels")
        counts.append(int((labels >= 0).sum()))
        losses.append(counts[-1] * model.llm(inputs_embeds=model.embed(**batch), labels=labels).loss)
    plain = sum(losses) / sum(counts)
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    mine, theirs = torch.autograd.grad(loss, parameters), torch.autograd.grad(plain, parameters)
    for one, other in zip(mine, theirs):
        assert (one - other).norm() <= 1e-4 * other.norm()


def attention_flop(query, key, value, *_, out_shape=None, **__) -> int:
    """torch counts attention on GPUs only; with grouped heads, each query has its own."""
    heads = query[:2]
    return sdpa_flop_count(query, (*heads, *key[2:]), (*heads, *value[2:]))


WEST = {"encoder", "positions", "memory", "head"}


@pytest.mark.parametrize("off", [set(), {"memory"}, {"head"}, WEST], ids=sorted)
def test_the_flop_are_those_that_torch_counts(trained, off):
    model, _ = trained["make_model"]("toy", "cpu")
    model.switch(off)
    batch = trained["make_batch"](model, [10.0, 10.0], off, "cpu")
    mapping = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        model(**batch)["loss"].backward()
    assert trained["flop"](model, batch, off) == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize("again", [False, True])
def test_the_model_of_memory_is_within_15_percent(again):
    told, took = plan.told_and_took("small", again)
    assert told == pytest.approx(took, rel=0.15)


def test_plan_tells_what_fits(capsys):
    script("benchmarks/plan.py", "--llm", "Qwen/Qwen2-7B-Instruct", "--whisper", "large-v3", "--gpus", 8)
    told = capsys.readouterr().out
    rows = [line.split(" | ") for line in told.splitlines() if line.startswith(("| whole", "| ZeRO-3"))]
    batches = [int(row[4]) for row in rows]
    assert len(rows) == 4 and batches[0] < batches[1] < batches[3] and batches[0] < batches[2]
    assert "It fits: batches of" in told


@pytest.mark.parametrize("name, millions", [("Qwen2-0.5B", 494), ("Qwen2-7B", 7616), ("Llama-3-8B", 8030)])
def test_known_llms_have_their_published_sizes(name, millions):
    model = harness.build(SpeechLLM, harness.whisper_dims("tiny"), plan.known_llm(name), "meta")
    assert round(sum(map(torch.numel, model.llm.parameters())) / 1e6) == millions
