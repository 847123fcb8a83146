"""`make fuzz`: folders of damaged and mixed files without end, chosen by which lines of the library they reach.

    python tests/fuzz/fuzz_folders.py [-max_total_time=SECONDS] [-runs=N] [FILE of a failure, to repeat it]

Needs `atheris` (pip install -e ".[fuzz]"). Arguments are libFuzzer's. The inputs that reached something new are kept
in .fuzz/ and begin the next run. A failure is left in the folder it was started from, as crash-*.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["sense_v2.engram"]):
    import folder_cases
    import folder_oracle

CORPUS = Path(".fuzz")
REPORT_EVERY = 5_000
# Opening tells little of how far it came, so that short inputs first would stay short for long.
OPTIONS = ("-max_len=80", "-len_control=0")


def main() -> None:
    outcomes: Counter[str] = Counter()

    def once(data: bytes) -> None:
        with folder_cases.quick_folder() as folder:
            outcomes[folder_oracle.open_case(folder_cases.make_case(data, folder))] += 1

        if outcomes.total() % REPORT_EVERY == 0:
            print(*(f"{count:9,} {text}" for text, count in outcomes.most_common()), sep="\n", flush=True)

    CORPUS.mkdir(exist_ok=True)
    folder_cases.history(), folder_cases.history(1)
    atheris.Setup([sys.argv[0], str(CORPUS), *OPTIONS, *sys.argv[1:]], once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
