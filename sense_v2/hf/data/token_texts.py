"""Token ids -> what a person reads: their texts, and what kind of token each is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sense_v2.hf.insight.evaluation import decoder_kinds

CLASSES = (
    "word, its beginning",
    "word, further inside",
    "number",
    "punctuation",
    "white space",
    "part of a character",
    "special token",
)
"""What kind of token; decided by its text and the token before it."""


class Words:
    """The texts of a tokenizer's tokens; of transformers, or a `tokenizers.Tokenizer`."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._backend = backend
        self._kinds = decoder_kinds(getattr(backend, "decoder", None))
        self._special = {
            number for number, token in backend.get_added_tokens_decoder().items() if getattr(token, "special", False)
        }
        self._texts: dict[int, str] = {}

    def of(self, token_id: int) -> str:
        """One token's text, U+FFFD in it where it is no whole character."""
        if token_id not in self._texts:
            text = self.text([token_id])
            # Decoded alone, a piece of a sentence loses the space that it begins with.
            if self._raw(token_id).startswith("▁") and not text.startswith(" "):
                text = f" {text}"
            self._texts[token_id] = text
        return self._texts[token_id]

    def text(self, token_ids: Sequence[int] | np.ndarray[Any, Any]) -> str:
        """The text of several tokens together."""
        return str(self._tokenizer.decode([int(one) for one in token_ids], skip_special_tokens=False))

    def classes(self, token_ids_BT: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """int64 [B, T]: the class of each token, its place in `CLASSES`."""
        ids_U, inverse = np.unique(token_ids_BT, return_inverse=True)
        inverse_BT = inverse.reshape(token_ids_BT.shape)
        texts = [self.of(int(one)) for one in ids_U]
        alone_U = np.array([self._class(int(one), text) for one, text in zip(ids_U, texts, strict=True)])
        can_go_on_U = np.array([self._can_go_on(int(one), text) for one, text in zip(ids_U, texts, strict=True)])
        ends_in_word_U = np.array([text[-1:].isalnum() or text[-1:] == "_" for text in texts])
        follows_word_BT = np.zeros(token_ids_BT.shape, dtype=np.bool_)
        follows_word_BT[:, 1:] = ends_in_word_U[inverse_BT][:, :-1]
        found_BT = alone_U[inverse_BT]
        inside_BT = (found_BT == 0) & follows_word_BT & can_go_on_U[inverse_BT]
        return np.where(inside_BT, 1, found_BT)

    def _raw(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or ""

    def _can_go_on(self, token_id: int, text: str) -> bool:
        """Whether a token goes on with a word that the token before ends in, where there is one."""
        if "WordPiece" in self._kinds:
            return self._raw(token_id).startswith("##")
        # Tokens that carry their spaces; others are whole words.
        carries_spaces = bool(self._kinds & {"ByteLevel", "ByteFallback", "Metaspace"})
        return carries_spaces and (text[:1].isalnum() or text[:1] == "_")

    def _class(self, token_id: int, text: str) -> int:
        """As if no token came before."""
        stripped = text.strip()
        if token_id in self._special:
            return CLASSES.index("special token")
        if not stripped:
            return CLASSES.index("white space")
        if "\ufffd" in stripped:
            return CLASSES.index("part of a character")
        if any(character.isalpha() for character in stripped):
            return CLASSES.index("word, its beginning")
        if any(character.isnumeric() for character in stripped):
            return CLASSES.index("number")
        return CLASSES.index("punctuation")
