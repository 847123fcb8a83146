"""A tokenizer -> its shadow map on disk, unless the same map is there already.

A map that is there and differs is kept unless `force` is given: a table that was trained with it needs it.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sense_v2.core.errors import with_way_out
from sense_v2.engram.tokenizer import EngramTokenizer, EngramTokenizerBuilder, check_output_path

NUM_EXAMPLES = 3
SPELLINGS_SHOWN = 6


@dataclass(frozen=True)
class SetupResult:
    """A map on disk, and what a person wants to know of it."""

    path: Path
    status: str
    """written, or up to date: a map of this content was there and stays as it is."""
    builder: EngramTokenizerBuilder

    def to_dict(self) -> dict[str, Any]:
        """For JSON. "examples" are texts that share one compressed id, a list for each of a few ids."""
        facts = self.builder.description()
        return {
            "path": self.path,
            "status": self.status,
            "tokenizer": self.builder.tokenizer_name,
            "normalization": self.builder.normalization,
            "vocab_size": facts.vocab_size,
            "compressed_vocab_size": facts.compressed_vocab_size,
            "saved_percent": 100 * (1 - facts.compressed_vocab_size / facts.vocab_size),
            "sha256": facts.sha256,
            "file_bytes": self.path.stat().st_size,
            "examples": shared_spellings(self.builder),
        }

    def lines(self) -> list[str]:
        """For a terminal."""
        facts = self.to_dict()
        lines = [
            f"tokenizer      {facts['tokenizer']}",
            f"normalization  {facts['normalization']}",
            f"token ids      {facts['vocab_size']:,}",
            f"compressed     {facts['compressed_vocab_size']:,} ids, {facts['saved_percent']:.1f} % fewer",
        ]
        for spellings in facts["examples"]:
            more = len(spellings) - SPELLINGS_SHOWN
            shown = " ".join(repr(text) for text in spellings[:SPELLINGS_SHOWN])
            lines.append(f"one id for     {shown}{f' and {more} more' if more > 0 else ''}")
        return [
            *lines,
            f"SHA-256        {facts['sha256']}",
            f"map            {self.path}, {facts['file_bytes']:,} bytes, {self.status}",
        ]


def make_shadow_map(builder: EngramTokenizerBuilder, output: str | os.PathLike[str], *, force: bool) -> SetupResult:
    """Write the shadow map of a tokenizer, and its JSON beside it.

    Args:
        builder: Knows the tokenizer and the normalization.
        output: The map's path, NAME.npy. A map of the same content stays as it is.
        force: True to overwrite the map of another tokenizer.

    Raises:
        FileExistsError: Another map is there, and `force` isn't given.
        ValueError: `output` would take the place of something else.
        OSError: There is no room.
    """
    path = Path(output)
    check_output_path(path)
    up_to_date = path.exists() and not force and _is_up_to_date(path, builder)
    if not up_to_date:
        builder.build_mapping(path)
    return SetupResult(path, "up to date" if up_to_date else "written", builder)


@contextmanager
def temporary_shadow_map(builder: EngramTokenizerBuilder) -> Iterator[EngramTokenizer]:
    """A map that is there as long as the context lasts."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "shadow_map.npy"
        builder.build_mapping(path)
        yield EngramTokenizer(path)


def shared_spellings(builder: EngramTokenizerBuilder, count: int = NUM_EXAMPLES) -> list[list[str]]:
    """The texts of the `count` words that most tokens spell."""
    spellings: dict[int, list[str]] = {}
    for compressed_id, text in zip(builder.mapping().tolist(), builder.token_texts, strict=True):
        if text is not None and len(text.strip()) > 2 and text.strip().isalpha():
            spellings.setdefault(compressed_id, []).append(text)
    several = [texts for texts in spellings.values() if len(texts) > 1]
    return sorted(several, key=len, reverse=True)[:count]


def _is_up_to_date(path: Path, builder: EngramTokenizerBuilder) -> bool:
    """Whether the map at `path` is the one to be written. Raises `FileExistsError` where it is another."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a map without its JSON gets one below
            there = EngramTokenizer(path)
    except (OSError, ValueError) as error:
        raise with_way_out(
            FileExistsError(f"{path} is there and can't be used"), f"--force overwrites it ({error})"
        ) from error
    if there.sha256 == builder.description().sha256:
        return there.description is not None
    raise with_way_out(
        FileExistsError(
            f"{path} is the map of {there.tokenizer_name or 'an unnamed tokenizer'} "
            f"({there.normalization or 'unknown'}, {there.vocab_size:,} token ids, {there.compressed_vocab_size:,} "
            f"compressed), and not of {builder.tokenizer_name} ({builder.normalization}, {builder.vocab_size:,} "
            f"token ids, {builder.description().compressed_vocab_size:,} compressed)"
        ),
        "Tables made with it need it: choose another --output, or overwrite it with --force",
    )
