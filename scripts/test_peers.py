"""transformers' and PEFT's own model tests, bare and with an audible memory in every model: what passes bare alone,
and why.

    python scripts/test_peers.py [family …] [peft]        or `make test-peers`

The tests are those of the installed version, out of its sdist, which pip brings from the registry; they are never
committed. transformers' sdist has the tests that all models share, but not those of generation and export, nor each
family's own, in whose place tests/peers/families.py has small models. PEFT's has all; its decoder tests run here, on
a small Llama in place of the hub's (tests/peers/small_hub.py). TRL's has no tests, so
tests/hf/training tests some of its trainers. Takes about a minute a family, and ten for PEFT.
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
    "test_prompt_learning_with_gradient_checkpointing": "virtual tokens are refused, before their own refusal",
    "test_resize_tokens_embeddings": "a vocabulary that is resized while memory is attached is refused",
    "test_save_load": NO_MEMORY,
}
"""Why a test passes bare and not with memory, by its name;"""
REFUSALS = {
    "puts virtual tokens before the text": "virtual tokens are refused, as they have no ids",
    "and this call has none (inputs_embeds alone)": "embeddings without ids are refused",
}
"""or by what its error says. Any other is a fault."""


def fetch(package: str) -> Path:
    """The folder of a package's unpacked sdist."""
    version = importlib.metadata.version(package)
    folder = BUILD / f"{package}-{version}"
    pip = [sys.executable, "-m", "pip", "--quiet"]
    if not (folder / "tests").is_dir():
        only = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
        subprocess.run([*pip, "download", *only, f"{package}=={version}", "-d", str(BUILD)], check=True)
        with tarfile.open(folder.with_name(f"{folder.name}.tar.gz")) as archive:
            members = [one for one in archive if one.name.startswith(f"{folder.name}/tests/")]
            archive.extractall(BUILD, members, filter="data")
    return folder


def fetch_transformers() -> Path:
    folder = fetch("transformers")
    if not (BUILD / "site" / "parameterized").is_dir():
        site = ["install", "--no-deps", "--target", str(BUILD / "site"), "parameterized"]
        subprocess.run([sys.executable, "-m", "pip", "--quiet", *site], check=True)
    for name, mixin in ABSENT.items():
        path = folder / "tests" / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"class {mixin}:\n    pass\n")
    return folder


def fetch_peft() -> Path:
    folder, diffusers = fetch("peft"), BUILD / "peft-site" / "diffusers"
    (folder / "tests" / "__init__.py").touch()
    # Named at the top of its tests, for models of pictures.
    diffusers.mkdir(parents=True, exist_ok=True)
    (diffusers / "__init__.py").write_text("class StableDiffusionPipeline:\n    pass\n")
    return folder


def run(folder: Path, tests: Path, wanted: str, *plugins: str) -> dict[str, list[str]]:
    """{test: [outcome, what its error says]}"""
    here, outcomes = ROOT / "tests" / "peers", BUILD / "outcomes.json"
    given = ["-p", "audible_memory", "--outcomes", str(outcomes), *plugins]
    # Without the project's own settings of pytest.
    alone = ["-q", "-n", "0", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={tests.parent}"]
    site = "peft-site" if "small_hub" in plugins else "site"
    paths = [ROOT, ROOT / "tests", here, folder, BUILD / site]
    subprocess.run(
        [sys.executable, "-m", "pytest", *alone, *given, tests, "-k", wanted],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
        stdout=subprocess.DEVNULL,
    )
    found: dict[str, list[str]] = json.loads(outcomes.read_text())
    return found


def compare(bare: dict[str, list[str]], attached: dict[str, list[str]]) -> int:
    """Print what passes bare and not with memory; return how many do for no known reason."""
    passed = [name for name, (outcome, _) in bare.items() if outcome == "passed"]
    faults = 0
    for family in dict.fromkeys(name.split("::")[0] for name in bare):
        of_family = [name for name in passed if name.startswith(f"{family}::")]
        lost = [name for name in of_family if attached.get(name, ["missing", ""])[0] != "passed"]
        print(f"{family.removeprefix('Test_')}: {len(of_family)} pass bare, {len(of_family) - len(lost)} with memory")
        why: dict[str, list[str]] = {}
        for name in lost:
            error = attached.get(name, ["", "not run"])[1]
            test = name.split("::")[1].split("[")[0]
            reason = next((reason for text, reason in REFUSALS.items() if text in error), REASONS.get(test))
            faults += reason is None
            why.setdefault(reason or f"FAULT: {error}", []).append(test)
        for reason, tests in why.items():
            print(f"    {len(tests)}: {reason}: {', '.join(dict.fromkeys(tests))}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    families = parser.parse_args().families
    wanted = [family for family in families if family != "peft"]
    faults = 0
    if wanted or not families:
        tests, which = ROOT / "tests" / "peers" / "families.py", " or ".join(f"Test_{family}" for family in wanted)
        folder = fetch_transformers()
        faults += compare(*(run(folder, tests, which or "Test_", *more) for more in (["--bare"], [])))
    if "peft" in families or not families:
        folder = fetch_peft()
        tests, which = folder / "tests" / "test_decoder_models.py", "Llama"
        faults += compare(*(run(folder, tests, which, "-p", "small_hub", *more) for more in (["--bare"], [])))
    sys.exit(f"{faults} tests pass bare and not with memory, for no known reason" if faults else 0)


if __name__ == "__main__":
    main()
