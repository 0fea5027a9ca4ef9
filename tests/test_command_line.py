"""The words of a command say what was given, whatever is in it."""

import shlex

from caddf.command_line import changed


def test_words_survive_the_shell():
    given = {
        "note": "mod\u00e8le \"x\" 'y'",
        "steps": 3,
        "lookup": True,
        "rate": 0.5,
        "same": 1,
        "list": [1, 2],
        "none": None,
    }
    words = list(changed(given, {"same": 1, "list": (1, 2), "none": 2}, "--train.{}".format))
    assert words[:2] == ["--train.note", given["note"]]
    assert words[2:] == ["--train.steps", "3", "--train.lookup", "true", "--train.rate", "0.5", "--train.none", "null"]
    assert shlex.split(shlex.join(words)) == words
