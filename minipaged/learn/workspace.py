"""A learner's folder: copies of the lessons, and a small file that remembers what was solved and which hints were read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from minipaged.errors import InputError
from minipaged.learn.catalog import Lesson, lessons, tutorials_folder

PROGRESS = ".minipaged-lessons.json"
BESIDE = ("README.md", "glossary.md")


class Workspace:
    """One learner's folder. The progress file is read once and replaced whole at each change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            stored = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
            self._solved: dict[str, list[int]] = {k: [int(t) for t in v] for k, v in stored["solved"].items()}
            self._hints: dict[str, int] = {k: int(v) for k, v in stored["hints"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise InputError(
                f"{folder / PROGRESS} cannot be read: delete it and run minipaged learn start {folder}"
            ) from None

    @classmethod
    def start(cls, folder: Path) -> tuple[Workspace, list[str]]:
        """Copy the lessons that are not there yet. Returns the folder and the files that were copied; none is overwritten."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if folder.resolve() == tutorials_folder().resolve():
                raise InputError(f"{folder} holds the lessons themselves: choose another folder for your copy")
            sources = [one.path for one in lessons()] + [tutorials_folder() / name for name in BESIDE]
            copied = [source.name for source in sources if not (folder / source.name).exists()]
            for source in sources:
                if source.name in copied:
                    shutil.copyfile(source, folder / source.name)
            if not (folder / PROGRESS).exists():
                _write(folder / PROGRESS, {"solved": {}, "hints": {}})
        except OSError as error:
            raise InputError(f"cannot write to {folder}: {error.strerror}") from None
        return cls(folder), copied

    @classmethod
    def find(cls, chosen: Path | None) -> Workspace:
        """The folder that was named, else this folder, else ./lessons. InputError if none was started."""
        candidates = [chosen] if chosen is not None else [Path(), Path("lessons")]
        for folder in candidates:
            if (folder / PROGRESS).is_file():
                return cls(folder)
        place = f"{chosen} is no folder of lessons" if chosen is not None else "there is no folder of lessons here"
        raise InputError(f"{place}: make one with `minipaged learn start DIR`, then cd into it or give --dir DIR")

    def file(self, one: Lesson) -> Path:
        """The learner's copy of a lesson. InputError if it is gone."""
        path = self.folder / one.path.name
        if not path.is_file():
            raise InputError(f"{path} is not there: bring it back with `minipaged learn reset {one.number}`")
        return path

    def solved(self, one: Lesson) -> list[int]:
        """Tasks that have passed at the last check."""
        return self._solved.get(str(one.number), [])

    def note_solved(self, one: Lesson, tasks: list[int]) -> None:
        """Remember a check."""
        self._solved[str(one.number)] = tasks
        self._save()

    def next_hint(self, one: Lesson, task: int, most: int) -> int:
        """The level of the next hint for a task, from 1; at the last level it stays there."""
        key = f"{one.number}.{task}"
        self._hints[key] = min(self._hints.get(key, 0) + 1, most)
        self._save()
        return self._hints[key]

    def reset(self, one: Lesson) -> Path | None:
        """A fresh copy of a lesson. What was written there is kept beside it; returns where."""
        path = self.folder / one.path.name
        kept = None
        if path.exists() and path.read_bytes() != one.path.read_bytes():
            kept = next(p for n in range(1, 10**6) if not (p := path.with_suffix(f".mine{n}.py")).exists())
            path.rename(kept)
        shutil.copyfile(one.path, path)
        self._solved.pop(str(one.number), None)
        self._hints = {key: level for key, level in self._hints.items() if not key.startswith(f"{one.number}.")}
        self._save()
        return kept

    def _save(self) -> None:
        _write(self.folder / PROGRESS, {"solved": self._solved, "hints": self._hints})


def _write(path: Path, stored: dict[str, Any]) -> None:
    """Replace the file whole, so that a crash leaves the old one or the new one."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)
