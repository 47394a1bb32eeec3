"""Prompt files in the forms that people have: what is read, and that what is wrong is named by file and line."""

import itertools
import json

import numpy as np
import pytest

from experiments.reward_registry import RewardSettings, make_reward
from experiments.text_to_image.config import Config
from experiments.text_to_image.parts import check_lengths
from experiments.text_to_image.prompts import Prompt, digest_of_prompts, read_prompt_file, read_prompts

GENEVAL = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}
FORMS = {
    "plain.txt": "a cat\n\n  a dog \n",
    "windows.txt": "a cat\r\na dog\r\n",
    "old.txt": "a cat\ra dog",
    "mark.txt": "\ufeffa cat\na dog\n",
    "strings.jsonl": '"a cat"\n\n"a dog"\n',
    "objects.jsonl": '{"prompt": "a cat"}\n{"prompt": "a dog"}\n',
    "hpdv2.json": '["a cat", "a dog"]',
    "captions.json": '[{"caption": "a cat"}, {"caption": "a dog"}]',
    "drawbench.csv": 'Prompts,Category\na cat,Colors\n"a dog",\n',
    "parti.tsv": "Prompt\tCategory\tNote\na cat\tAnimals\t\na dog\tAnimals\tbrown, small\n",
}


def written(folder, name, text):
    file = folder / name
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


@pytest.mark.parametrize("name", FORMS)
def test_the_prompts_are_those_that_a_person_would_read(tmp_path, name):
    found = read_prompt_file(written(tmp_path, name, FORMS[name]))
    assert [prompt.text for prompt in found] == ["a cat", "a dog"] and [prompt.weight for prompt in found] == [1, 1]


def test_what_stands_inside_of_a_prompt_stays(tmp_path):
    """A line separator of Unicode is no line end of a file, but is not seen; commas, quotes and joined emoji are text."""
    text = 'Prompts\n"red, ""big"" cat"\n\U0001f469\u200d\U0001f680 rocket\n'
    found = read_prompt_file(written(tmp_path, "p.csv", text))
    assert [prompt.text for prompt in found] == ['red, "big" cat', "\U0001f469\u200d\U0001f680 rocket"]


def test_repeated_prompts_are_weights_and_other_fields_are_kept(tmp_path):
    rows = [GENEVAL, {"tag": "color", "include": [], "prompt": "a red cat"}, GENEVAL, GENEVAL]
    found = read_prompt_file(written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows))))
    assert [(prompt.text, prompt.weight) for prompt in found] == [("two cats", 3), ("a red cat", 1)]
    assert found[0].metadata == {"tag": "counting", "include": GENEVAL["include"]}
    rows[2] = GENEVAL | {"tag": "other"}
    with pytest.raises(ValueError, match=r"p.jsonl:3: 'two cats' has other metadata than at .*p.jsonl:1"):
        read_prompt_file(written(tmp_path, "p.jsonl", "\n".join(map(json.dumps, rows))))


WRONG = {
    "utf16.txt": ("a cat\n".encode("utf-16"), r"utf16.txt: the text is UTF-16: save it as UTF-8"),
    "latin.txt": (b"a cat\na caf\xe9\n", r"latin.txt:2: byte 0xe9 is not UTF-8"),
    "nul.txt": ("a cat\na\0b\n", r"nul.txt:2: 'a\\x00b' holds U\+0000"),
    "hidden.txt": ("a cat\na \u200bdog\n", r"hidden.txt:2: .* holds U\+200B \(zero width space\)"),
    "separator.txt": ("a cat\u2028a dog\n", r"separator.txt:1: .* holds U\+2028"),
    "tab.txt": ("a\tb\n", r"tab.txt:1: the line has a tab: name a table .tsv"),
    "really.txt": ('{"prompt": "a cat"}\n', r"really.txt:1: .* is JSON: name the file .jsonl"),
    "none.txt": ("\n \n", r"none.txt has no prompts"),
    "broken.jsonl": ('"a"\n{"prompt": \n', r"broken.jsonl:2: .* is not JSON"),
    "empty.jsonl": ('"a"\n{"prompt": " "}\n', r"empty.jsonl:2: the prompt is empty"),
    "number.jsonl": ('{"prompt": 3}\n', r"number.jsonl:1: the prompt is 3: write a string"),
    "nameless.jsonl": ('{"title": "a"}\n', r"nameless.jsonl:1: no field of \['title'\] is called prompt or"),
    "object.json": ('{"prompt": "a"}', r"object.json: the file holds no list"),
    "cut.json": ('["a",\n"b"', r"cut.json:2: the file is not JSON"),
    "headless.csv": ("a cat,animals\n", r"headless.csv:1: no column of the header \['a cat', 'animals'\] is called prompt"),
    "ragged.csv": ("prompt,note\na,b,c\n", r"ragged.csv:2: 3 fields where the header has 2"),
    "quotes.csv": ('prompt\n"a\n', r"quotes.csv:\d: .*close quotes"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path, name):
    text, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        read_prompt_file(written(tmp_path, name, text))


def test_any_bytes_are_prompts_or_an_error_of_ours(tmp_path):
    """Random edits of the files above: no other error, and every prompt is seen text."""
    numbers = np.random.default_rng(0)
    for (name, text), _ in itertools.product(FORMS.items(), range(40)):
        data = bytearray(text.encode())
        for _ in range(numbers.integers(1, 4)):
            i = int(numbers.integers(len(data)))
            data[i : i + int(numbers.integers(0, 3))] = numbers.bytes(int(numbers.integers(0, 3)))
        try:
            found = read_prompt_file(written(tmp_path, name, bytes(data)))
        except ValueError as error:
            assert name in str(error), (data, error)
        else:
            assert found and all(prompt.text.strip() and "\n" not in prompt.text for prompt in found), data


def test_prompts_to_train_on_and_to_hold_out(tmp_path):
    def texts(config):
        return tuple([prompt.text for prompt in part] for part in read_prompts(config))

    assert texts(Config(prompts=written(tmp_path, "p.txt", "a\n\n b \nc\nd\ne\nf\n"))) == (["a", "b", "c", "d", "f"], ["e"])
    assert texts(Config(prompts=tmp_path / "p.txt", held_out_prompts=written(tmp_path, "h.txt", "x\n")))[1] == ["x"]
    few = Config(prompts=written(tmp_path, "few.txt", "a\nb\na\n"))
    assert texts(few) == (["a"], ["b"])
    before = digest_of_prompts(few)
    written(tmp_path, "few.txt", "a\nb\n")
    assert digest_of_prompts(few) != before  # another weight
    with pytest.raises(ValueError, match="few.txt:1: 'a' is among those that are trained on"):
        read_prompts(Config(prompts=tmp_path / "few.txt", held_out_prompts=tmp_path / "few.txt"))
    with pytest.raises(ValueError, match="pass held_out_prompts"):
        read_prompts(Config(prompts=written(tmp_path, "one.txt", "a\n")))
    with pytest.raises(FileNotFoundError, match="nothing.txt is not a file"):
        read_prompts(Config(prompts=tmp_path / "nothing.txt"))


def counted(images, prompts, metadata):
    """A reward of one's own that reads the other fields of prompts."""
    return [len(prompt) + row["count"] for prompt, row in zip(prompts, metadata)], {"of": "flow_grpo's kind"}


def test_other_fields_reach_rewards_of_ones_own():
    settings = RewardSettings(prompts=["a", "bb"], metadata=[{"count": 10}, {"count": 20}])
    reward = make_reward(["tests.test_prompts:counted"], (), settings)
    scores, _ = reward(np.zeros((3, 4, 4, 3)), np.asarray([1, 0, 1]))
    assert scores == [22, 11, 22]


def test_prompts_that_are_too_long_are_named_by_line(tmp_path):
    from experiments.random_model.writer import Config as RandomModel, write_random_model

    write_random_model(RandomModel(tmp_path / "model"))
    long = Prompt("cat " * 60, place="p.txt:7")
    with pytest.raises(ValueError, match=r"p.txt:7: 'cat cat .* has 182 tokens, over 77: shorten it, or pass --truncate"):
        check_lengths(tmp_path / "model", [Prompt("a cat"), long], truncate=False)
    check_lengths(tmp_path / "model", [long], truncate=True)
