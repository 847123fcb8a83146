"""Count how often control passes from one file of sense_v2 to another: in a forward, in a commit, up to a first step.

    python scripts/count_borders.py            the figures
    python scripts/count_borders.py --calls    and below each, the calls that make it up

A call of a function of one file from another file is two crossings: there and back again. Caller and callee are both
in sense_v2; what lies between them (torch, transformers, typer, contextlib) is looked through, so a hook that torch
calls is called by the code that called torch. A call is counted where its function begins: a generator once and not
at each resumption, a comprehension as part of its file. What an import runs isn't counted, nor other threads.

    forward   one training forward (no KV cache) of a tiny Llama with memory before one layer
    commit    storage.commit after a training step, the second of its table
    train     `sense-engram train`, from its arguments to the first step of the row optimizer

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM

import sense_v2
from sense_v2.cli.main import main as sense_engram
from sense_v2.core.config import EngramConfig
from sense_v2.engram.optim import RowWiseAdagrad
from sense_v2.hf.attach import attach_engram

GOALS = {"forward": 20, "commit": 30, "train": 300}
VOCABULARY = 96
PACKAGE = f"{Path(sense_v2.__file__).parent}/"
FIRST_STEP = ("engram/optim.py", "step")


class Borders:
    """A profile function that counts calls from file to file, until `stop` (a file and a function) is called."""

    def __init__(self, stop: tuple[str, str] | None = None) -> None:
        self.calls: Counter[tuple[str, str, str]] = Counter()
        """(caller's file, callee's file, function)."""
        self.stopped = False
        self._stop = stop
        # The frames themselves: an id would be used again.
        self._generators: set[FrameType] = set()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or self.stopped or not code.co_filename.startswith(PACKAGE):
            return
        if code.co_flags & inspect.CO_GENERATOR:
            if frame in self._generators:
                return
            self._generators.add(frame)
        callee = code.co_filename.removeprefix(PACKAGE)
        if (callee, code.co_name) == self._stop:
            self.stopped = True
            return
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
            caller = caller.f_back
        if caller is None or code.co_name == "<module>" or caller.f_code.co_filename == code.co_filename:
            return
        self.calls[caller.f_code.co_filename.removeprefix(PACKAGE), callee, code.co_name] += 1

    @property
    def crossings(self) -> int:
        """There and back."""
        return 2 * self.calls.total()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Counts what runs in the block, in this thread."""
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)


def count_forward_and_commit(folder: Path) -> tuple[Borders, Borders]:
    """What a step of a plain training loop crosses, after its first, in which files and buffers are made.

    The forward is the shortest of a few. On a busy machine a gather takes long now and then, and the one after it
    asks whether that was the disk.
    """
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    model = LlamaForCausalLM(shape)
    tokenizer = Tokenizer(models.WordLevel({f"word{number}": number for number in range(VOCABULARY)}))
    config = EngramConfig(
        storage_path=str(folder / "engram_table.dat"),
        shadow_map_path=str(folder / "shadow_map.npy"),
        table_size=1_500,
        engram_dim=32,
        num_heads=2,
        layer_indices=[1],
    )
    attach_engram(model, config, tokenizer)
    model.train()
    memory: Any = model.engram
    torch.nn.init.normal_(memory.layers["1"].W_v.weight)
    optimizer = RowWiseAdagrad(memory.storage, lr=0.1)
    token_ids_BT = torch.randint(0, VOCABULARY, (2, 16))
    forwards, commits = [], []
    for step in range(1, 6):
        forward, commit = Borders(), Borders()
        forwards.append(forward)
        commits.append(commit)
        with forward.counted():
            loss = model(input_ids=token_ids_BT, labels=token_ids_BT, use_cache=False).loss
        loss.backward()
        optimizer.step()
        with commit.counted():
            memory.storage.commit(step)
    memory.storage.close()
    return min(forwards[1:], key=lambda forward: forward.crossings), commits[1]


def count_train(folder: Path) -> Borders:
    """What `sense-engram train` crosses on a corpus of a few files."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for file in range(12):
        lines = [f"def function_{file}_{line}(value):\n    return value + {line}\n" for line in range(60)]
        (corpus / f"module_{file}.py").write_text("\n".join(lines))
    options = ["--batch-size", "2", "--sequence-length", "16", "--table-size", "2000", "--steps", "1"]
    borders = Borders(stop=FIRST_STEP)
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said), borders.counted():
        status = sense_engram(["train", "--corpus", str(corpus), "--output", str(folder / "out"), *options])
    if status or not borders.stopped:
        raise RuntimeError(f"train ended with status {status}, before its first step:\n{said.getvalue()}")
    return borders


def main() -> None:
    """Prints the figures, the last line as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", action="store_true", help="the calls that each figure is made up of")
    shows_calls = parser.parse_args().calls
    with tempfile.TemporaryDirectory() as name:
        forward, commit = count_forward_and_commit(Path(name))
        counted = {"forward": forward, "commit": commit, "train": count_train(Path(name))}
    for name, borders in counted.items():
        print(f"{name:8} {borders.crossings:4} borders crossed (goal: at most {GOALS[name]})")
        for (caller, callee, function), count in borders.calls.items() if shows_calls else ():
            print(f"  {count:4} {caller} -> {callee}: {function}")
    print(json.dumps({name: borders.crossings for name, borders in counted.items()}))


if __name__ == "__main__":
    main()
