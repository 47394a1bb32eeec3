"""Finds the folder of a model: where it says, or in the cache of the Hugging Face hub on this disk. Nothing is downloaded."""

import os
import re
from pathlib import Path

from ..folders import StrPath, local

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def find_folder(name: StrPath) -> Path:
    """The folder of that path or, for a hub id `owner/name`, of its newest snapshot in the hub's cache on this disk.

    Raises:
        ValueError: for a file and for an address.
        FileNotFoundError: if there is neither. The message says how to get the folder.
    """
    path, text = local(name), os.fspath(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(
            f"{text} is a single file: a model is a folder with unet/, vae/, text_encoder/, tokenizer/ and scheduler/. In diffusers, "
            "StableDiffusionPipeline.from_single_file(file).save_pretrained(folder) makes it one."
        )
    if not HUB_ID.fullmatch(text):
        raise FileNotFoundError(f"{text} is not a folder: give that of a model as diffusers writes it.")
    from huggingface_hub import constants, errors, snapshot_download  # where a folder is given, nothing waits for it

    try:
        return Path(snapshot_download(text, local_files_only=True))
    except errors.LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{text} is no folder here, and no model in the hub's cache, {constants.HF_HUB_CACHE}: download it where there is a network "
            f"(hf download {text}), or give a folder."
        ) from error
