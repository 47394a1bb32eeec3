"""CLIP's tokenizer, and the conversion of prompts to token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..folders import StrPath


def load_tokenizer(folder: StrPath, words: int | None = None) -> Any:
    """Load CLIP's tokenizer, transformers' `CLIPTokenizer`, from a folder; nothing is fetched.

    Args:
        words: the size of the text encoder's vocabulary, which the tokenizer must have (`check_vocabulary`).

    Raises:
        ValueError: if the files cannot be read, or do not hold `words` tokens.
    """
    from transformers import CLIPTokenizer  # takes seconds to import

    return read_tokenizer(CLIPTokenizer, folder, words)


def read_tokenizer(cls: Any, folder: StrPath, words: int | None = None) -> Any:
    """A tokenizer of one of transformers' classes, checked as by `load_tokenizer`."""
    try:
        tokenizer = cls.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # of several libraries below
        raise ValueError(f"{folder} holds no {cls.__name__} that can be read ({type(error).__name__}: {error}).") from error
    if words is not None:
        check_vocabulary(tokenizer, words, folder)
    return tokenizer


def check_vocabulary(tokenizer: Any, words: int, folder: StrPath) -> None:
    """Raise `ValueError` unless a tokenizer has as many tokens as the text encoder knows.

    A tokenizer without its vocabulary gives all prompts the same few tokens; one of another model gives tokens without a meaning.
    """
    if len(tokenizer) != words:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, but the text encoder has {words}. Its files (vocab.json and merges.txt, "
            "or tokenizer.json, or vocab.txt) are missing, cut off, or another model's: copy the tokenizer that came with the encoder."
        )


def tokenize(tokenizer: Any, prompts: Sequence[str], length: int = 77, *, truncate: bool = False) -> np.ndarray:
    """Token ids, int32 `[b, length]`: begin of text, the prompt, end of text, and the tokenizer's padding.

    Args:
        truncate: truncate longer prompts; else they raise `ValueError`.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts={prompts!r} must be a sequence of strings: pass [prompts].")
    options = dict(padding="max_length", max_length=length, truncation=truncate, return_attention_mask=False)
    ids = tokenizer(list(prompts), **options)["input_ids"]
    for prompt, row in zip(prompts, ids):
        if len(row) > length:
            raise ValueError(f"the prompt {prompt!r} has {len(row)} tokens, over {length}: shorten it or pass truncate=True.")
    return np.asarray(ids, np.int32).reshape(-1, length)
