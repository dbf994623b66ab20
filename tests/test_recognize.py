"""recognize.py: West's command, what a result holds, what does not change it, what is refused."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import make_llm, make_tokenizer, make_whisper, ranks, refused, run, script
from safetensors.torch import load_file, save_file

import dataset
import encoder
import model
from manifest import read_manifest

WEST = """
    python recognize.py --llm_model_name_or_path Qwen2-1.5B-Instruct --whisper_model_name_or_path tiny \
      --projector_model_path Qwen-1.5B-Instruct-whisper-tiny/checkpoint-600/model.safetensors \
      --data_path test.jsonl --result_path result.txt
"""


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def recognize(folder: Path, result: Path, *flags) -> Path:
    """`folder`'s projector on its data.jsonl, unless flags say otherwise -> where the result is."""
    paths = ["--projector_model_path", folder / "exp", "--data_path", folder / "data.jsonl"]
    script("recognize.py", *paths, "--result_path", result, *flags)
    return result


def hyps(result: Path) -> list[str]:
    return [record["hyp"] for record in read(result)]


@pytest.fixture(scope="module")
def trained(toy) -> Path:
    """toy with a projector in exp/ that had one step of training: its texts are noise, of all lengths."""
    backbones = ["--llm_model_name_or_path", toy / "llm", "--whisper_model_name_or_path", toy / "whisper.pt"]
    paths = ["--data_path", toy / "data.jsonl", "--output_dir", toy / "exp"]
    script("train.py", *backbones, *paths, "--projector_hidden_dim", 64, "--max_steps", 1)
    return toy


def make_endless(folder: Path, letters: str) -> Path:
    """An LLM that fits toy's projector, writes only these letters, and never ends by itself."""
    make_llm(folder, tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    others = torch.ones(len(tensors["lm_head.weight"]), dtype=torch.bool)
    others[make_tokenizer()(letters).input_ids] = False
    tensors["lm_head.weight"][others] = 0.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def endless(tmp_path_factory) -> Path:
    return make_endless(tmp_path_factory.mktemp("endless") / "llm", "abcdefghijklmnopqrstuvwxyz")


@pytest.fixture(scope="module")
def texts(learned) -> list[str]:
    return [record["txt"] for record in read(learned / "data.jsonl")]


# West's command, and what a result holds


def test_wests_command_writes_key_and_hyp_of_every_line(learned, texts, tmp_path):
    names = {
        "Qwen2-1.5B-Instruct": learned / "llm",
        "tiny": learned / "whisper.pt",
        "Qwen-1.5B-Instruct-whisper-tiny/checkpoint-600/model.safetensors": learned
        / "exp/checkpoint-150/model.safetensors",
        "test.jsonl": learned / "data.jsonl",
        "result.txt": tmp_path / "result.txt",
    }
    command = [names.pop(word, word) for word in shlex.split(WEST)]
    assert not names
    told = run(*command[1:])
    lines = [f"{key}\t{text}\n" for key, text in enumerate(texts)]
    assert (tmp_path / "result.txt").read_text() == "".join(lines)
    assert "s of audio" in told  # the progress bar counts seconds, not files


def test_a_text_of_several_lines_is_one_line_in_txt_and_on_the_screen(trained, tmp_path, capsys):
    llm = make_endless(tmp_path / "llm", "ab\n\t")
    flags = ("--llm_model_name_or_path", llm, "--max_new_tokens", "20")
    records = read(recognize(trained, tmp_path / "r.jsonl", *flags))
    assert any("\n" in record["hyp"] for record in records)
    texts = [" ".join(record["hyp"].split()) for record in records]
    lines = "".join(f"{record['key']}\t{text}\n" for record, text in zip(records, texts))
    assert recognize(trained, tmp_path / "r.txt", *flags).read_text() == lines
    files = [trained / "0.wav", trained / "1.wav"]
    capsys.readouterr()
    script("recognize.py", "--projector_model_path", trained / "exp", *files, *flags)
    assert capsys.readouterr().out == "".join(f"{file}\t{text}\n" for file, text in zip(files, texts))


def test_a_result_is_the_record_with_key_hyp_score_and_seconds(learned, texts, tmp_path):
    records = [
        {"wav": str(learned / "3.wav"), "txt": texts[3], "key": "Ü 3", "speaker": {"age": [7, None]}},
        {"wav": str(learned / "1.wav"), "duration": 1.4},
        {"wav": str(learned / "0.wav"), "start": 0.25, "duration": 0.5, "key": "part", "txt": ""},
    ]
    result = read(
        recognize(learned, tmp_path / "r.jsonl", "--data_path", write(tmp_path / "m.jsonl", records))
    )
    for record, told in zip(records, result, strict=True):
        assert {name: told[name] for name in record} == record
        assert told.keys() == record.keys() | {"key", "hyp", "score", "seconds"}
        assert isinstance(told["hyp"], str) and isinstance(told["score"], float) and told["score"] <= 0
    assert [told["key"] for told in result] == ["Ü 3", "1", "part"]
    assert [told["seconds"] for told in result] == pytest.approx([1.8, 1.4, 0.5])
    assert [told["hyp"] for told in result[:2]] == [texts[3], texts[1]]


def test_a_result_is_a_manifest(learned, tmp_path):
    first = recognize(learned, learned / "again.jsonl")
    second = recognize(learned, tmp_path / "r.jsonl", "--data_path", first)
    assert second.read_text() == first.read_text()


def test_the_score_is_minus_the_loss_that_its_text_would_have_in_training(learned):
    result = read(recognize(learned, learned / "scored.jsonl"))
    path, config = model.load_config(str(learned / "exp"))
    llm = model.load_llm(str(learned / "llm"))
    speech_llm = model.SpeechLLM(encoder.load_encoder(str(learned / "whisper.pt")), llm, config)
    model.load_projector(speech_llm, path)
    utterances = read_manifest(str(learned / "scored.jsonl"))
    tokenizer = dataset.load_tokenizer(str(learned / "llm"))
    examples = dataset.SpeechDataset(utterances, tokenizer, config, speech_llm.projector.speech_len)
    for i, told in enumerate(result):
        assert told["hyp"] == utterances[i].target
        loss = speech_llm(**dataset.collate([examples[i]]))["loss"].item()
        assert told["score"] == pytest.approx(-loss, abs=6e-5)


def test_the_projector_is_found_by_its_file_or_its_folder(learned, tmp_path):
    by_folder = recognize(learned, tmp_path / "a.jsonl").read_text()
    path = learned / "exp" / "model.safetensors"
    assert recognize(learned, tmp_path / "b.jsonl", "--projector_model_path", path).read_text() == by_folder


def test_backbones_may_have_moved_since_training(learned, texts, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(learned / "exp", moved / "exp", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((moved / "exp" / "config.json").read_text())
    config |= {"llm_model_name_or_path": "/no/llm", "whisper_model_name_or_path": "/no/whisper.pt"}
    (moved / "exp" / "config.json").write_text(json.dumps(config))
    flags = ["--projector_model_path", moved / "exp"]
    for flag, path in (("whisper", learned / "whisper.pt"), ("llm", learned / "llm")):
        with refused(f"--{flag}_model_name_or_path /no/{flag}"):
            recognize(learned, tmp_path / "r.jsonl", *flags)
        flags += [f"--{flag}_model_name_or_path", path]
    assert hyps(recognize(learned, tmp_path / "r.jsonl", *flags)) == texts


# Neither batches, nor processes, nor neighbours, nor the LLM's own settings change a text


@pytest.fixture(scope="module", params=["1", "3"], ids=["beam 1", "beam 3"])
def one_by_one(request, trained, tmp_path_factory) -> tuple[str, Path]:
    """--num_beams, and the result of utterances that each were decoded alone."""
    result = tmp_path_factory.mktemp("one") / "r.jsonl"
    return request.param, recognize(trained, result, "--num_beams", request.param, "--batch_size", 1)


def assert_same(result: Path, other: Path) -> None:
    """The same in every byte, but for rounding in the score."""
    for mine, theirs in zip(read(result), read(other), strict=True):
        assert mine.pop("score") == pytest.approx(theirs.pop("score"), abs=1e-4)
        assert json.dumps(mine) == json.dumps(theirs)


@pytest.mark.parametrize("batch_size", [3, 16])
def test_batch_size_changes_nothing(trained, tmp_path, one_by_one, batch_size):
    num_beams, alone = one_by_one
    flags = ("--num_beams", num_beams, "--batch_size", batch_size)
    assert_same(recognize(trained, tmp_path / "r.jsonl", *flags), alone)


def test_batch_size_changes_nothing_where_the_llm_has_learned_positions(trained, tmp_path):
    flags = ("--llm_model_name_or_path", make_llm(tmp_path / "llm", model_type="gpt2"))
    paths = ("--whisper_model_name_or_path", trained / "whisper.pt", "--data_path", trained / "data.jsonl")
    script("train.py", *flags, *paths, "--output_dir", tmp_path, "--max_steps", 1)
    flags = ("--projector_model_path", tmp_path, "--max_new_tokens", "20", "--batch_size")
    alone, together = (recognize(trained, tmp_path / f"{size}.jsonl", *flags, size) for size in (1, 16))
    assert_same(together, alone)


def test_two_processes_change_nothing(trained, tmp_path, one_by_one):
    num_beams, alone = one_by_one
    paths = ["--projector_model_path", trained / "exp", "--data_path", trained / "data.jsonl"]
    batch_size = {"1": "16", "3": "5"}[num_beams]  # 16: there is one batch, and nothing for one of the two
    flags = ["--num_beams", num_beams, "--batch_size", batch_size, "--result_path", tmp_path / "r.jsonl"]
    told = ranks(2, tmp_path / "log.txt", "recognize.py", *paths, *flags)
    assert_same(tmp_path / "r.jsonl", alone)
    reports = [told.count(f"data.jsonl:{line}: cut") for line in range(1, 13)]
    assert max(reports) == 1  # the work is shared, not done twice


def test_batch_size_is_how_many_are_decoded_together(trained, tmp_path, monkeypatch):
    sizes, embed = [], model.SpeechLLM.embed
    counted = lambda self, mel, **rest: sizes.append(len(mel)) or embed(self, mel=mel, **rest)  # noqa: E731
    monkeypatch.setattr(model.SpeechLLM, "embed", counted)
    recognize(trained, tmp_path / "r.jsonl", "--batch_size", "5", "--max_new_tokens", "2")
    assert sizes == [5, 5, 2]


@pytest.mark.parametrize("num_beams", ["1", "3"])
def test_the_limit_of_tokens_is_each_utterances_own(trained, endless, tmp_path, capfd, num_beams):
    flags = ("--llm_model_name_or_path", endless, "--num_beams", num_beams)
    result = read(recognize(trained, tmp_path / "r.jsonl", *flags))
    assert [len(told["hyp"]) for told in result] == [64 + int(25 * told["seconds"]) for told in result]
    told = capfd.readouterr().err
    for line in range(1, 13):
        assert f"{trained / 'data.jsonl'}:{line}: cut at its limit" in told


def test_max_new_tokens(trained, endless, tmp_path):
    flags = ("--llm_model_name_or_path", endless, "--max_new_tokens", "5")
    assert {len(hyp) for hyp in hyps(recognize(trained, tmp_path / "r.jsonl", *flags))} == {5}


def test_only_what_was_cut_is_reported(learned, texts, tmp_path, capfd):
    limit = sorted(map(len, texts))[1]  # a letter is a token: two are shorter than that, or end there
    recognize(learned, tmp_path / "r.jsonl", "--max_new_tokens", limit + 1)
    told = capfd.readouterr().err
    for line, text in enumerate(texts, start=1):
        assert (f"{learned / 'data.jsonl'}:{line}: cut" in told) == (len(text) > limit)


def test_the_llms_own_generation_config_changes_nothing(trained, tmp_path, one_by_one):
    num_beams, alone = one_by_one
    shutil.copytree(trained / "llm", tmp_path / "llm")
    settings = {"repetition_penalty": 1.3, "do_sample": True, "temperature": 2.0, "top_k": 7, "top_p": 0.5}
    settings |= {"no_repeat_ngram_size": 2, "length_penalty": -3.0, "max_length": 60, "min_new_tokens": 9}
    settings |= {"suppress_tokens": [5, 6, 7, 8], "eos_token_id": 9}
    (tmp_path / "llm" / "generation_config.json").write_text(json.dumps(settings))
    flags = ("--num_beams", num_beams, "--batch_size", "1", "--llm_model_name_or_path", tmp_path / "llm")
    assert recognize(trained, tmp_path / "r.jsonl", *flags).read_bytes() == alone.read_bytes()


# Audio files, and the other flags


def test_an_audio_file_prints_its_text(learned, texts, capsys):
    script("recognize.py", "--projector_model_path", learned / "exp", learned / "1.wav")
    assert capsys.readouterr().out == f"{texts[1]}\n"


def test_audio_files_print_their_paths_and_texts(learned, texts, capsys, tmp_path):
    (tmp_path / "2.wav").symlink_to(learned / "2.wav")
    same_stem = tmp_path / "2.flac"
    soundfile.write(same_stem, *soundfile.read(learned / "3.wav"))
    files = [learned / "2.wav", learned / "0.wav", tmp_path / "2.wav", same_stem]
    script("recognize.py", "--projector_model_path", learned / "exp", *files)
    expected = [texts[2], texts[0], texts[2], texts[3]]
    assert capsys.readouterr().out == "".join(f"{file}\t{text}\n" for file, text in zip(files, expected))


def test_instruction_overrides_each_lines_own(trained, tmp_path):
    records = [record | {"wav": str(trained / record["wav"])} for record in read(trained / "data.jsonl")[:4]]
    asking = [record | {"instruction": "Translate it."} for record in records]
    plain, own = write(tmp_path / "plain.jsonl", records), write(tmp_path / "own.jsonl", asking)
    limit = ("--max_new_tokens", "20")
    transcribed = hyps(recognize(trained, tmp_path / "a.jsonl", "--data_path", plain, *limit))
    translated = hyps(recognize(trained, tmp_path / "b.jsonl", "--data_path", own, *limit))
    assert all(one != other for one, other in zip(transcribed, translated))
    for number, (flag, manifest, expected) in enumerate(
        [
            ("Translate it.", plain, translated),
            ("Translate it.", own, translated),
            ("Transcribe the speech.", own, transcribed),
        ]
    ):
        flags = ("--data_path", manifest, "--instruction", flag, *limit)
        assert hyps(recognize(trained, tmp_path / f"{number}.jsonl", *flags)) == expected


def test_num_beams(trained, tmp_path):
    flags = ("--max_new_tokens", "20", "--num_beams")
    greedy, beam = (read(recognize(trained, tmp_path / f"{n}.jsonl", *flags, n)) for n in (1, 3))
    assert [told["hyp"] for told in greedy] != [told["hyp"] for told in beam]


def test_three_beams_are_the_default(trained, tmp_path):
    three = recognize(trained, tmp_path / "3.jsonl", "--max_new_tokens", "20", "--num_beams", "3")
    assert (
        recognize(trained, tmp_path / "r.jsonl", "--max_new_tokens", "20").read_bytes() == three.read_bytes()
    )


def test_dtype(trained, tmp_path):
    flags = ("--max_new_tokens", "3", "--num_beams", "1", "--dtype")
    auto, float32, bfloat16 = (
        [told["score"] for told in read(recognize(trained, tmp_path / f"{dtype}.jsonl", *flags, dtype))]
        for dtype in ("auto", "float32", "bfloat16")
    )
    assert auto == float32 != bfloat16


# What is wrong is refused, in one line that names it, and leaves no result


@pytest.fixture
def result(tmp_path):
    """Where the result would go; the test must leave nothing there."""
    (tmp_path / "results").mkdir()
    yield tmp_path / "results" / "r.jsonl"
    assert not list((tmp_path / "results").iterdir())


def test_a_wrong_data_path_is_refused(trained, result):
    with refused("--data_path /no/data.jsonl"):
        recognize(trained, result, "--data_path", "/no/data.jsonl")


def test_a_key_that_comes_twice_is_refused(trained, tmp_path, result):
    record = {"wav": str(trained / "0.wav")}
    manifest = write(tmp_path / "m.jsonl", [record, record | {"key": "a"}, record])
    with refused(f"{manifest}:3", "'0'", f"{manifest}:1"):
        recognize(trained, result, "--data_path", manifest)


def test_another_whisper_is_refused(trained, tmp_path, result):
    other = make_whisper(tmp_path / "other.pt", n_mels=128)
    with refused("encoder_dims", "128", "--whisper_model_name_or_path"):
        recognize(trained, result, "--whisper_model_name_or_path", other)


@pytest.mark.parametrize("sizes", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"model_type": "llama"}])
def test_another_llm_is_refused(trained, tmp_path, result, sizes):
    with refused("llm_dims", next(iter(sizes)), "--llm_model_name_or_path"):
        recognize(trained, result, "--llm_model_name_or_path", make_llm(tmp_path / "llm", **sizes))


def test_a_missing_config_is_refused(trained, tmp_path, result):
    shutil.copy(trained / "exp" / "model.safetensors", tmp_path)
    with refused(str(tmp_path), "config.json"):
        recognize(trained, result, "--projector_model_path", tmp_path)


@pytest.mark.parametrize("content", ["garbage", "cut short", "missing", "superfluous", "of another shape"])
def test_a_projector_file_that_is_not_one_is_refused(trained, tmp_path, result, content):
    shutil.copy(trained / "exp" / "config.json", tmp_path)
    path, tensors = tmp_path / "model.safetensors", load_file(trained / "exp" / "model.safetensors")
    some = next(iter(tensors))
    if content == "missing":
        del tensors[some]
    elif content == "superfluous":
        tensors["llm.weight"] = torch.zeros(2)
    elif content == "of another shape":
        tensors[some] = torch.zeros(2)
    save_file(tensors, path)
    if content == "garbage":
        path.write_bytes(b"garbage" * 100)
    elif content == "cut short":
        path.write_bytes(path.read_bytes()[:-100])
    with refused(str(path)):
        recognize(trained, result, "--projector_model_path", path)


def test_a_result_that_could_not_be_written_is_refused_before_the_work(trained, tmp_path, capfd):
    with refused(f"--result_path {tmp_path / 'none' / 'r.jsonl'}"):
        recognize(trained, tmp_path / "none" / "r.jsonl")
    assert "s of audio" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ("--data_path", "data.jsonl"),
        ("--result_path", "r.jsonl"),
        ("a.wav", "--data_path", "data.jsonl", "--result_path", "r.jsonl"),
        ("a.wav", "--result_path", "r.jsonl"),
        (),
    ],
)
def test_either_audio_files_or_a_manifest_and_its_result(trained, capsys, flags):
    with pytest.raises(SystemExit) as caught:
        script("recognize.py", "--projector_model_path", trained / "exp", *flags)
    assert caught.value.code == 2
    assert "either audio files, or --data_path and --result_path" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("flag", ["--num_beams", "--batch_size", "--max_new_tokens"])
def test_numbers_below_one_are_refused(trained, result, capsys, flag):
    with pytest.raises(SystemExit) as caught:
        recognize(trained, result, flag, "0")
    assert caught.value.code == 2 and flag in capsys.readouterr().err.splitlines()[-1]


def test_a_refused_run_ends_with_one_line_and_an_exit_code(trained, tmp_path, result):
    paths = ["--projector_model_path", trained / "exp", "--data_path", trained / "data.jsonl"]
    flags = ["--llm_model_name_or_path", tmp_path / "none", "--result_path", result]
    told = run("recognize.py", *paths, *flags, ok=False)
    assert told.splitlines()[-1].startswith(f"error: --llm_model_name_or_path {tmp_path / 'none'}: ")
    assert "Traceback" not in told


def test_several_projectors_are_averaged(learned, tmp_path):
    first, other, mean = (tmp_path / name for name in ("first", "other", "mean"))
    for folder in (first, other, mean):
        shutil.copytree(learned / "exp", folder)
    weights = load_file(first / "model.safetensors")
    moved = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in weights.items()}
    save_file(moved, other / "model.safetensors")
    middle = {name: (weights[name] + moved[name]) / 2 for name in weights}
    save_file(middle, mean / "model.safetensors")
    results = {}
    for name, given in {"averaged": (first, other), "mean": (mean,), "first": (first,)}.items():
        flags = [word for folder in given for word in ("--projector_model_path", folder)]
        path = tmp_path / f"{name}.jsonl"
        flags += ["--data_path", learned / "scored.jsonl", "--result_path", path]
        script("recognize.py", *flags, "--max_new_tokens", 5)
        results[name] = path.read_bytes()
    assert results["averaged"] == results["mean"] != results["first"]

    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"projector_stride": 4}))
    with refused("not of the same config.json"):
        flags = "--projector_model_path", first, "--projector_model_path", other
        script(
            "recognize.py",
            *flags,
            "--data_path",
            learned / "scored.jsonl",
            "--result_path",
            tmp_path / "r.jsonl",
        )
