"""Prompt files in the forms that people have them: one prompt a line, JSON lines, JSON, CSV, TSV."""

import csv
import hashlib
import io
import json
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .config import Config

KEYS = ("prompt", "prompts", "caption", "text")
"""Names of the column or field that holds the prompt, in any case; the first that a file has."""
JOINERS = "\u200c\u200d"  # invisible, but part of emoji and of several scripts
MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}

# the simple animals that compressibility and aesthetics have been fine-tuned on since DDPO (Black et al. 2024, section 6.1)
ANIMALS = (
    *("cat", "dog", "horse", "monkey", "rabbit", "zebra", "spider", "bird", "sheep", "deer", "cow", "goat", "lion", "tiger"),
    *("bear", "raccoon", "fox", "wolf", "lizard", "beetle", "ant", "butterfly", "fish", "shark", "whale", "dolphin"),
    *("squirrel", "mouse", "rat", "snake", "turtle", "frog", "chicken", "duck", "goose", "bee", "pig", "turkey", "fly"),
    *("llama", "camel", "bat", "gorilla", "hedgehog", "kangaroo"),
)


class Prompt(NamedTuple):
    """A prompt and where it stands first.

    Attributes:
        text: what the model is given.
        weight: how often the file has it; prompts are drawn in proportion.
        metadata: the other fields of its row.
        place: file and line.
    """

    text: str
    weight: int = 1
    metadata: Mapping[str, Any] = {}
    place: str = ""


def read_prompt_file(path: Path, name: str = "prompts") -> list[Prompt]:
    """The prompts of a file, each once, in their order.

    The form follows the name: `.jsonl` has an object or a string on each line, `.json` a list of them, `.csv` and `.tsv` a header; any
    other file one prompt a line, whose empty lines are passed over. The prompt's field is one of `KEYS`. Text is UTF-8, with or without
    a byte-order mark.

    Raises:
        FileNotFoundError, ValueError: naming file and line, for text that is not UTF-8, invisible characters, an empty prompt, a row
            without one, two rows of the same prompt with different metadata, or a file without prompts.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name}={path} is not a file: write one prompt per line.")
    read = {".jsonl": _json_lines, ".json": _json, ".csv": _table, ".tsv": _table}.get(path.suffix.lower(), _lines)
    found: dict[str, Prompt] = {}
    for line, value in read(path, _decoded(path)):
        prompt = _prompt(f"{path}:{line}", value)
        first = found.setdefault(prompt.text, prompt._replace(weight=0))
        if first.metadata != prompt.metadata:
            raise ValueError(f"{prompt.place}: {prompt.text!r} has other metadata than at {first.place}: give each prompt one.")
        found[prompt.text] = first._replace(weight=first.weight + 1)
    if not found:
        raise ValueError(f"{name}={path} has no prompts: write one per line.")
    return list(found.values())


def _decoded(path: Path) -> str:
    """The text, with line feeds for the line ends of all systems."""
    data = path.read_bytes()
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"{path}: the text is {encoding}: save it as UTF-8.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if number == 1 and line.lstrip().startswith(("{", "[")) and _is_json(line):
            raise ValueError(f"{path}:1: {line[:40]!r} is JSON: name the file .jsonl (an object on each line) or .json.")
        if "\t" in line:
            raise ValueError(f"{path}:{number}: the line has a tab: name a table .tsv, with a header, or remove the tab.")
        yield number, line.strip()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return text.strip() in ("{", "[")
    return True


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number}: {line[:40]!r} is not JSON ({error}): write one object or string a line."
                ) from None


def _json(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: the file is not JSON ({error.msg}): name JSON lines .jsonl.") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: the file holds no list: write a list of strings, or of objects with a prompt.")
    yield from enumerate(rows, 1)


def _table(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(io.StringIO(text), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True)
    try:
        header = next(reader, [])
        if not any(key.strip().lower() in KEYS for key in header):
            raise ValueError(
                f"{path}:1: no column of the header {header} is called {' or '.join(KEYS)}: give the table a header."
            )
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                raise ValueError(
                    f"{path}:{reader.line_num}: {len(row)} fields where the header has {len(header)}: quote commas."
                )
            yield reader.line_num, dict(zip((key.strip() for key in header), row))
    except csv.Error as error:
        raise ValueError(f"{path}:{reader.line_num}: {error}: close quotes and double those inside of a field.") from None


def _prompt(place: str, value: Any) -> Prompt:
    """The prompt of a row, checked."""
    metadata: dict[str, Any] = {}
    if isinstance(value, Mapping):
        lower = {key.lower(): key for key in value}
        key = next((lower[name] for name in KEYS if name in lower), None)
        if key is None:
            raise ValueError(f"{place}: no field of {sorted(value)} is called {' or '.join(KEYS)}: name the prompt's field.")
        metadata = {name: v for name, v in value.items() if name != key}
        value = value[key]
    if not isinstance(value, str):
        raise ValueError(f"{place}: the prompt is {value!r}: write a string.")
    for character in value:
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp") and character not in JOINERS:
            about = unicodedata.name(character, "a control character").lower()
            raise ValueError(f"{place}: {value[:60]!r} holds U+{ord(character):04X} ({about}), which is not seen: remove it.")
    if not value.strip():
        raise ValueError(f"{place}: the prompt is empty: write one, or remove the row.")
    return Prompt(value.strip(), 1, metadata, place)


def read_prompts(config: Config) -> tuple[list[Prompt], list[Prompt]]:
    """Prompts to train on, and prompts held out; each once."""
    prompts = [Prompt(text) for text in ANIMALS] if config.prompts is None else read_prompt_file(config.prompts)
    if config.held_out_prompts is not None:
        held_out, known = read_prompt_file(config.held_out_prompts, "held_out_prompts"), {prompt.text for prompt in prompts}
        if both := [prompt for prompt in held_out if prompt.text in known]:
            raise ValueError(f"{both[0].place}: {both[0].text!r} is among those that are trained on.")
        return prompts, held_out
    if len(prompts) < 2:
        raise ValueError(f"prompts={config.prompts} has a single prompt, and none to hold out: pass held_out_prompts.")
    if len(prompts) < 5:
        return prompts[:-1], prompts[-1:]
    return [prompt for i, prompt in enumerate(prompts) if i % 5 != 4], prompts[4::5]


def digest_of_prompts(config: Config) -> str:
    """Tells two sets of prompts apart: a run is not resumed on other prompts than it began with."""
    found = [[[prompt.text, prompt.weight, prompt.metadata] for prompt in part] for part in read_prompts(config)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
