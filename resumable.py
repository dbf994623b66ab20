"""Work in batches that several processes share, and that goes on where it was killed."""

import glob
import json
import os
from contextlib import suppress
from typing import IO

from errors import Refused, refusing


class Parts:
    """Results of batches, kept beside `path` until all are there: each process appends to a file of its own.

    The first line of a file is the settings it was made with; each other line is a whole batch. The number of
    processes may change between runs. Raises Refused if a file was begun with other settings.
    """

    def __init__(self, path: str, settings: dict, rank: int):
        self.path, self.settings, self.rank = path, settings, rank
        self.file: IO[bytes] | None = None

    def paths(self) -> list[str]:
        return sorted(glob.glob(glob.escape(self.path) + ".part-*[0-9]"))

    def parse(self, path: str, content: bytes) -> dict[int, list]:
        """What the lines of a file hold, without one that was not finished. Raises Refused."""
        with refusing(f"{path}: not what was kept of a run; remove it", ValueError, TypeError):
            begun, *kept = map(json.loads, content.split(b"\n")[:-1] or [json.dumps(self.settings)])
            done = {int(number): list(results) for number, results in kept}
            names, settings = {**begun, **self.settings}, self.settings
            other = [name for name in names if begun.get(name) != settings.get(name)]
        if other:
            raise Refused(f"{path}: begun with other {', '.join(other)}; go on with the same, or remove it")
        return done

    def read(self) -> dict[int, list]:
        """The results of each batch that was finished, by its number."""
        done = {}
        for path in self.paths():
            with suppress(FileNotFoundError), open(path, "rb") as file:  # one that finished removes them
                done |= self.parse(path, file.read())
        return done

    def append(self, number: int, results: list) -> None:
        """Keeps the results of a batch, all of them or, if killed meanwhile, none."""
        if self.file is None:
            self.file = open(f"{self.path}.part-{self.rank}", "a+b")
            self.file.seek(0)
            whole = self.file.read().rfind(b"\n") + 1
            self.file.truncate(whole)
            if not whole:
                self.file.write(json.dumps(self.settings).encode() + b"\n")
        self.file.write(json.dumps([number, results], ensure_ascii=False).encode() + b"\n")
        self.file.flush()

    def finish(self, lines: list[str]) -> None:
        """Writes the lines to `path`, whole or not at all, and removes what was kept beside it."""
        new = f"{self.path}.part-{self.rank}.new"
        with open(new, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
        with suppress(FileNotFoundError):  # two may finish at once, with the same lines; one is the first
            os.replace(new, self.path)
        for path in [*self.paths(), *glob.glob(glob.escape(self.path) + ".part-*.new")]:
            with suppress(FileNotFoundError):
                os.remove(path)
