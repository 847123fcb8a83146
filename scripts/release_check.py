"""Checks what a release is made of, and writes its notes.

    python scripts/release_check.py dist                # what was built there, and the versions of this checkout
    python scripts/release_check.py dist --tag v0.1.0   # this tag may be set: the changelog has a date
    python scripts/release_check.py --notes             # the release's notes, from CHANGELOG.md

The version stands in sense_v2/__init__.py: pyproject.toml reads it there; CITATION.cff and CHANGELOG.md have to say
the same. Exits with status 1 and a line per problem.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMPILED_OF = ("sense_v2/engram/_ngrams", "sense_v2/engram/reading/_gather", "sense_v2/engram/table/_row_hashes")
"""The extensions of a wheel that isn't for every machine, without the end of the name, which differs."""
OF_THE_SDIST = (
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "setup.py",
    "sense_v2/py.typed",
    "third_party/xxhash.h",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "sense_v2").rglob("*.[ch]"))),
)


def version_of(checkout: Path) -> str:
    """The version that sense_v2/__init__.py states."""
    tree = ast.parse((checkout / "sense_v2" / "__init__.py").read_text(encoding="utf-8"))
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__version__":
            return str(ast.literal_eval(statement.value))
    raise SystemExit(f"{checkout}/sense_v2/__init__.py states no __version__")


def _sections(changelog: str) -> Iterator[tuple[str, str]]:
    """(heading, text) of each version."""
    parts = re.split(r"^## +(.*)$", changelog, flags=re.MULTILINE)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def _heading_of(changelog: str, version: str) -> tuple[str, str] | None:
    name = re.compile(rf"\[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d|\[Unreleased\]: {re.escape(version)}")
    return next(((heading, text) for heading, text in _sections(changelog) if name.fullmatch(heading.strip())), None)


def notes_of(changelog: str, version: str) -> str | None:
    """What the changelog says of a version; None if it has no such section."""
    found = _heading_of(changelog, version)
    return found[1].strip() + "\n" if found else None


def disagreements(checkout: Path, tag: str | None = None) -> Iterator[str]:
    """What states another version than the package does. With a tag, it and a date in the changelog count, too."""
    version = version_of(checkout)
    cited = re.search(r"^version: *(.*)$", (checkout / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)
    if cited is None or cited[1].strip("\"' ") != version:
        yield f"CITATION.cff has version {cited[1] if cited else None}, sense_v2/__init__.py {version}"
    found = _heading_of((checkout / "CHANGELOG.md").read_text(encoding="utf-8"), version)
    if found is None or not found[1].strip():
        headings = f"`## [{version}] - DATE`, or `## [Unreleased]: {version}`"
        yield f"CHANGELOG.md has no notes of {version}, under a heading {headings}"
    elif tag is not None and "Unreleased" in found[0]:
        yield f"CHANGELOG.md has {version} as unreleased: a version that is tagged has a date"
    if tag is not None and tag != f"v{version}":
        yield f"the tag is {tag}, sense_v2/__init__.py has {version}"


def missing_from(dist: Path, version: str) -> Iterator[str]:
    """What the wheels and the sdist in a folder lack, or which of them there isn't."""
    wheels, sdists = sorted(dist.glob("*.whl")), sorted(dist.glob("*.tar.gz"))
    for what, files, prefix in (
        ("wheel", wheels, f"sense_v2-{version}-"),
        ("sdist", sdists, f"sense_v2-{version}.tar.gz"),
    ):
        if not files:
            yield f"{dist} has no {what}"
        for file in files:
            if not file.name.startswith(prefix):
                yield f"{file.name} isn't of version {version}"
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
        if not wheel.name.endswith("-none-any.whl"):
            for compiled in COMPILED_OF:
                if not any(re.fullmatch(rf"{compiled}\.[^/]+", name) and _is_library(name) for name in names):
                    yield f"{wheel.name} lacks the compiled {compiled}: was there a compiler?"
        if "sense_v2/py.typed" not in names:
            yield f"{wheel.name} lacks sense_v2/py.typed"
    for sdist in sdists:
        with tarfile.open(sdist) as archive:
            held = {name.partition("/")[2] for name in archive.getnames()}
        for name in OF_THE_SDIST:
            if name not in held:
                yield f"{sdist.name} lacks {name}"


def _is_library(name: str) -> bool:
    return name.endswith((".so", ".pyd"))


def main() -> int:
    parser = argparse.ArgumentParser(description="Checks what a release is made of.")
    parser.add_argument("dist", nargs="?", type=Path, help="the folder with the wheels and the sdist")
    parser.add_argument("--tag", help="the tag that is to be set")
    parser.add_argument("--notes", action="store_true", help="write the release's notes instead")
    arguments = parser.parse_args()
    version = version_of(ROOT)
    if arguments.notes:
        notes = notes_of((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), version)
        if notes is None:
            sys.exit(f"CHANGELOG.md has no notes of {version}")
        sys.stdout.write(notes)
        return 0
    problems = list(disagreements(ROOT, arguments.tag))
    if arguments.dist is not None:
        problems += missing_from(arguments.dist, version)
    for problem in problems:
        print(problem)
    if not problems:
        print(f"ok      {version}: versions, changelog" + (f", {arguments.dist}" if arguments.dist else ""))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
