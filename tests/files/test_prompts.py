"""Prompt files as they come, and wildcards."""

from __future__ import annotations

import codecs
import json

import pytest

from ttsnap.cli.options import read_prompts
from ttsnap.files.prompts import read_prompt_file, variants

TWO = ["a red circle", "a blue square, small"]
GOOD = {
    "PartiPrompts.tsv": (
        "Prompt\tCategory\tChallenge\tNote\na red circle\tArts\tBasic\t\n"
        'a sign that says "stop\tWorld\tBasic\ta note\n"a ""quoted"" cat"\tArts\tBasic\t\n',
        ["a red circle", 'a sign that says "stop', 'a "quoted" cat'],
    ),
    "drawbench.csv": ('Prompts,Category\na red circle,Colors\n"a blue square, small",Colors\n', TWO),
    "semicolons.csv": ("id;caption\n1;a red circle\n2;a blue square, small\n", TWO),
    "geneval.jsonl": (
        "\n".join(json.dumps({"tag": "counting", "include": [{"class": "bench"}], "prompt": text}) for text in TWO),
        TWO,
    ),
    "geneval metadata.txt": ("\n".join(json.dumps({"tag": "colors", "prompt": text}) for text in TWO), TWO),
    "lines.JSON": ("\n".join(json.dumps({"prompt": text}) for text in TWO), TWO),
    "list.JSON": (json.dumps(TWO), TWO),
    "objects.json": (json.dumps([{"Prompt": text, "id": 1} for text in TWO]), TWO),
    "by id.json": (json.dumps({"a": {"prompt": TWO[0], "category": "x"}, "b": {"prompt": TWO[1]}}), TWO),
    "named.json": (json.dumps({"prompts": TWO}), TWO),
    "one.csv": ('"a blue square, small"\n', TWO[1:]),
    "table.txt": ("Prompt\tCategory\na red circle\tx\n", TWO[:1]),
    "plain.txt": ("# my prompts\n\na red circle\n  # by colour\n#1 fan, waving\n", ["a red circle", "#1 fan, waving"]),
    "numbered.txt": ("1. a red circle\n2. a blue square, small\n", TWO),
    "numbers that count things.txt": ("3 dogs\n2 cats\n", ["3 dogs", "2 cats"]),
    "not all numbered.txt": ("1. a red circle\na cat\n", ["1. a red circle", "a cat"]),
    "text with commas.txt": ("text, in white, on a wall\na cat\n", ["text, in white, on a wall", "a cat"]),
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("mark", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_file_is_read_as_what_it_is(tmp_path, name, mark):
    text, prompts = GOOD[name]
    path = tmp_path / name
    path.write_bytes(text.replace("\n", "\r\n").encode(mark))
    assert path.read_bytes().startswith((codecs.BOM_UTF8, codecs.BOM_UTF16)) == (mark != "utf-8")
    assert read_prompt_file(path) == prompts


def test_a_column_is_named_or_numbered(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,short,caption,text\n1,a cat,a black cat,some cat\n")
    assert read_prompt_file(path, "Short") == ["a cat"]
    assert read_prompts([], str(path), column="3") == ["a black cat"]
    path.write_text("1,a cat\n2,a dog\n")
    assert read_prompt_file(path, "2") == ["a cat", "a dog"]
    path.write_text('{"id": 1, "long": "a cat"}\n{"id": 2, "long": "a dog"}\n')
    assert read_prompt_file(path, "long") == ["a cat", "a dog"]


BAD = {
    "two.csv": (
        "id,caption,text\n1,a,b\n",
        None,
        "caption and text could hold the prompts; name one",
    ),
    "none.csv": ("id,word\n1,a cat\n", None, "has no header that tells which column holds the prompts"),
    "none.jsonl": ('{"id": 1}\n', None, "has no column `prompt`; name one with --prompt-column: id"),
    "wrong.csv": ("id,prompt\n1,a cat\n", "promt", "has no column 'promt'; it has id, prompt"),
    "short.csv": ("id,prompt\n1\n", None, "has no column 2 in row 2; quote prompts that hold a ','"),
    "broken.jsonl": ('{"prompt": "a"}\n{"prompt": \n', None, "is not valid JSON in line 2"),
    "broken.json": ("[1, 2", None, "is not valid JSON"),
    "numbers.json": ("[1, 2]", None, "must hold a JSON list of strings"),
    "empty.json": ("{}", None, "must hold a JSON list of strings"),
    "lacking.jsonl": ('{"prompt": "a"}\n{"tag": "b"}\n', None, "has no text as 'prompt' in row 2"),
    "latin.txt": (b"caf\xe9", None, "it is not UTF-8 text"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_read_is_one_sentence(tmp_path, name):
    text, column, message = BAD[name]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message.replace("(", r"\(")) as caught:
        read_prompt_file(tmp_path / name, column)
    assert "\n" not in str(caught.value)


def test_wildcards_stand_for_a_prompt_with_each_word():
    assert variants("a {red|blue} {cat|dog}") == ["a red cat", "a red dog", "a blue cat", "a blue dog"]
    assert variants("a {tiny {red|blue}|big} cat") == ["a tiny red cat", "a big cat", "a tiny blue cat"]
    assert variants("a {single} brace") == ["a {single} brace"]
    with pytest.raises(ValueError, match="make more than 1000 prompts"):
        variants("{a|b}" * 10)
    assert read_prompts(["a {red|blue} cat"], None, wildcards=True) == ["a red cat", "a blue cat"]
    assert read_prompts(["a {red|blue} cat"], None) == ["a {red|blue} cat"]
