"""Texts that a language model generates, kept in pieces: a kill loses one, none is made twice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_lightning.runtime.clock import duration
from kd_lightning.runtime.console import Pace
from kd_lightning.runtime.errors import KDError
from kd_lightning.runtime.files import alone
from kd_lightning.runtime.seals import read_sealed, write_sealed

PIECE = 64
"""Texts in a file: the most that a kill loses."""

Tokens = list[int]


@dataclass(frozen=True)
class KeptTexts:
    """Generated texts as tokens: sealed files of `PIECE` each, beside their settings.

    Attributes:
        folder: Where they are, named after all that decides them.
        prompts: What each begins with.
        key: What decides them.
        by: What generates them, for messages.
    """

    folder: Path
    prompts: Sequence[Sequence[int]]
    key: dict[str, Any]
    by: str

    @property
    def pieces(self) -> int:
        """How many files there are in the end."""
        return -(-len(self.prompts) // PIECE)

    def path(self, number: int) -> Path:
        """Return the file of a piece."""
        return self.folder / f"{number:06d}.json"

    def __iter__(self) -> Iterator[tuple[Tokens, Tokens]]:
        """Yield the prompt and the new tokens of each text.

        Raises:
            KDError: A piece is damaged, or is not there.
        """
        for number in range(self.pieces):
            yield from self._read(number)

    def _read(self, number: int) -> list[tuple[Tokens, Tokens]]:
        file, again = self.path(number), "it is generated anew"
        found = [(_numbers(one["prompt"]), _numbers(one["new"])) for one in read_sealed(file, again)["texts"]]
        if [prompt for prompt, _ in found] != [list(one) for one in self._prompts_of(number)]:
            raise KDError(f"{file}: its texts begin otherwise: {again}")
        return found

    def _prompts_of(self, number: int) -> Sequence[Sequence[int]]:
        return self.prompts[number * PIECE : (number + 1) * PIECE]

    def complete(
        self,
        draw: Callable[[Sequence[Sequence[int]], int], list[Tokens]],
        decode: Callable[[Tokens], str],
        batch_size: int,
        say: Callable[[str], None],
    ) -> None:
        """Generate the pieces that are missing or damaged; one process does, others wait for it.

        Args:
            draw: Returns what comes after some prompts, of which the first has a number.
            decode: Returns tokens as text, which the files have for readers.
            batch_size: Prompts in a call of `draw`.
            say: Receives lines of progress.
        """
        with alone(self.folder / ".lock", lambda line: say(f"{line}, which generates {self.folder}")):
            todo = [number for number in range(self.pieces) if not self._intact(number, say)]
            count, begun = len(self.prompts), time.monotonic()
            if not todo:
                say(f"{self.by}  {count} generated texts are in {self.folder}")
                return
            write_sealed(self.folder / "settings.json", self.key)
            pace, tokens = Pace(), 0
            for done, number in enumerate(todo):
                texts = []
                prompts = self._prompts_of(number)
                for start in range(0, len(prompts), batch_size):
                    chosen = prompts[start : start + batch_size]
                    for prompt, new in zip(chosen, draw(chosen, number * PIECE + start), strict=True):
                        ids = {"prompt": " ".join(map(str, prompt)), "new": " ".join(map(str, new))}
                        texts.append({**ids, "text": decode(new)})
                        tokens += len(new)
                write_sealed(self.path(number), {"texts": texts})
                if pace.due:
                    left = pace.left(done + 1, len(todo))
                    say(f"{self.by}  generated {done + 1} of {len(todo)} times {PIECE} texts, {left}")
        new_texts = min(len(todo) * PIECE, count)
        took = f"{tokens} tokens in {duration(time.monotonic() - begun)}"
        say(f"{self.by}  generated {new_texts} of {count} texts, {took}, kept in {self.folder}")

    def _intact(self, number: int, say: Callable[[str], None]) -> bool:
        if not self.path(number).is_file():
            return False
        try:
            self._read(number)
        except KDError as error:
            say(f"{self.by}  {error}")
            return False
        return True


def _numbers(text: str) -> Tokens:
    return [int(token) for token in text.split()]
