"""An append-only file of records: JSON and bytes, each with checksums. Records survive a ``kill -9``."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

Record = tuple[Any, bytes]

_HEADER = struct.Struct("<QII")
_CHECKSUM = struct.Struct("<I")


class Journal:
    """An append-only file. One process writes it, one thread at a time. Errors are OSError.

    A record is on the disk when `append` returns. If a kill interrupts `append`, the next `read` cuts the unfinished
    record off: it was never acknowledged. `read` also cuts off a damaged record and everything behind it. Then
    ``damaged`` is True, because acknowledged records may be lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._new = path.with_suffix(".new")
        self.damaged = False
        self._end = 0
        self._file: BinaryIO | None = None
        self._named = False

    @property
    def size(self) -> int:
        return self._end

    def read(self) -> Iterator[Record]:
        """All records, oldest first. Read to the end before the first `append`. A missing file is created."""
        self.damaged = False
        self._new.unlink(missing_ok=True)  # a replacement that was killed may have left this file
        file = self._file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
        self._named = False  # the process that created the file may have been killed before its name was on the disk
        self._settle_name()
        with self.path.open("rb") as reader:
            self._end, whole = 0, os.fstat(reader.fileno()).st_size
            while self._end < whole:
                record = self._next(reader, whole - self._end)
                if record is None:
                    file.truncate(self._end)
                    os.fdatasync(file.fileno())
                    break
                yield record
                self._end = reader.tell()
        file.seek(self._end)

    def append(self, value: Any, data: bytes = b"") -> None:
        file = self._file
        if file is None:
            raise OSError(f"{self.path.name} is not open")
        self._settle_name()
        try:
            _write(file, value, data)
            os.fdatasync(file.fileno())
            self._end = file.tell()
        except BaseException:
            self._back(file)
            raise

    def replace(self, records: Iterable[Record]) -> None:
        """Replace all records by *records*, as a whole. If this fails or is killed, the old records stay.

        If only synchronising the folder fails, the new records are in place. The next `append` synchronises it first.
        """
        file = self._new.open("w+b", buffering=0)
        try:
            for value, data in records:
                _write(file, value, data)
            os.fsync(file.fileno())
            self._new.replace(self.path)
        except BaseException:
            file.close()
            self._new.unlink(missing_ok=True)
            raise
        self.close()
        self._file, self._end, self._named = file, file.tell(), False
        self._settle_name()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _settle_name(self) -> None:
        """Synchronise the folder, so that the file's name is on the disk. Otherwise a crash could lose the file."""
        if self._named:
            return
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._named = True

    def _back(self, file: BinaryIO) -> None:
        """Cut off a record that failed. If that fails too, close the file: `append` fails until `read` opens it."""
        try:
            file.truncate(self._end)
            file.seek(self._end)
        except OSError:
            self.close()

    def _next(self, reader: BinaryIO, remaining: int) -> Record | None:
        """The next record, or None if it is incomplete. Sets ``damaged`` unless a kill may have cut the record off."""
        size = _HEADER.size + _CHECKSUM.size
        if remaining < size:
            return None
        header = reader.read(_HEADER.size)
        # The header has its own checksum: with a wrong length, a damaged record would look like an unfinished one.
        if reader.read(_CHECKSUM.size) != _CHECKSUM.pack(crc32(header)):
            self.damaged = True
            return None
        data_size, json_size, checksum = _HEADER.unpack(header)
        if remaining - size < json_size + data_size:
            return None
        text, data = reader.read(json_size), reader.read(data_size)
        if crc32(data, crc32(text)) != checksum:
            self.damaged = True
            return None
        return json.loads(text), data


def _write(file: BinaryIO, value: Any, data: bytes) -> None:
    text = json.dumps(value, separators=(",", ":")).encode()
    header = _HEADER.pack(len(data), len(text), crc32(data, crc32(text)))
    whole = memoryview(b"".join((header, _CHECKSUM.pack(crc32(header)), text, data)))
    while whole:  # an unbuffered file may write only a part
        whole = whole[file.write(whole) :]
