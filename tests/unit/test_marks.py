"""Marks of a past: those of its last pages."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from memstate_sa.relay.marks import NONE, Bookmark, Mark, Past, beginning


def after(pages: int, *, most: int = 3, past: Past | None = None) -> Past:
    past = past or beginning()
    for _ in range(pages):
        past = past.next(most)
    return past


@given(st.integers(0, 5), st.integers(0, 5), st.integers(2, 5))
def test_index_of_this_past_fits(pages: int, more: int, most: int) -> None:
    """The index may be behind by fewer pages than there are names, or by any number beside other relays."""
    earlier = after(pages, most=most)
    later = after(more, most=most, past=earlier)
    kept = str(earlier.mark)
    assert Mark.parse(kept) == earlier.mark
    assert later.fits(kept, alone=True) is (more < most)
    assert later.fits(kept, alone=False)
    assert earlier.fits(str(later.mark), alone=False) is (more == 0)
    assert not later.is_before(earlier.mark)
    assert earlier.is_before(later.mark) is (more > 0)


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2))
def test_index_of_another_past_does_not_fit(pages: int, others: int, ours: int) -> None:
    """Two databases have a common history. Since then, they may have begun equally many pages."""
    common = after(pages)
    one, other = after(1 + others, past=common), after(1 + ours, past=common)
    assert not one.fits(str(other.mark), alone=True)
    if 0 <= one.page - other.page < 3 or other.page > one.page:
        assert not one.fits(str(other.mark), alone=False)


@pytest.mark.parametrize("kept", ["", "no mark of ours", "7", "x.y", "-1.a", "1.2.3"])
def test_any_text_may_be_kept(kept: str) -> None:
    """Text of another program belongs to no past. Nothing fits a past that has just begun."""
    assert beginning().fits(kept, alone=True) is (kept == NONE)
    assert after(9).fits(kept, alone=True) is False


def test_index_that_keeps_no_mark_fits() -> None:
    assert after(9).fits(None, alone=True)


def test_mark_that_is_being_compared_fits() -> None:
    assert Past(9, ("a",), refused="12.z").fits("12.z", alone=True)


def test_bookmark_sees_a_restore() -> None:
    """When other relays begin pages, and compare the index again, that is not a restore."""
    before = after(2)
    bookmark = Bookmark()
    assert bookmark.sees(None)
    bookmark.claimed(before)
    later = after(5, past=before)
    assert bookmark.sees(later)
    assert bookmark.sees(Past(later.page + 3, ("new",)))
    assert not bookmark.sees(before)
    assert bookmark.went_back
    bookmark.claimed(before)
    assert not bookmark.sees(None)
    assert not bookmark.went_back
