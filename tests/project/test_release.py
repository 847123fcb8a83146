"""What `make release-check` finds: versions that don't agree, files that are missing, notes of a release."""

import importlib.util
import tarfile
import zipfile
from pathlib import Path

import pytest

import sense_v2

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("release_check", ROOT / "scripts" / "release_check.py")
assert SPEC is not None
assert SPEC.loader is not None
release_check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(release_check)

CHANGELOG = """# Changelog

## [Unreleased]: 0.3.0

- Not yet.

## [0.2.0] - 2026-05-01

### Added

- A thing.

## [0.1.0] - 2026-01-01

- The first.
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "sense_v2").mkdir()
    (tmp_path / "sense_v2" / "__init__.py").write_text('"""A package."""\n\n__version__ = "0.2.0"\n')
    (tmp_path / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    return tmp_path


def build(dist: Path, version: str = "0.2.0", *, wheel: tuple[str, ...] = (), sdist: tuple[str, ...] = ()) -> None:
    dist.mkdir()
    with zipfile.ZipFile(dist / f"sense_v2-{version}-cp311-abi3-linux_x86_64.whl", "w") as archive:
        for name in wheel or [*release_check.COMPILED_OF, "sense_v2/py.typed"]:
            archive.writestr(f"{name}.abi3.so" if name in release_check.COMPILED_OF else name, "")
    with tarfile.open(dist / f"sense_v2-{version}.tar.gz", "w:gz") as archive:
        for name in sdist or release_check.OF_THE_SDIST:
            archive.addfile(tarfile.TarInfo(f"sense_v2-{version}/{name}"))


def test_this_checkout_agrees_with_itself():
    assert release_check.version_of(ROOT) == sense_v2.__version__
    assert list(release_check.disagreements(ROOT)) == []


def test_one_place_has_the_version(checkout: Path):
    assert release_check.version_of(checkout) == "0.2.0"
    assert "version = {attr = " in (ROOT / "pyproject.toml").read_text()


def test_a_version_that_differs_is_named(checkout: Path):
    assert list(release_check.disagreements(checkout)) == []
    (checkout / "CITATION.cff").write_text("cff-version: 1.2.0\nversion: 0.1.9\n")
    (found,) = release_check.disagreements(checkout)
    assert "CITATION.cff" in found
    assert "0.1.9" in found
    assert "0.2.0" in found


def test_a_version_without_notes_is_named(checkout: Path):
    (checkout / "sense_v2" / "__init__.py").write_text('__version__ = "0.4.0"\n')
    found = " ".join(release_check.disagreements(checkout))
    assert "CHANGELOG.md has no notes of 0.4.0" in found


def test_a_tag_wants_its_version_and_a_date(checkout: Path):
    assert list(release_check.disagreements(checkout, tag="v0.2.0")) == []
    (found,) = release_check.disagreements(checkout, tag="v0.2.1")
    assert "v0.2.1" in found
    (checkout / "sense_v2" / "__init__.py").write_text('__version__ = "0.3.0"\n')
    (checkout / "CITATION.cff").write_text("version: 0.3.0\n")
    assert list(release_check.disagreements(checkout)) == []
    (found,) = release_check.disagreements(checkout, tag="v0.3.0")
    assert "a date" in found


def test_release_notes_are_the_changelogs(checkout: Path):
    text = (checkout / "CHANGELOG.md").read_text()
    assert release_check.notes_of(text, "0.2.0") == "### Added\n\n- A thing.\n"
    assert release_check.notes_of(text, "0.1.0") == "- The first.\n"
    assert release_check.notes_of(text, "0.3.0") == "- Not yet.\n"
    assert release_check.notes_of(text, "0.2") is None


def test_what_was_built_is_whole(checkout: Path):
    build(checkout / "dist")
    assert list(release_check.missing_from(checkout / "dist", "0.2.0")) == []


def test_a_wheel_without_its_compiled_part_is_named(checkout: Path):
    build(checkout / "dist", wheel=("sense_v2/py.typed",))
    found = list(release_check.missing_from(checkout / "dist", "0.2.0"))
    assert len(found) == len(release_check.COMPILED_OF)
    assert all(any(name in line for line in found) for name in ("_gather", "_ngrams", "_row_hashes"))


def test_an_sdist_without_the_c_sources_is_named(checkout: Path):
    build(checkout / "dist", sdist=("setup.py", "pyproject.toml"))
    assert any("third_party/xxhash.h" in line for line in release_check.missing_from(checkout / "dist", "0.2.0"))


def test_files_of_another_version_are_named(checkout: Path):
    build(checkout / "dist", "0.1.0")
    assert any("0.1.0" in line for line in release_check.missing_from(checkout / "dist", "0.2.0"))
    (checkout / "empty").mkdir()
    assert len(list(release_check.missing_from(checkout / "empty", "0.2.0"))) == 2
