"""CLIP's tokenizer, and the conversion of prompts to token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..folders import StrPath


def load_tokenizer(folder: StrPath) -> Any:
    """Load CLIP's tokenizer, transformers' `CLIPTokenizer`, from a folder; nothing is fetched."""
    from transformers import CLIPTokenizer  # takes seconds to import

    return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)


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
