"""Facts with a string key."""

from __future__ import annotations

from sqlalchemy import select

from memstate_sa.db.tables import log
from tests.support import Tag, World


def say(world: World, actor: str | None = None, session_id: str | None = None, **tags: str | None) -> str:
    """Set these tags in one transaction (None deletes). Returns its id."""
    with world.session() as session:
        world.memory.annotate(session, actor=actor, session_id=session_id)
        for name, meaning in tags.items():
            if meaning is None:
                session.delete(session.get_one(Tag, name))
            else:
                session.merge(Tag(name=name, meaning=meaning))
        session.commit()
        return session.scalars(select(log.c.tx).order_by(log.c.id.desc()).limit(1)).one()


def tags(world: World) -> dict[str, str]:
    with world.session() as session:
        return {tag.name: tag.meaning for tag in session.scalars(select(Tag))}
