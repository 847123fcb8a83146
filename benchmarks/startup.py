"""How long the program takes before it does anything: its help, and `generate` on a small saved model.

The physics. A help text needs Python and the parser of a command line; a model needs torch and transformers, which
take seconds to import, and its file read. So the peers are Python alone, `import typer`, and a script that imports
torch and transformers, loads the same model without memory by the Auto classes and takes the same greedy tokens.
Each is a process of its own; all of them take turns, in an order drawn anew for each round. Times are taken on the
wall and of the processor.

    python benchmarks/startup.py [--rounds 7] [--imports]

`--imports` lists what an import of the program costs, module by module (`python -X importtime`). The last line of
stdout is JSON: medians with the tenth and ninetieth percentile, and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reading import say
from transformers import PreTrainedTokenizerFast
from turns import machine

from sense_v2.core.config import EngramConfig
from sense_v2.hf.attach import attach_engram
from sense_v2.hf.experiments.step_times import spread
from sense_v2.hf.saving.save import save_pretrained
from sense_v2.hf.training.fresh_model import END_OF_TEXT, fresh_backbone, train_bpe

PROMPT, NEW_TOKENS = "def main(", 16
PROGRAM = ("-m", "sense_v2.cli.main")
BARE = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, prompt, new_tokens = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
encoded = tokenizer(prompt, return_tensors="pt")
with torch.inference_mode():
    found = model.generate(**encoded, max_new_tokens=int(new_tokens), do_sample=False)
print(tokenizer.decode(found[0]))
"""


def make_models(folder: Path) -> tuple[Path, Path]:
    """(a model with memory, the same without), both with a tokenizer; as large as the demo's."""
    tokenizer = train_bpe([path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)
    model = fresh_backbone(len(wrapped), seed=0)
    bare, with_memory = folder / "bare", folder / "with_memory"
    model.save_pretrained(bare)
    wrapped.save_pretrained(bare)
    config = EngramConfig(
        table_size=500_000,
        engram_dim=256,
        num_heads=2,
        layer_indices=[1],
        storage_path=str(folder / "table.dat"),
        shadow_map_path=str(folder / "map.npy"),
    )
    attach_engram(model, config, wrapped)
    save_pretrained(model, with_memory, tokenizer=wrapped)
    return with_memory, bare


def timed(command: tuple[str, ...]) -> tuple[float, float]:
    """(seconds on the wall, seconds of the processor) of a Python process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(commands: dict[str, tuple[str, ...]], rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    order, names = random.Random(0), list(commands)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for turn in range(-1, rounds):
        order.shuffle(names)
        for name in names:
            taken = timed(commands[name])
            if turn >= 0:  # the first round fills the page cache
                found[name].append(taken)
    return {
        name: {"wall": spread([wall for wall, _ in taken]), "processor": spread([cpu for _, cpu in taken])}
        for name, taken in found.items()
    }


def import_times(*arguments: str, most: int = 25) -> list[dict[str, Any]]:
    """The imports of a call that take longest, with all that they import: milliseconds."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *PROGRAM, *arguments], capture_output=True, text=True, check=True
    )
    lines = re.findall(r"^import time: +\d+ \| +(\d+) \| +(\S+)$", done.stderr, re.MULTILINE)
    found = [{"module": module, "milliseconds": int(micros) / 1000} for micros, module in lines]
    return sorted(found, key=lambda one: -one["milliseconds"])[:most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--imports", action="store_true", help="list what takes longest to import for --help")
    parser.add_argument("--quick", action="store_true", help="one round: a look, no measurement")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as name:
        with_memory, bare = make_models(Path(name))
        generate = (str(with_memory), PROMPT, "--max-new-tokens", str(NEW_TOKENS), "--temperature", "0")
        commands = {
            "python": ("-c", "pass"),
            "import typer": ("-c", "import typer"),
            "import torch": ("-c", "import torch"),
            "bare generate": ("-c", BARE, str(bare), PROMPT, str(NEW_TOKENS)),
            "--version": (*PROGRAM, "--version"),
            "--help": (*PROGRAM, "--help"),
            "generate --help": (*PROGRAM, "generate", "--help"),
            "generate": (*PROGRAM, "generate", *generate),
        }
        seconds = measure(commands, 1 if arguments.quick else arguments.rounds)
    ratios = {
        f"{ours} / {peer}": {
            clock: round(seconds[ours][clock]["median"] / seconds[peer][clock]["median"], 2)
            for clock in ("wall", "processor")
        }
        for ours, peer in (("--help", "import typer"), ("--version", "import typer"), ("generate", "bare generate"))
    }
    for case, taken in seconds.items():
        say(case, {clock: f"{values['median']:.3f} s" for clock, values in taken.items()})
    for case, both in ratios.items():
        say(case, both)
    result: dict[str, Any] = {"benchmark": "startup", "machine": machine(), "seconds": seconds, "ratios": ratios}
    if arguments.imports:
        result["imports"] = import_times("--help")
        for one in result["imports"]:
            print(f"  {one['milliseconds']:8.1f} ms {one['module']}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
