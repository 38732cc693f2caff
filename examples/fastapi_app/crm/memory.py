"""The memory of the service: its index, its models, and the Sessions that write them."""

import os

import chromadb

from crm.database import Sessions, engine
from crm.models import Contact, Note, NoteTag
from memstate_sa import Memory, sqlite
from memstate_sa.indexes import ChromaIndex

# Only one process can use a folder. Several workers, or a separate relay, need a server: CRM_CHROMA=http://host:8000
CHROMA = os.environ.get("CRM_CHROMA", "chroma")
_host, _, _port = CHROMA.removeprefix("http://").partition(":")
client = chromadb.HttpClient(_host, int(_port)) if "://" in CHROMA else chromadb.PersistentClient(CHROMA)

memory = Memory(ChromaIndex(client, "crm"))
memory.track(Note, text="body", metadata=("owner_id", "contact_id"))
memory.track(
    Contact,
    text=lambda contact: ", ".join(filter(None, (contact.name, contact.company, contact.about))),
    metadata=("account_id",),
)
memory.track(NoteTag, text=None)  # tags have no vectors, but undo restores them with their note
memory.attach(Sessions)
sqlite.configure(engine)  # this does nothing on PostgreSQL
