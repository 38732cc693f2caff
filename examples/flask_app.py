"""Bookmarks with a memory: a Flask application with the usual scoped_session.

``flask --app examples/flask_app.py run`` (needs Flask and the extras "chroma" and "wordllama"), then::

    curl -H 'X-User: ada' --json '{"url": "https://example.org/bread", "note": "how to bake rye bread"}' \\
        localhost:5000/bookmarks
    curl -H 'X-User: ada' 'localhost:5000/search?q=baking'
    curl -H 'X-User: ada' -X POST localhost:5000/undo

BOOKMARKS_URL is the database (default: sqlite:///bookmarks.db), and BOOKMARKS_CHROMA the folder of the vectors. Only
one process can use that folder. With ``gunicorn --workers 4``, use a Chroma server and ``chromadb.HttpClient()``.
"""

from __future__ import annotations

import atexit
import os

from flask import Flask, Response, abort, g, jsonify, request
from sqlalchemy import String, create_engine, event, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from memstate_sa import ConflictError, Memory, sqlite
from memstate_sa.indexes import ChromaIndex, VectorIndex


class Base(DeclarativeBase):
    pass


class Bookmark(Base):
    __tablename__ = "bookmark"
    __table_args__ = {"sqlite_autoincrement": True}  # SQLite never uses the id of a deleted bookmark again
    id: Mapped[int] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(50), index=True)
    url: Mapped[str]
    note: Mapped[str]

    @property
    def as_json(self) -> dict[str, str | int]:
        return {"id": self.id, "url": self.url, "note": self.note}


def create_app(url: str | None = None, index: VectorIndex | None = None) -> Flask:
    app = Flask(__name__)
    engine = create_engine(url or os.environ.get("BOOKMARKS_URL", "sqlite:///bookmarks.db"))
    db = scoped_session(sessionmaker(engine))

    memory = Memory(index or chroma())
    memory.track(Bookmark, text="note", metadata=("owner",))
    memory.attach(db)
    if engine.dialect.name == "sqlite":
        sqlite.configure(engine)
    Base.metadata.create_all(engine)
    memory.create_tables(engine)
    relay = memory.relay(engine)
    atexit.register(engine.dispose)
    atexit.register(memory.close)  # atexit calls this before engine.dispose

    @app.before_request
    def start_relay() -> None:
        """Only a serving process has requests. Other commands of Flask, and its reloader, call create_app as well."""
        relay.start()  # a running relay goes on

    @app.before_request
    def authenticate() -> None:
        """Take the user from a header, which a trusted proxy sets."""
        g.user = request.headers.get("X-User") or abort(401)
        db().info["user"] = g.user  # db() is the Session of this request

    @event.listens_for(db, "after_begin")
    def label(session: Session, *_: object) -> None:
        """Labels end with their transaction, so each transaction gets them."""
        memory.annotate(session, actor=session.info.get("user"))

    @app.teardown_appcontext
    def end_session(error: BaseException | None) -> None:
        db.remove()

    def mine() -> list[Bookmark]:
        return list(db.scalars(select(Bookmark).where(Bookmark.owner == g.user).order_by(Bookmark.id)))

    @app.get("/bookmarks")
    def list_bookmarks() -> Response:
        return jsonify([bookmark.as_json for bookmark in mine()])

    @app.post("/bookmarks")
    def add_bookmark() -> tuple[Response, int]:
        given = request.get_json()
        bookmark = Bookmark(owner=g.user, url=given["url"], note=given["note"])
        db.add(bookmark)
        db.commit()
        return jsonify(bookmark.as_json), 201

    @app.delete("/bookmarks/<int:number>")
    def delete_bookmark(number: int) -> tuple[str, int]:
        found = [bookmark for bookmark in mine() if bookmark.id == number] or abort(404)
        db.delete(found[0])
        db.commit()
        return "", 204

    @app.get("/search")
    def search() -> Response:
        query = select(Bookmark).where(Bookmark.owner == g.user)
        hits = memory.search(db(), request.args["q"], query, limit=3)
        return jsonify([{**hit.fact.as_json, "score": round(hit.score, 3)} for hit in hits])

    @app.post("/undo")
    def undo() -> Response | tuple[Response, int]:
        try:
            changes = memory.rollback(db(), actor=g.user)  # undo the last transaction of this user
        except ConflictError as error:
            return jsonify(in_the_way=[change.key for change in error.changes]), 409
        db.commit()
        return jsonify([{"op": change.op, "id": change.key} for change in changes])

    return app


def chroma() -> VectorIndex:
    import chromadb

    return ChromaIndex(chromadb.PersistentClient(os.environ.get("BOOKMARKS_CHROMA", "chroma")), "bookmarks")
