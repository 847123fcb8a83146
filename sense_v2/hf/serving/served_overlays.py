"""The overlays that a server's requests may name: the deltas of one folder, as its files are now.

    request for "MODEL+facts" ──gate──▶ is there a facts.safetensors in the folder? ──▶ `answering("facts")`
    an engine                 ──▶ `loaded(model)`: what the model calls that file's delta, read if it is new

A file that comes is an overlay, one that was replaced is read anew, one that goes is none any more. Requests that are
being answered keep what they began with. A name in a request is compared with the names in the folder, and no path is
made of it. Everything here runs in the server's event loop.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from sense_v2.hf.overlays import load_overlay, unload_overlay

log = logging.getLogger("sense_v2.serve")

_answered: ContextVar[tuple[str, list[str]] | None] = ContextVar("overlay", default=None)
"""The overlay of the request that is answered, and what the model calls the versions of it that the answer uses."""


class ServedOverlays:
    """The deltas of a folder, by the names of their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.current: dict[str, tuple[Any, str]] = {}
        """Name -> (what tells its file from others, what the model calls it)."""
        self._model: Any = None
        self._in_use: Counter[str] = Counter()
        self._num_loaded = 0

    def files(self) -> dict[str, Path]:
        """List the overlays that there are, and let go of those that aren't."""
        found = {path.stem: path for path in sorted(self.folder.glob("*.safetensors")) if path.name[0] != "."}
        for name in self.current.keys() - found.keys():
            self._retire(name)
        return found

    @contextmanager
    def answering(self, name: str | None) -> Iterator[None]:
        """Answer a request that names this overlay, or none."""
        held: list[str] = []
        token = _answered.set(None if name is None else (name, held))
        try:
            yield
        finally:
            _answered.reset(token)
            for version in held:
                self._in_use[version] -= 1
                self._sweep(version)

    def loaded(self, model: Any) -> str | None:
        """Find what the model calls the overlay of the request that is answered; None if it names none.

        Raises `ValueError` or `OSError` if its file can't be read, or is another table's.
        """
        answered = _answered.get()
        if answered is None:
            return None
        name, held = answered
        path, self._model = self.folder / f"{name}.safetensors", model
        told = path.stat()
        stamp = (told.st_ino, told.st_size, told.st_mtime_ns)
        if name not in self.current or self.current[name][0] != stamp:
            version = f"{name}@{self._num_loaded + 1}"
            load_overlay(model, version, path)
            self._retire(name)
            self._num_loaded += 1
            self.current[name] = stamp, version
            log.info("overlay %s read from %s", name, path)
        version = self.current[name][1]
        self._in_use[version] += 1
        held.append(version)
        return version

    def _retire(self, name: str) -> None:
        if name in self.current:
            _, version = self.current.pop(name)
            self._sweep(version)

    def _sweep(self, version: str) -> None:
        """Let go of a version that no name stands for and no answer uses."""
        if self._in_use[version] == 0 and all(version != one for _, one in self.current.values()):
            unload_overlay(self._model, version)
            del self._in_use[version]
