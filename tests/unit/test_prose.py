"""The prose check finds the patterns that it names, in each kind of text, and lets plain sentences pass."""

from pathlib import Path

import pytest

from tests import prose

BAD = {
    "start": "What is not tracked is refused.",
    "what": "The relay delivers what is committed.",
    "archaic": "Another writer may meanwhile lock the row.",
    "pronoun": "The index holds those that were delivered.",
    "is to": "The row is to be deleted.",
    "inverted": "The outbox is empty, nor does it fill.",
    "unclear": "The key surely exists.",
    "semicolons": "The row is locked; the entry is written; the mark is set.",
    "long": "The relay " + "very " * prose.LONGEST_SENTENCE + "slowly delivers rows.",
}
PLAIN = (
    "Cannot undo: other transactions changed these facts later.",
    "The message says what is missing.",
    "What does a relay do?",
    "Lock the rows, then write their entries.",
)


def test_each_rule_has_an_example() -> None:
    assert BAD.keys() == prose.RULES.keys()


@pytest.mark.parametrize("rule", BAD)
def test_a_bad_sentence_breaks_its_rule(rule: str) -> None:
    assert [name for name, _ in prose.hits(prose.Prose(1, BAD[rule]))] == [rule]


@pytest.mark.parametrize("sentence", PLAIN)
def test_a_plain_sentence_passes(sentence: str) -> None:
    assert list(prose.hits(prose.Prose(1, sentence))) == []


def test_a_comment_is_a_whole_sentence() -> None:
    fragment = "by Session.hash_key, which every state of an instance knows"
    assert [name for name, _ in prose.hits(prose.Prose(1, fragment, is_comment=True))] == ["fragment"]
    assert not list(prose.hits(prose.Prose(1, fragment)))
    assert not list(prose.hits(prose.Prose(1, "Without an index, no search works here.", is_comment=True)))


def test_comments_docstrings_and_messages_are_read() -> None:
    source = (
        '"""Module text."""\n\n# A comment\n# of two lines.\nraise ValueError(f"Cannot open {path!r} for reading.")\n'
    )
    texts = [(piece.line, piece.text) for piece in prose.python_prose(source, messages=True)]
    assert texts == [(3, "A comment of two lines."), (1, "Module text."), (5, "Cannot open x for reading.")]


def test_sql_and_messages_of_tests_are_not_read() -> None:
    source = 'query = "SELECT id FROM fact WHERE id = 1"\nassert x, "Whatever a test says when it fails"\n'
    assert list(prose.python_prose(source, messages=False)) == []
    assert [piece.line for piece in prose.python_prose(source, messages=True)] == [2]


def test_a_page_is_read_without_its_code() -> None:
    page = "# Title\n\nOne paragraph\nof two lines.\n\n```python\nwhat = 1\n```\n\n- an item\n| a cell | another |\n"
    pieces = [(piece.line, piece.text) for piece in prose.markdown_prose(page)]
    assert pieces == [
        (1, "Title"),
        (3, "One paragraph of two lines."),
        (10, "an item"),
        (11, "a cell"),
        (11, "another"),
    ]


def test_every_excuse_is_needed() -> None:
    """An excuse whose sentence is gone is taken out of the list."""
    texts = [
        sentence
        for path in prose.files([prose.ROOT / name for name in (*prose.FOLDERS, *prose.FILES)])
        if path != Path(prose.__file__)
        for piece in prose.prose_of(path)
        for sentence in prose.sentences(piece.text)
    ]
    for rule, excuses in prose.EXCUSED.items():
        pattern = prose.RULES[rule][0]
        for excuse in excuses:
            assert any(excuse in text and pattern.search(text) for text in texts), f"{rule}: {excuse}"
