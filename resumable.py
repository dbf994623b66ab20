"""Work in batches that several processes share, and that goes on where it was killed."""

import glob
import json
import os
from contextlib import suppress
from typing import IO

from errors import Refused


class Parts:
    """Results of batches, kept beside `path` until all are there: each process appends to a file of its own.

    The first line of a file is the settings it was made with; each other line is a whole batch. The number of
    processes may change between runs. Raises Refused if a file was begun with other settings.
    """

    def __init__(self, path: str, settings: dict, rank: int):
        self.path, self.settings, self.rank = path, settings, rank
        self.file: IO[bytes] | None = None

    def paths(self) -> list[str]:
        return sorted(glob.glob(glob.escape(self.path) + ".part-*"))

    def read(self) -> dict[int, list]:
        """The results of each batch that was finished, by its number."""
        done = {}
        for path in self.paths():
            lines = []
            with suppress(FileNotFoundError), open(path, "rb") as file:  # one that finished removes them
                lines = file.read().split(b"\n")[:-1]  # the last is empty, or was not finished
            for number, content in enumerate(map(json.loads, lines)):
                if number:
                    done[content[0]] = content[1]
                elif content != self.settings:
                    other = ", ".join(
                        name for name in self.settings if content.get(name) != self.settings[name]
                    )
                    raise Refused(f"{path}: begun with other {other}; go on with the same, or remove it")
        return done

    def append(self, number: int, results: list) -> None:
        """Keeps the results of a batch, all of them or, if killed meanwhile, none."""
        if self.file is None:
            self.file = open(f"{self.path}.part-{self.rank}", "a+b")
            self.file.seek(0)
            self.file.truncate(self.file.read().rfind(b"\n") + 1)
            if not self.file.tell():
                self.file.write(json.dumps(self.settings).encode() + b"\n")
        self.file.write(json.dumps([number, results], ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def finish(self, lines: list[str]) -> None:
        """Writes the lines to `path`, whole or not at all, and removes what was kept beside it."""
        with open(f"{self.path}.{os.getpid()}", "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
        os.replace(file.name, self.path)
        for path in self.paths():
            with suppress(FileNotFoundError):  # two processes may have finished at once
                os.remove(path)
