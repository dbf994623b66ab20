"""chat.py: its prompts are the chat template's, its texts recognize.py's, its page works in a browser."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import CHATML, ROOT, make_tokenizer, refused, script

import dataset
from chat import Shown, take_turn
from conversation import SPOKEN, Conversation, Listener, render
from dataset import SPEECH_SLOT, Recordings, load_tokenizer, render_prompt
from encoder import load_encoder
from model import SpeechLLM, load_config, load_llm, load_projector

GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
DATED = "It is {{ strftime_now('%Y-%m-%d') }}.\n" + CHATML
# as Qwen3: an empty thought is opened, and not repeated in what was said before
THINKING = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n\n</think>\n\n{% endif %}")


def load(folder: Path, tokenizer=None, **changed) -> Listener:
    path, config = load_config(str(folder / "exp"))
    model = SpeechLLM(load_encoder(str(folder / "whisper.pt")), load_llm(str(folder / "llm")), config)
    load_projector(model, path)
    tokenizer = tokenizer or load_tokenizer(str(folder / "llm"))
    return Listener(model, Recordings([], tokenizer, config | changed, model.projector.speech_len))


@pytest.fixture(scope="module")
def listener(learned) -> Listener:
    return load(learned)


def take(listener: Listener, talk: Shown, *turn, most: int = 64) -> list[tuple]:
    """What the page shows after each step: the messages, whether the answer begins, the status."""
    steps = []
    for begins, status in take_turn(listener, most, talk, *turn):
        steps.append(([message["content"] for message in talk.messages], begins, status))
    return steps


def recognized(folder: Path, result: Path, *flags) -> list[str]:
    paths = ["--projector_model_path", folder / "exp", "--data_path", folder / "data.jsonl"]
    script("recognize.py", *paths, "--result_path", result, "--num_beams", 1, *flags)
    return [json.loads(line)["hyp"] for line in result.read_text().splitlines()]


# The prompt


@pytest.mark.parametrize("template", [CHATML, GEMMA, DATED, THINKING, None])
def test_prompt_of_turns_is_the_chat_templates_with_speech_for_text(learned, template):
    tokenizer = make_tokenizer(template, bos="<bos>" if template == GEMMA else None)
    listener = load(learned, tokenizer, **render_prompt(tokenizer))
    turns = [SPOKEN.replace("<|instruction|>", "Ask."), "it rains", "and then?", "sun", SPOKEN, "ok", "bye"]
    said = [turn.replace(SPEECH_SLOT, "it rains on {monday}") for turn in turns]
    prompt = listener.prompt(turns).replace(SPEECH_SLOT, "it rains on {monday}")
    if template is None:
        first = "USER: it rains on {monday}\nAsk.\nASSISTANT:it rains<|im_end|>"
        assert prompt.startswith(first + "USER: and then?\nASSISTANT:sun<|im_end|>")
    else:
        roles = ("user", "assistant") * 4
        messages = [{"role": role, "content": turn} for role, turn in zip(roles, said)]
        assert prompt == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, [SPOKEN]) == listener.recordings.config["prompt"]  # as in training


def test_date_is_that_of_training(learned):
    tokenizer = make_tokenizer(DATED)
    rendered = render_prompt(tokenizer)
    then = rendered["prompt"].replace(str(date.today()), "2024-02-29")
    prompt = load(learned, tokenizer, **rendered | {"prompt": then}).prompt(["hello", "hi", SPOKEN])
    assert prompt.startswith("It is 2024-02-29.\n<|im_start|>user\nhello<|im_end|>")
    assert str(date.today()) not in prompt


def test_another_template_than_that_of_training_is_refused(learned):
    with refused("chat template", "in training"):
        load(learned, make_tokenizer(THINKING))


# The texts


def test_turn_gives_the_text_of_recognize(learned, listener, tmp_path):
    texts = [json.loads(line)["txt"] for line in (learned / "data.jsonl").read_text().splitlines()]
    hyps = recognized(learned, tmp_path / "result.jsonl")
    assert hyps == texts  # learned by heart
    for i, hyp in enumerate(hyps):
        steps = take(listener, Shown(), dataset.INSTRUCTION, str(learned / f"{i}.wav"))
        (wav, instruction, answer), _, status = steps[-1]
        assert (instruction, answer, status) == (dataset.INSTRUCTION, hyp, "")
        assert re.fullmatch(rf"{i}\.wav, \d\.\d s", wav)


def test_other_instruction_gives_the_text_of_recognize_and_the_transcript(learned, listener, tmp_path):
    asked = "Translate it."
    hyp = recognized(learned, tmp_path / "r.jsonl", "--instruction", asked, "--max_new_tokens", 40)[1]
    (_, transcript, instruction, answer), _, status = take(
        listener, Shown(), asked, str(learned / "1.wav"), most=40
    )[-1]
    text = json.loads((learned / "data.jsonl").read_text().splitlines()[1])["txt"]
    assert (transcript, instruction, answer) == (f"“{text}”", asked, hyp)
    assert status in ("", "cut at 40 tokens")


def test_answer_appears_token_by_token(learned, listener):
    steps = take(listener, Shown(), dataset.INSTRUCTION, str(learned / "3.wav"))
    answers = [messages[-1] for messages, _, _ in steps]
    assert len(set(answers)) > 10 and all(b.startswith(a) for a, b in zip(answers, answers[1:]))
    assert [begins for _, begins, _ in steps] == [True] + [False] * (len(steps) - 1)


def test_limit_is_told(learned, listener):
    messages, _, status = take(listener, Shown(), dataset.INSTRUCTION, str(learned / "3.wav"), most=3)[-1]
    assert (len(messages[-1]), status) == (3, "cut at 3 tokens")  # a token is a byte


def write(listener: Listener, conversation: Conversation) -> str:
    assert len(list(listener.write(conversation, 30))) > 1
    return conversation.turns[-1]


@torch.no_grad()
def test_cache_kept_over_turns_changes_nothing(learned, listener):
    heard = [listener.hear(str(learned / f"{i}.wav"))[0] for i in range(3)]
    kept, given = Conversation(), 0
    for text, speech in [("one", heard[0]), ("two", None), ("three", heard[1]), ("four", heard[2])]:
        kept.ask(text, speech)
        fresh = Conversation(kept.turns, kept.heard)
        embeddings, config = listener.embed(kept), listener.model.llm.config
        assert kept.roll_back(embeddings, config) >= given  # the prompt before is not computed again
        given = embeddings.shape[1]
        assert write(listener, kept) == write(listener, fresh)
        keys = [one.cache.layers[-1].keys for one in (kept, fresh)]
        torch.testing.assert_close(*keys, rtol=1e-4, atol=1e-4)
    kept.turns[1] = kept.turns[1][:-2] + "?"  # an earlier turn that reads otherwise
    fresh = Conversation(kept.turns, kept.heard)
    kept.ask("five"), fresh.ask("five")
    assert write(listener, kept) == write(listener, fresh)


# What is refused, and what comes after


@pytest.mark.parametrize(
    "turn, says",
    [
        (("",), "there is no text"),
        ((" \n",), "there is no text"),
        (("Transcribe.", None), "there is no speech yet"),
        (("", "ok.wav"), "there is no instruction"),
        ((f"a {SPEECH_SLOT} b",), f"{SPEECH_SLOT} stands for speech"),
        (("Transcribe.", "long.wav"), "error: long.wav: 31 s; a turn has at most 30 s"),
        (("Transcribe.", "garbage.wav"), "error: garbage.wav: LibsndfileError"),
        (("Transcribe.", "empty.wav"), "error: empty.wav: "),
        (("Transcribe.", "no_samples.wav"), "error: no_samples.wav: "),
        (("Transcribe.", "gone.wav"), "error: no such audio file: gone.wav"),
        (("many " * 300,), "of the LLM's 1024; begin a new one"),
    ],
)
def test_errors_are_words_and_leave_the_conversation_as_it_was(listener, learned, clips, turn, says):
    def file(name):
        return (str(clips / name),) if name else (name,)

    turn, talk = (turn[0], *file(turn[1])) if len(turn) > 1 else turn, Shown()
    take(listener, talk, "hello", most=5)
    turns, messages = list(talk.turns), list(talk.messages)
    *_, (_, begins, status) = take(listener, talk, *turn)
    assert status.startswith("error: ") and says in status and str(clips) not in status and not begins
    assert (talk.turns, talk.messages, len(talk.heard)) == (turns, messages, 0)
    assert take(listener, talk, dataset.INSTRUCTION, str(learned / "0.wav"))[-1][2] != status


def test_what_fails_in_the_middle_is_told_and_undone(listener, monkeypatch):
    talk, llm = Shown(), listener.model.llm
    take(listener, talk, "hello", most=5)
    messages, calls = list(talk.messages), []

    def fail(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("no more memory")
        return forward(*args, **kwargs)

    forward = llm.forward
    with monkeypatch.context() as patch:
        patch.setattr(llm, "forward", fail)
        assert take(listener, talk, "again")[-1][2] == "error: OutOfMemoryError: no more memory"
    assert talk.messages == messages
    take(listener, talk, "again", most=5)
    fresh = Conversation(talk.turns[:-1])
    list(listener.write(fresh, 5))
    assert fresh.turns == talk.turns


def test_stopped_turn_stays_and_the_next_follows(listener):
    talk = Shown()
    turn = take_turn(listener, 64, talk, "hello")
    for _ in range(4):
        next(turn)
    turn.close()
    assert len(talk.turns) == 2 and talk.messages[-1]["content"] == talk.turns[1]
    assert take(listener, talk, "and then?", most=5)[-1][2] == "cut at 5 tokens" and len(talk.turns) == 4


def test_missing_gradio_is_one_line(learned, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with refused("pip install -r requirements-chat.txt"):
        script("chat.py", "--projector_model_path", learned / "exp")


# The page in a browser


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs `pip install playwright`")
    pytest.importorskip("gradio", reason="needs `pip install -r requirements-chat.txt`")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs chromium")
    flags = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    flags += " --disable-sync --use-fake-ui-for-media-stream --use-fake-device-for-media-stream"
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags.split())
        yield browser
        browser.close()


SLOWLY = """
import runpy, time, conversation
write = conversation.Listener.write
def slowly(*args):
    for cut in write(*args):
        yield cut
        time.sleep(0.02)
conversation.Listener.write = slowly
runpy.run_path("chat.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def url(browser, learned, tmp_path_factory):
    """Where chat.py serves the page, at 50 tokens a second, as LLMs of a useful size write."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", SLOWLY, "--projector_model_path", learned / "exp", "--port", port]
    command += ["--max_new_tokens", 300]
    folder = tmp_path_factory.mktemp("uploads")
    environ = os.environ | {"GRADIO_TEMP_DIR": str(folder), "PYTHONUNBUFFERED": "1"}
    with open(folder / "log", "w") as log:
        how = dict(cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=log)
        server = subprocess.Popen([*map(str, command)], **how)
    line = server.stdout.readline().decode().strip()
    assert line == f"http://127.0.0.1:{port}", (folder / "log").read_text()
    yield line
    server.terminate()
    server.wait(30)


SEEN = """() => {  // all that the LLM's turns have been on the page
    window.seen = []
    new MutationObserver(() => {
        const bot = document.querySelector('[data-testid=bot]')
        if (bot && !window.seen.includes(bot.innerText.trim())) window.seen.push(bot.innerText.trim())
    }).observe(document.body, {subtree: true, childList: true, characterData: true})
}"""


class Page:
    """The page in a window of so many pixels, as a user sees it."""

    def __init__(self, browser, url: str, width: int = 1280, scheme: str = "light"):
        size = {"width": width, "height": 900}
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.page.set_default_timeout(20_000)
        self.asked, self.failed = [], []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.failed.append(str(error)))
        self.page.goto(url)
        self.typed = self.page.get_by_role("textbox", name="Type")
        self.status = self.page.get_by_role("textbox", name="Status")
        self.typed.wait_for()

    @contextmanager
    def uploading(self):
        """Waits until what is uploaded in here is there, and the page knows."""
        with self.page.expect_response(lambda response: "/upload" in response.url):
            yield
        self.page.get_by_label("Clear").first.wait_for()
        self.page.wait_for_timeout(300)

    def speak(self, path: Path, instruction: str | None = None) -> None:
        with self.uploading():
            self.page.locator("input[type=file]").first.set_input_files(path)
        if instruction:
            self.page.get_by_label("Instruction").fill(instruction)
            self.page.keyboard.press("Enter")
        self.page.get_by_role("button", name="Send the speech").click()

    def type(self, text: str) -> None:
        self.typed.fill(text)
        self.typed.press("Enter")

    def says(self, status: str) -> None:
        """Waits until the status is this."""
        self.page.wait_for_function(
            "status => [...document.querySelectorAll('textarea')].some(area => area.value.includes(status))",
            arg=status,
        )

    def messages(self, count: int, whose: str = "bot") -> list[str]:
        """Of the LLM ("bot") or the "user", once there are so many and nothing is written any more."""
        found = self.page.get_by_test_id(whose)
        found.nth(count - 1).wait_for()
        self.page.wait_for_function(
            "() => ![...document.querySelectorAll('textarea')].some(a => /^(writ|listen)ing$/.test(a.value))"
        )
        return [text.strip() for text in found.all_inner_texts()]


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (400, "dark")])
def test_page_shows_the_text_of_an_uploaded_recording(browser, url, learned, tmp_path, width, scheme):
    texts = [json.loads(line)["txt"] for line in (learned / "data.jsonl").read_text().splitlines()]
    page = Page(browser, url, width, scheme)
    page.page.evaluate(SEEN)
    page.speak(learned / "1.wav")
    assert page.messages(1) == [texts[1]]
    assert len([seen for seen in page.page.evaluate("window.seen") if texts[1].startswith(seen)]) > 3
    page.type("and then?")
    assert len(page.messages(2)) == 2
    page.speak(learned / "2.wav", "Say it otherwise.")
    page.page.get_by_test_id("bot").nth(2).wait_for()
    said = " ".join(page.messages(1, "user"))
    assert "1.wav, 1.4 s" in said and "and then?" in said and "Say it otherwise." in said
    assert f"“{texts[2]}”" in said
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width  # nothing sticks out
    assert {asked.split("/")[2] for asked in page.asked if asked.startswith("http")} == {url.split("/")[2]}
    assert page.failed == []
    page.page.screenshot(path=tmp_path / "page.png", full_page=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000
    page.page.get_by_role("button", name="New conversation").click()
    page.page.get_by_test_id("bot").first.wait_for(state="detached")
    page.page.close()


def test_page_tells_errors_in_words_and_goes_on(browser, url, learned, clips, tmp_path):
    page = Page(browser, url)
    page.page.get_by_role("button", name="Send the speech").click()
    page.says("error: there is no speech yet")
    page.speak(clips / "long.wav")
    page.says("error: long.wav: 31 s; a turn has at most 30 s")
    page.page.get_by_label("Clear").first.click()
    noise = np.random.default_rng(0).integers(-(2**15), 2**15, 6 * 2**20, dtype=np.int16)
    soundfile.write(tmp_path / "huge.wav", noise, 16000)
    page.page.locator("input[type=file]").first.set_input_files(tmp_path / "huge.wav")
    page.page.get_by_text("exceed the maximum allowed size of 10").wait_for()
    page.page.reload()
    page.speak(learned / "0.wav")
    texts = [json.loads(line)["txt"] for line in (learned / "data.jsonl").read_text().splitlines()]
    assert page.messages(1) == texts[:1]
    page.page.close()


def test_two_pages_have_conversations_of_their_own(browser, url, learned):
    texts = [json.loads(line)["txt"] for line in (learned / "data.jsonl").read_text().splitlines()]
    pages = [Page(browser, url) for _ in range(2)]
    for i, page in enumerate(pages):
        page.speak(learned / f"{i}.wav")
    for i, page in enumerate(pages):
        assert page.messages(1) == [texts[i]]
        page.page.close()


def begin_a_long_answer(page: Page) -> None:
    page.type("tell me a long story")  # to which this LLM writes 300 tokens, and more
    page.says("writing")
    page.page.wait_for_function("document.querySelector('[data-testid=bot]')?.innerText.length > 5")


def test_stop_ends_an_answer_and_the_conversation_goes_on(browser, url, learned):
    page = Page(browser, url)
    begin_a_long_answer(page)
    page.page.get_by_role("button", name="Stop", exact=True).click()
    page.says("stopped")
    page.page.wait_for_timeout(500)
    stopped = page.page.get_by_test_id("bot").inner_text().strip()
    page.page.wait_for_timeout(1000)  # enough for 50 tokens, and one may have been under way
    assert len(page.page.get_by_test_id("bot").inner_text().strip()) < len(stopped) + 5
    page.speak(learned / "0.wav")
    assert page.messages(2)[0].startswith(stopped)
    page.page.close()


def test_closing_a_page_in_the_middle_leaves_the_others_working(browser, url, learned):
    page, other = (Page(browser, url) for _ in range(2))
    begin_a_long_answer(page)
    page.page.close()
    other.speak(learned / "0.wav")
    texts = [json.loads(line)["txt"] for line in (learned / "data.jsonl").read_text().splitlines()]
    assert other.messages(1) == texts[:1]
    other.page.close()


def test_microphone_is_heard(browser, url):
    page = Page(browser, url)
    page.page.get_by_label("Record audio").or_(page.page.get_by_title("Record audio")).first.click()
    page.page.get_by_role("button", name="Record").first.click()
    stops = page.page.get_by_role("button", name="Stop", exact=True)  # of the recording, and of an answer
    stops.nth(1).wait_for()
    page.page.wait_for_timeout(1500)
    with page.uploading():
        stops.first.click()
    assert page.page.get_by_label("Share").or_(page.page.get_by_title("Share")).count() == 0
    page.page.get_by_role("button", name="Send the speech").click()
    page.messages(1)
    assert re.search(r"\.wav, \d\.\d s", " ".join(page.messages(1, "user")))
    page.page.close()
