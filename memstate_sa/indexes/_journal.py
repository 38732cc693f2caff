"""A file that is appended to: records of JSON and bytes, each with checksums, which survive a ``kill -9``."""

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
    """One process writes it, and one thread at a time. Errors are OSError.

    What `append` has returned from is on the disk. A record that was being appended when the process was killed is cut
    off by `read`; it was never acknowledged. Anything else that is not as it was written, and all that follows it, is
    cut off too, and then ``damaged`` is True: acknowledged records may be among it.
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
        """Every record, oldest first; to its end, before anything is appended. A file that is missing is begun."""
        self.damaged = False
        self._new.unlink(missing_ok=True)  # of a replacement that was killed
        file = self._file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
        self._named = False  # perhaps: the process that named it may have been killed before the name was on the disk
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
        """Have these records instead of all that there are: as a whole or, if it fails or is killed, not at all.

        If only the folder could not be synchronised, they are there, and `append` does that before anything else.
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
        """A file's name is on the disk when its folder is; before that, nothing that is appended would be."""
        if self._named:
            return
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self._named = True

    def _back(self, file: BinaryIO) -> None:
        """Cut off a record that failed. If that fails too, nothing more is appended until the file is read again."""
        try:
            file.truncate(self._end)
            file.seek(self._end)
        except OSError:
            self.close()

    def _next(self, reader: BinaryIO, remaining: int) -> Record | None:
        """The next record; None, and `damaged` unless it may have been cut off by a kill, when it is not whole."""
        size = _HEADER.size + _CHECKSUM.size
        if remaining < size:
            return None
        header = reader.read(_HEADER.size)
        # A checksum of its own: a length that is wrong would look like a record that was cut off.
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
    while whole:  # a raw file may take a part
        whole = whole[file.write(whole) :]
