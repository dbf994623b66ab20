"""A page to speak with the LLM, or type, in several turns: http://127.0.0.1:7860

    pip install -r requirements-chat.txt
    python chat.py --projector_model_path exp/asr

What is said, up to 30 s a turn, stands in the prompt as speech. Its transcript, by the same projector, is
only shown. Greedy, as recognize.py with --num_beams 1; one turn at a time, whoever asks. The page can be
reached from this machine only, and fetches nothing from any other.
"""

import argparse
import os
import time
import traceback
from collections.abc import Iterator

import torch

from conversation import Conversation, Listener
from dataset import INSTRUCTION, Recordings, load_tokenizer
from encoder import load_encoder
from errors import Refused, refusing
from manifest import MAX_SECONDS
from model import SpeechLLM, load_config, load_llm, load_projector

INSTRUCTIONS = [
    INSTRUCTION,
    "Please translate the following audio into German text.",
    "Please answer the question in the audio.",
    "Continue the following text in a coherent and engaging style with less than 40 words.",
]
UPLOAD, WAITING = "10mb", 8  # the size of an upload; turns in the queue
REFRESH = 0.04  # seconds; a browser cannot keep up with 1,000 tokens a second


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--projector_model_path", required=True, help="model.safetensors, or the folder of it")
    add("--llm_model_name_or_path", help="default: as in config.json")
    add("--whisper_model_name_or_path", help="default: as in config.json")
    add("--instructions", nargs="+", default=INSTRUCTIONS, help="to choose from; any other can be written")
    add("--max_new_tokens", type=int, default=256, help="of an answer; default: 256")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="default: the LLM's own")
    add("--port", type=int, default=7860, help="default: 7860")
    args = parser.parse_args()
    if args.max_new_tokens < 1:
        parser.error("--max_new_tokens must be at least 1")
    return args


class Shown(Conversation):
    """A conversation, and the messages of it on the page."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def show(self, role: str, content: str) -> None:
        self.messages.append({"role": role, "content": content})


def take_turn(
    listener: Listener, most: int, talk: Shown, said: str | None, path: str | None = ""
) -> Iterator[tuple[bool, str]]:
    """Adds what was typed, or an instruction and the audio file it is for, and an answer of `most` tokens.

    Yields whether the answer just begins, and what else there is to say. If that is an error, the
    conversation is again what it was. path: None where a file should be, and is not.
    """
    lists, said, status = (talk.turns, talk.heard, talk.messages), (said or "").strip(), ""
    before = [list(one) for one in lists]
    try:
        if path is None:
            raise Refused("there is no speech yet: record it, or upload a file")
        if not said:
            raise Refused("there is no instruction" if path else "there is no text")
        heard, frames = listener.hear(path) if path else (None, 0)
        if path:
            talk.show("user", f"{os.path.basename(path)}, {frames / 100:.1f} s")
            if said != INSTRUCTION:  # else the answer is the transcript
                alone = Conversation()
                alone.ask(INSTRUCTION, heard)
                talk.show("user", "")
                for _ in listener.write(alone, 64 + frames // 4):  # as recognize.py
                    talk.messages[-1]["content"] = f"“{alone.turns[-1]}”"
                    yield False, "listening"
        talk.ask(said, heard)
        talk.show("user", said)
        talk.show("assistant", "")
        for tokens, cut in enumerate(listener.write(talk, most)):
            talk.messages[-1]["content"] = talk.turns[-1]
            status = f"cut at {tokens} tokens" if cut else ""
            yield tokens == 0, status or "writing"
    except Exception as error:  # whatever it is, the page tells it and goes on
        if not isinstance(error, Refused):
            traceback.print_exc()
        told = error.told if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
        name = os.path.basename(path or "")  # an upload's folder says nothing to the user
        status = "error: " + told.removeprefix(": ").replace(path or "", name)
        for one, items in zip(lists, before):
            one[:] = items
        talk.fed = []  # a layer's cache may be longer than another's
    yield False, status


def open_page(listener: Listener, instructions: list[str], most: int, port: int) -> None:
    """Serves the page until interrupted. Raises Refused if gradio is not there, or the port not free."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with refusing("chat.py needs `pip install -r requirements-chat.txt`", ImportError):
        import gradio

    def answer(talk, *turn):
        shown = 0.0
        for begins, status in take_turn(listener, most, talk, *turn):
            if begins or time.monotonic() > shown + REFRESH:
                yield talk, talk.messages, status, None if begins else gradio.skip()
                shown = time.monotonic()
        yield talk, talk.messages, status, gradio.skip()

    with gradio.Blocks(title="Ears", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        talk = gradio.State(Shown)
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320):
                look = dict(height=None, min_height=240, max_height=560, buttons=["copy"])
                messages = gradio.Chatbot(label="Conversation", render_markdown=False, **look)
                typed = gradio.Textbox(label="Type", placeholder="and press Enter", submit_btn=True)
                status = gradio.Textbox(label="Status", interactive=False)
            with gradio.Column(scale=1, min_width=320):
                label = f"Speak or upload, up to {MAX_SECONDS} s"
                audio = gradio.Audio(label=label, type="filepath", buttons=[])  # none to publish it
                label = "Instruction: choose one, or write your own"
                instruction = gradio.Dropdown(instructions, label=label, allow_custom_value=True)
                speak = gradio.Button("Send the speech", variant="primary")
                with gradio.Row():
                    stop = gradio.Button("Stop", min_width=80)
                    anew = gradio.Button("New conversation", min_width=80, scale=2)
        outputs, one_at_a_time = [talk, messages, status], dict(concurrency_id="llm", concurrency_limit=1)
        turns = [
            typed.submit(answer, [talk, typed], [*outputs, typed], **one_at_a_time),
            speak.click(answer, [talk, instruction, audio], [*outputs, audio], **one_at_a_time),
        ]
        # what was under way when it was stopped still says that it is writing
        stop.click(None, cancels=turns).then(lambda: time.sleep(0.3) or "stopped", None, status)
        begin_anew = [lambda: (Shown(), [], ""), None, outputs]
        gradio.on([anew.click, messages.clear], *begin_anew, cancels=turns)
    theme = gradio.themes.Default(font=("system-ui", "sans-serif"))
    where = dict(server_name="127.0.0.1", server_port=port, share=False)
    how = dict(max_file_size=UPLOAD, theme=theme, footer_links=[], quiet=True, prevent_thread_lock=True)
    with refusing(f"--port {port}", OSError):
        page.queue(max_size=WAITING).launch(**where, **how)
    print(f"http://127.0.0.1:{port}", flush=True)
    page.block_thread()


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path, config = load_config(args.projector_model_path)
    llm_name = args.llm_model_name_or_path or config["llm_model_name_or_path"]

    encoder = load_encoder(args.whisper_model_name_or_path or config["whisper_model_name_or_path"])
    llm = load_llm(llm_name, args.dtype if args.dtype == "auto" else getattr(torch, args.dtype))
    model = SpeechLLM(encoder, llm, config).to(device)
    load_projector(model, path)
    recordings = Recordings([], load_tokenizer(llm_name), config, model.projector.speech_len)

    open_page(Listener(model, recordings), args.instructions, args.max_new_tokens, args.port)


if __name__ == "__main__":
    main()
