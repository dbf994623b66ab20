"""What `continuation.py --api_base` costs by itself: its rate and memory, where the server answers at once.

    python benchmarks/continuation_api.py --lines 100000

1.7 minutes on 2 cores: 1064 a second at concurrency 64 (1 run). Prints the rate, and the resident
memory at each tenth of the way: flat, since no more than --concurrency requests are open, and what was
answered is in the partial file.
"""

import argparse
import asyncio
import json
import multiprocessing
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import make_tokenizer  # noqa: E402


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """One connection of HTTP/1.1: each request is completed by 20 words."""
    choice = {"index": 0, "text": "and so on " * 7, "finish_reason": "stop", "logprobs": None}
    completion = {"id": "1", "object": "text_completion", "created": 1, "model": "fake", "choices": [choice]}
    body = json.dumps(completion).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
    try:
        while True:
            asked = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", asked)[1]))
            writer.write(head + body)
    except asyncio.IncompleteReadError:
        writer.close()


def serve(listening: socket.socket) -> None:
    async def run() -> None:
        await (await asyncio.start_server(answer, sock=listening)).serve_forever()

    asyncio.run(run())


def resident(pid: int) -> float:
    """MiB of a process in memory; 0 when it has just ended."""
    size = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(size[1]) / 1024 if size else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--concurrency", type=int, default=64)
    args = parser.parse_args()
    listening = socket.create_server(("127.0.0.1", 0))
    server = multiprocessing.Process(target=serve, args=(listening,), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer().save_pretrained(folder / "llm")
        soundfile.write(folder / "a.wav", np.zeros(16000), 16000)
        line = {"wav": "a.wav", "txt": "the words of one utterance, as many as there are in three seconds"}
        with open(folder / "data.jsonl", "w") as file:
            for i in range(args.lines):
                file.write(json.dumps(line | {"key": str(i), "duration": 1}) + "\n")
        flags = f"--llm_model_name_or_path {folder}/llm --data_path {folder}/data.jsonl"
        flags += f" --result_path {folder}/blsp.jsonl --concurrency {args.concurrency}"
        flags += f" --api_base http://127.0.0.1:{listening.getsockname()[1]}/v1 --api_model fake"
        command = [sys.executable, ROOT / "continuation.py", *flags.split()]
        client = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        sizes, partial = [], folder / "blsp.jsonl.partial-0"
        while client.poll() is None:
            if partial.exists():
                sizes.append(resident(client.pid))
            time.sleep(0.1)
        written = len((folder / "blsp.jsonl").read_text().splitlines())
    tenths = [f"{sizes[i * (len(sizes) - 1) // 10]:.0f}" for i in range(11)]
    print(f"exit code {client.returncode}, {written} lines, MiB in memory: {' '.join(tenths)}")


if __name__ == "__main__":
    main()
