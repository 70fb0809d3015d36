"""Text to token numbers: plain words with a vocabulary file, or a ``tokenizer.json``."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FileFormatError, InputError
from .files import check_file, read_lines
from .preprocessing import Preprocessing

log = logging.getLogger("onnxplain")

_WORD = re.compile(r"[\w']+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Encoded:
    """int64 [N, T]: token numbers, 0 where padded else 1, segments; tokens without the padding."""

    ids: np.ndarray
    mask: np.ndarray
    types: np.ndarray
    tokens: list[list[str]]


def words(text: str, lowercase: bool = False) -> list[str]:
    """Runs of letters, digits and apostrophes, and single punctuation marks."""
    return _WORD.findall(text.lower() if lowercase else text)


def encode(texts: Sequence[str], setting: Preprocessing, length: int | None) -> Encoded:
    """Texts as token numbers, cut or padded at the end to ``length`` (None: to the longest)."""
    if setting.tokenizer is None:
        raise InputError(
            "no tokenizer is known for this model's text: set tokenizer and vocabulary in [input] "
            "of an onnxplain.toml beside it, or put its tokenizer.json there"
        )
    if setting.tokenizer == "words":
        return _encode_words(texts, setting, length)
    return _encode_subwords(texts, setting, Path(setting.tokenizer), length)


def token_names(ids: np.ndarray, setting: Preprocessing) -> list[list[str]]:
    """The tokens of token numbers [N, T], without the padding at the end where that is known.

    Words of the vocabulary where there is one, else the numbers.
    """
    known = setting.tokenizer == "words" and setting.vocabulary is not None
    names = dict(enumerate(read_lines(Path(str(setting.vocabulary))) if known else ()))
    rows = [[names.get(number, str(number)) for number in row] for row in ids.tolist()]
    for row in rows:
        while len(row) > 1 and row[-1] == setting.pad:
            row.pop()
    return rows


def token_number(setting: Preprocessing, tokens: Sequence[str]) -> int:
    """The number of the first of some tokens that a tokenizer has; else of its unknown or padding.

    Raises InputError where it has none of them.
    """
    wanted = [token for token in (*tokens, setting.unknown, setting.pad) if token]
    if setting.tokenizer == "words" and setting.vocabulary is not None:
        numbers = {token: i for i, token in enumerate(read_lines(Path(setting.vocabulary)))}
    elif setting.tokenizer is not None:
        numbers = _tokenizer(Path(setting.tokenizer)).get_vocab(with_added_tokens=True)
        wanted += ["[UNK]", "<unk>", "[PAD]", "<pad>"]
    else:
        numbers = {}
    for token in wanted:
        if token in numbers:
            return int(numbers[token])
    raise InputError(
        f"the tokenizer has none of {', '.join(map(repr, wanted))} to stand for a missing word: "
        "give the number of a token"
    )


def _common_length(counts: Sequence[int], length: int | None) -> int:
    if length is not None and max(counts) > length:
        log.warning("text of %d tokens is cut to the model's %d", max(counts), length)
    return length or max(counts)


def _encode_words(texts: Sequence[str], setting: Preprocessing, length: int | None) -> Encoded:
    if setting.vocabulary is None:
        raise InputError("the tokenizer 'words' needs a vocabulary file, one token a line")
    numbers = {token: i for i, token in enumerate(read_lines(Path(setting.vocabulary)))}
    rows = [words(text, bool(setting.lowercase)) for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if not row:
            raise InputError(f"the text {text[:40]!r} has no words")
    length = _common_length([len(row) for row in rows], length)

    def number(token: str | None, what: str) -> int:
        if token not in numbers:
            raise InputError(
                f"{what}, and {token!r} is not in {setting.vocabulary}: set it in [input] of the "
                "onnxplain.toml"
            )
        return numbers[token]

    rows = [row[:length] for row in rows]
    mask = np.array([[t < len(row) for t in range(length)] for row in rows], np.int64)
    ids = np.zeros_like(mask)
    if not mask.all():
        ids[:] = number(setting.pad, "texts of other lengths need 'pad'")
    for i, row in enumerate(rows):
        for t, token in enumerate(row):
            known = token if token in numbers else setting.unknown
            ids[i, t] = number(known, f"the word {token!r} needs 'unknown'")
    return Encoded(ids, mask, np.zeros_like(mask), rows)


def _encode_subwords(
    texts: Sequence[str], setting: Preprocessing, path: Path, length: int | None
) -> Encoded:
    tokenizer = _tokenizer(path)
    own = tokenizer.padding or {}
    tokenizer.no_padding()
    if length is not None:
        _common_length([len(e.ids) for e in tokenizer.encode_batch(list(texts))], length)
        tokenizer.enable_truncation(length)
    encoded = tokenizer.encode_batch(list(texts))
    if not all(e.ids for e in encoded):
        raise InputError("one of the texts has no tokens")
    length = _common_length([len(e.ids) for e in encoded], length)
    if any(len(e.ids) < length for e in encoded):
        candidates = (setting.pad, own.get("pad_token"), "[PAD]", "<pad>")
        pad = next((t for t in candidates if t and tokenizer.token_to_id(t) is not None), None)
        if pad is None:
            raise InputError(f"{path} has no padding token: set 'pad' in an onnxplain.toml")
        for e in encoded:
            e.pad(length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    ids, mask, types = (
        np.array([getattr(e, name) for e in encoded], np.int64)
        for name in ("ids", "attention_mask", "type_ids")
    )
    shown = [e.tokens[: sum(e.attention_mask)] for e in encoded]  # padding is at the end
    return Encoded(ids, mask, types, shown)


def _tokenizer(path: Path) -> Any:
    """A ``tokenizer.json``."""
    check_file(path)
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise InputError(
            f'{path} needs the package tokenizers: pip install "onnxplain[text]"'
        ) from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing narrower
        raise FileFormatError(f"{path} is not a tokenizer: {error}") from None
