"""Checks that the installed wheel works where there is no checkout.

    python -I scripts/wheel_smoke.py CHECKOUT    with the Python of an empty environment, as `make wheel` does
    python -I scripts/wheel_smoke.py CHECKOUT --plain    where nothing could be compiled

The checkout is only looked at, for what the wheel ought to hold. Needs to run in a folder outside of it. Exits with
status 1 and a line per problem.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

PACKAGE = "sense_v2"
# Modules that nothing imports before it has looked whether their extra is installed, and what that extra brings.
OF_EXTRAS = {
    "sense_v2.hf.serving.engines": "fastapi",
    "sense_v2.report.charts": "matplotlib",
    "sense_v2.report.play.page": "gradio",
    "sense_v2.report.plots": "matplotlib",
}


def check_contents(checkout: Path) -> str:
    """Every file of the package, templates and py.typed included, is in the wheel."""
    installed = Path(str(importlib.import_module(PACKAGE).__file__)).parent
    if not installed.is_relative_to(Path(sys.prefix).resolve()):
        raise AssertionError(f"{PACKAGE} comes from {installed}, not from the environment {sys.prefix}")
    listed = subprocess.run(["git", "ls-files", "-z", PACKAGE], cwd=checkout, capture_output=True, check=False)
    if listed.returncode == 0:
        wanted = [Path(name).relative_to(PACKAGE) for name in listed.stdout.decode().split("\0") if name]
    else:  # an unpacked archive
        everything = (checkout / PACKAGE).rglob("*")
        wanted = [p.relative_to(checkout / PACKAGE) for p in everything if p.is_file() and p.suffix != ".pyc"]
    missing = [str(name) for name in wanted if not (installed / name).is_file()]
    if missing:
        raise AssertionError(f"not in the wheel: {', '.join(missing)} (package-data in pyproject.toml?)")
    if not (installed / "py.typed").is_file():
        raise AssertionError("py.typed is missing")
    return f"{len(wanted)} files in {installed}"


def check_imports(checkout: Path) -> str:
    """Every module imports with nothing but the declared dependencies, but those of extras, which name theirs."""
    names = sorted(
        ".".join(path.relative_to(checkout).with_suffix("").parts).removesuffix(".__init__")
        for path in (checkout / PACKAGE).rglob("*.py")
        if path.name != "__main__.py"  # importing it would run it
    )
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != OF_EXTRAS.get(name):
                raise
    return f"{len(names)} modules"


def check_names(checkout: Path) -> str:
    """Every public name of sense_v2.engram resolves."""
    engram = importlib.import_module(f"{PACKAGE}.engram")
    for name in engram.__all__:
        getattr(engram, name)
    return f"{len(engram.__all__)} names"


def check_metadata(checkout: Path) -> str:
    """The version, the licence text, and the version the code states."""
    metadata = importlib.metadata.metadata("sense-v2")
    stated = importlib.import_module(PACKAGE).__version__
    if metadata["Version"] != stated:
        raise AssertionError(f"the wheel is {metadata['Version']}, {PACKAGE}.__version__ is {stated}")
    files = importlib.metadata.files("sense-v2") or []
    if not any(path.name == "LICENSE" for path in files):
        raise AssertionError("the licence text is missing")
    return f"sense-v2 {stated}"


def check_compiled(checkout: Path) -> str:
    """The compiled part is there; or, with `--plain`, isn't, and the library says so."""
    gather = importlib.import_module(f"{PACKAGE}.engram.reading.gather")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        gather._load_compiled()  # again: what was said at the first import is gone
    has_said = any("no compiled part" in str(warning.message) for warning in said)
    hashes = importlib.import_module(f"{PACKAGE}.engram.table.checksums").compiled
    is_plain = "--plain" in sys.argv
    ngrams = importlib.import_module(f"{PACKAGE}.engram.hashing").compiled
    if (gather.compiled is None, hashes is None, ngrams is None, has_said) != (is_plain,) * 4:
        raise AssertionError(f"{gather.compiled}, {hashes}, {ngrams}, said: {has_said}")
    files = ", ".join(Path(one.__file__).name for one in (gather.compiled, ngrams) if one is not None)
    return "nothing, and it is said" if is_plain else f"{files}, {hashes.__name__}"


def check_command(checkout: Path) -> str:
    """`sense-engram --help` ends with status 0."""
    if not (checkout / PACKAGE / "cli" / "main.py").exists():
        return "skipped: sense_v2/cli/main.py isn't written yet"
    command = Path(sys.executable).with_name("sense-engram")
    done = subprocess.run([str(command), "--help"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"status {done.returncode}\n{done.stdout}{done.stderr}")
    return f"{len(done.stdout.splitlines())} lines of help"


def check_table(checkout: Path) -> str:
    """A small table is made, written to, closed, opened again, and gives its rows; the file holds the same bytes."""
    import numpy as np
    import torch

    from sense_v2.engram.storage import MMapEmbeddingStorage

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "engram_table.dat"
        table = MMapEmbeddingStorage(1009, 16, path, seed=1)
        row_ids = torch.tensor([[3, 1008, 3]])
        table.write(torch.tensor([1008]), torch.arange(16.0).reshape(1, 16))
        rows = table(row_ids).detach().numpy()
        table.flush()
        table.close()
        again = MMapEmbeddingStorage(1009, 16, path, seed=1, mode="r")
        raw = np.fromfile(path, "<f4").reshape(1009, 16)
        if not (again(row_ids).numpy() == rows).all() or not (raw[row_ids.numpy()] == rows).all():
            raise AssertionError("the rows that were read back aren't the rows that were written")
        if rows[0, 1].tolist() != list(range(16)) or not rows[0, 0].any():
            raise AssertionError(f"unexpected rows {rows}")
        again.close()
        return f"{raw.nbytes} bytes"


CHECKS: tuple[Callable[[Path], str], ...] = (
    check_contents,
    check_metadata,
    check_imports,
    check_names,
    check_compiled,
    check_command,
    check_table,
)


def main(checkout: Path) -> int:
    if Path.cwd().resolve().is_relative_to(checkout):
        sys.exit(f"run this outside of the checkout, not in {Path.cwd()}")
    failed = 0
    for check in CHECKS:
        label = check.__name__.removeprefix("check_")
        try:
            print(f"ok      {label}: {check(checkout)}", flush=True)
        except Exception:
            failed += 1
            print(f"FAILED  {label}\n{traceback.format_exc()}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[2:] not in ([], ["--plain"]):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve()))
