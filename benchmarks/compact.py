"""How fast compact rows become numbers, against plain torch, and what a lookup in a compact table costs.

The physics: decoding reads a byte and writes two (bfloat16) or four (float32) a value, so the ceiling is torch's own
copy of as many bytes between buffers that are there, measured first. The peers are what a torch user would write:
`copy_` of float8 values into a buffer (without their scales, which ours applies), and `torch.mul` of int8 values with
their rows' scales. All write into buffers that exist. The candidates take turns, in an order that changes.

    python benchmarks/compact.py --rows 32768 --width 1024 --rounds 15

The last line of stdout is JSON: medians and spread in milliseconds, ratios to the peer and shares of the ceiling.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from turns import machine

from sense_v2.engram.table.compact_rows import FLOAT8, INT8, decode, encode, join, split
from sense_v2.hf.experiments.step_times import spread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    num_rows, width = arguments.rows, arguments.width
    values = torch.randn(num_rows, width, generator=torch.Generator().manual_seed(0)) * 0.02
    (codes8, scales8), (codes_i8, scales_i8) = encode(values, FLOAT8), encode(values, INT8)
    on_disk = {FLOAT8: join(codes8, scales8), INT8: join(codes_i8, scales_i8)}
    out = {torch.float32: torch.zeros(num_rows, width), torch.bfloat16: torch.zeros(num_rows, width).bfloat16()}
    source = {dtype: buffer.clone() for dtype, buffer in out.items()}
    product = torch.zeros(num_rows, width)

    def peer_scaled(buffer: torch.Tensor) -> None:
        buffer.copy_(codes8)
        blocks = buffer.unflatten(1, (-1, 32))
        blocks.mul_(scales8.view(torch.float8_e8m0fnu).to(buffer.dtype)[..., None])

    ways: dict[str, Callable[[], object]] = {}

    def add_ways(dtype: torch.dtype, buffer: torch.Tensor) -> None:
        name = str(dtype).removeprefix("torch.")
        ways[f"copy of {name} (ceiling)"] = lambda: buffer.copy_(source[dtype])
        ways[f"float8 to {name}, copy_ without scales (peer)"] = lambda: buffer.copy_(codes8)
        if width % 32 == 0:
            ways[f"float8 to {name}, copy_ and mul_ (peer)"] = lambda: peer_scaled(buffer)
        ways[f"float8 to {name}, ours"] = lambda: decode(codes8, scales8, buffer)
        ways[f"float8 to {name}, ours, from rows as on disk"] = lambda: decode(
            *split(on_disk[FLOAT8], width, FLOAT8), buffer
        )
        ways[f"int8 to {name}, ours"] = lambda: decode(codes_i8, scales_i8, buffer)
        ways[f"int8 to {name}, ours, from rows as on disk"] = lambda: decode(
            *split(on_disk[INT8], width, INT8), buffer
        )

    for dtype, buffer in out.items():
        add_ways(dtype, buffer)
    ways["int8 to float32, torch.mul (peer)"] = lambda: torch.mul(codes_i8, scales_i8, out=out[torch.float32])
    ways["int8 to bfloat16, torch.mul (peer)"] = lambda: out[torch.bfloat16].copy_(
        torch.mul(codes_i8, scales_i8, out=product)
    )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(-2, arguments.rounds):  # the first two only warm up
        first = round_number % len(ways)
        for name in [*ways, *ways][first : first + len(ways)]:
            start = time.perf_counter()
            ways[name]()
            if round_number >= 0:
                seconds[name].append(time.perf_counter() - start)
    found = {name: spread([1e3 * value for value in values]) for name, values in seconds.items()}
    ratios = {}
    for kind in ("float8", "int8"):
        for target in ("float32", "bfloat16"):
            ours = found[f"{kind} to {target}, ours"]["median"]
            for name in found:
                if name.startswith(f"{kind} to {target}") and name.endswith("(peer)"):
                    ratios[name] = round(found[name]["median"] / ours, 2)
    for name in sorted(found, key=lambda name: "ceiling" not in name):
        times = found[name]
        ceiling = found[f"copy of {'float32' if 'float32' in name else 'bfloat16'} (ceiling)"]["median"]
        ratio = f"  ours is {ratios[name]:.2f}x as fast" if name in ratios else ""
        print(
            f"{name:55} {times['median']:7.1f} ms ({times['low']:.1f} to {times['high']:.1f})  "
            f"{ceiling / times['median']:4.0%} of the ceiling{ratio}"
        )
    result = {
        "benchmark": "compact",
        "rows": num_rows,
        "width": width,
        "rounds": arguments.rounds,
        "machine": machine(),
        "milliseconds": found,
        "ours_times_as_fast": ratios,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
