"""transformers' own model tests, bare and with an audible memory in every model: what passes bare alone, and why.

    python scripts/test_peers.py [family …]        or `make test-peers`

The tests are those of the installed version, out of its sdist, which pip brings from the registry; they are never
committed. The sdist has the tests that all models share, but not those of generation and export, nor each family's
own, in whose place tests/peers/families.py has small models. Takes about a minute a family.
"""

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "peers"
# Modules that the shared tests import and the sdist lacks.
ABSENT = {"generation/test_utils.py": "GenerationTesterMixin", "exporters/test_export.py": "ExportTesterMixin"}

NO_MEMORY = "a class's own from_pretrained makes a model without memory"
REASONS = {
    "test_can_init_all_missing_weights": NO_MEMORY,
    "test_correct_missing_keys": "expects weights to be missing, as the memory's aren't the base model's; none are",
    "test_from_pretrained_no_checkpoint": NO_MEMORY,
    "test_inputs_embeds": "embeddings without ids are refused",
    "test_resize_tokens_embeddings": "a vocabulary that is resized while memory is attached is refused",
    "test_save_load": NO_MEMORY,
}
"""Why a test passes bare and not with memory. Any other is a fault."""


def fetch() -> Path:
    """The unpacked sdist's folder."""
    version = importlib.metadata.version("transformers")
    folder = BUILD / f"transformers-{version}"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    if not (folder / "tests").is_dir():
        only = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        subprocess.run([*pip, "download", *only, f"transformers=={version}", "-d", str(BUILD)], check=True)
        with tarfile.open(folder.with_name(f"{folder.name}.tar.gz")) as archive:
            members = [one for one in archive if one.name.startswith(f"{folder.name}/tests/")]
            archive.extractall(BUILD, members, filter="data")
        subprocess.run([*pip, "install", "--no-deps", "--target", str(BUILD / "site"), "parameterized"], check=True)
    for name, mixin in ABSENT.items():
        path = folder / "tests" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"class {mixin}:\n    pass\n")
    return folder


def run(folder: Path, families: list[str], *, bare: bool) -> dict[str, list[str]]:
    """{test: [outcome, what its error says]}"""
    here, outcomes = ROOT / "tests" / "peers", BUILD / "outcomes.json"
    wanted = ["-k", " or ".join(f"Test_{family}" for family in families)] if families else []
    plugin = ["-p", "audible_memory", "--outcomes", str(outcomes), *(["--bare"] if bare else [])]
    # Without the project's own settings of pytest.
    alone = ["-q", "-n", "0", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={here}"]
    paths = [ROOT, ROOT / "tests", here, folder, BUILD / "site"]
    subprocess.run(
        [sys.executable, "-m", "pytest", *alone, *plugin, here / "families.py", *wanted],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.DEVNULL,
    )
    found: dict[str, list[str]] = json.loads(outcomes.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    families = parser.parse_args().families
    folder = fetch()
    bare, attached = (run(folder, families, bare=bare) for bare in (True, False))
    passed = [name for name, (outcome, _) in bare.items() if outcome == "passed"]
    faults = 0
    for family in dict.fromkeys(name.split("::")[0] for name in bare):
        of_family = [name for name in passed if name.startswith(f"{family}::")]
        lost = [name for name in of_family if attached.get(name, ["missing", ""])[0] != "passed"]
        print(f"{family.removeprefix('Test_')}: {len(of_family)} pass bare, {len(of_family) - len(lost)} with memory")
        for name in lost:
            test = name.split("::")[1]
            faults += test not in REASONS
            print(f"    {test}: {REASONS.get(test) or 'FAULT: ' + attached.get(name, ['', 'not run'])[1]}")
    sys.exit(f"{faults} tests pass bare and not with memory, for no known reason" if faults else 0)


if __name__ == "__main__":
    main()
