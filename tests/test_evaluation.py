"""Evaluation while training: what it tells is what recognize.py and score.py would; loss.png shows it."""

import json

import matplotlib.pyplot
import pytest
from conftest import script
from test_train import data, logged

from evaluation import HINT, in_words
from plot import plot


@pytest.fixture(scope="module")
def evaluated(learned, tmp_path_factory):
    """A run that learns 4 utterances by heart, and is evaluated on them at the start, halfway, at the end."""
    out = tmp_path_factory.mktemp("evaluated")
    flags = "--max_steps 150 --per_device_train_batch_size 4 --learning_rate 3e-3 --projector_hidden_dim 512"
    flags += " --lr_scheduler_type cosine --warmup_steps 10 --disable_tqdm True --logging_steps 10"
    flags += " --eval_strategy steps --eval_steps 75 --save_steps 75 --eval_on_start True"
    flags = [*flags.split(), "--eval_data_path", learned / "data.jsonl"]
    script("train.py", *data(learned, out), *flags)
    return out


def test_it_hears_once_it_has_learned(evaluated):
    losses, shuffled = logged(evaluated, "eval_loss_heard"), logged(evaluated, "eval_loss_shuffled")
    wers, cers = logged(evaluated, "eval_wer"), logged(evaluated, "eval_cer")
    assert len(wers) == len(cers) == len(losses) == len(shuffled) == 3
    assert losses == pytest.approx(logged(evaluated, "eval_loss"), rel=1e-3)
    assert wers[0] > 80 and losses[0] > 0.9 * shuffled[0]
    assert wers[-1] < 20 and losses[-1] < 0.5 * shuffled[-1]


def test_its_word_error_rate_is_that_of_recognition(evaluated, learned, tmp_path, capsys):
    result = tmp_path / "result.jsonl"
    flags = ["--projector_model_path", evaluated, "--data_path", learned / "data.jsonl", "--num_beams", 1]
    script("recognize.py", *flags, "--result_path", result)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        script("score.py", result)
    assert f"%WER {logged(evaluated, 'eval_wer')[-1]:.2f} " in capsys.readouterr().out


def test_in_words():
    rates = {"eval_wer": 12.5, "eval_cer": 3.25}
    heard = in_words(rates | {"eval_loss_heard": 0.5, "eval_loss_shuffled": 2.0})
    assert heard == "It hears: WER 12.50 %, CER 3.25 %, loss 0.500, 2.000 with others' audio"
    assert in_words(rates | {"eval_loss_heard": 2.0, "eval_loss_shuffled": 2.1}) == HINT


def test_the_picture_shows_what_was_logged(evaluated, tmp_path, monkeypatch):
    assert (evaluated / "loss.png").read_bytes().startswith(b"\x89PNG")
    drawn, subplots = [], matplotlib.pyplot.subplots
    monkeypatch.setattr(
        matplotlib.pyplot, "subplots", lambda *args, **kw: drawn.append(subplots(*args, **kw)) or drawn[-1]
    )
    history = json.loads((evaluated / "trainer_state.json").read_text())["log_history"]
    plot(history, str(tmp_path / "loss.png"))
    axes = drawn[0][1][:, 0]
    assert [axis.get_ylabel() for axis in axes] == [
        "loss (nats per token)",
        "error rate (%)",
        "learning rate",
    ]
    curves = {line.get_label(): list(line.get_ydata()) for axis in axes for line in axis.get_lines()}
    assert curves["training"] == logged(evaluated, "loss") and curves["WER"] == logged(evaluated, "eval_wer")
    assert axes[-1].get_xlabel() == "step"


def test_no_evaluation_no_error(learned, tmp_path):
    script("train.py", *data(learned, tmp_path), "--max_steps", "1", "--logging_steps", "1")
    assert (tmp_path / "loss.png").exists()
    plot([], str(tmp_path / "none.png"))
    assert not (tmp_path / "none.png").exists()
