"""Templates of SQL: their placeholders, and their parts for readers only."""

from __future__ import annotations

import pytest

from memstate_sa.capture.sql_text import Templates, literal

SOURCE = """\
--- For readers.

-- name: block
BEGIN
  -- A comment of the function.
  {statement};

  RETURN NULL;
END

--- More for readers.

-- name: line
INSERT INTO a
  SELECT {value};
DELETE FROM a
  WHERE b = '{c}';
"""


def test_block_keeps_lines_and_comments() -> None:
    """The block's own comments stay, and comments for readers are removed."""
    block = Templates(SOURCE).block("block", statement="DELETE FROM a")
    assert block == "BEGIN\n  -- A comment of the function.\n  DELETE FROM a;\n\n  RETURN NULL;\nEND"


def test_line_puts_each_statement_on_one_line() -> None:
    assert Templates(SOURCE).line("line", value="'{x};'", c=1) == (
        "INSERT INTO a SELECT '{x};';\nDELETE FROM a WHERE b = '1';"
    )


def test_template_that_lacks_a_value_raises() -> None:
    with pytest.raises(KeyError, match="statement"):
        Templates(SOURCE).block("block")


def test_literal_doubles_quotes() -> None:
    assert literal("it's") == "'it''s'"
