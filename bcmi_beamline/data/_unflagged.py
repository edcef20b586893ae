"""A growing HDF5 file read as if it were finished.

HDF5 marks a file that a writer holds (SWMR) and reads it by trying again, each time waiting twice as long,
until every checksum fits: on a file that a dying writer left incomplete it waits for ever. Here the mark is
hidden from HDF5, and the end is where the file ends now; HDF5 then reads once, and a block that does not fit
is an error.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_FLAGS = 11
_END = slice(28, 36)
_CHECKED = 44
_LENGTH = 48
_WORD = 0xFFFFFFFF


class Unflagged(io.FileIO):
    """A file whose HDF5 superblock (version 3) says that nobody writes to it.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "r")
        head = bytearray(super().read(_LENGTH))
        super().seek(0)
        known = len(head) == _LENGTH and head[:8] == _SIGNATURE and head[8] == 3 and head[9] == 8
        if known:
            head[_FLAGS] = 0
            head[_END] = os.fstat(self.fileno()).st_size.to_bytes(8, "little")
            head[_CHECKED:] = lookup3(bytes(head[:_CHECKED])).to_bytes(4, "little")
        self._head = bytes(head) if known else b""

    def readinto(self, buffer) -> int:
        """Read, with the superblock in place of the file's."""
        start = self.tell()
        count = super().readinto(buffer) or 0
        if start < len(self._head):
            part = self._head[start : start + count]
            memoryview(buffer).cast("B")[: len(part)] = part
        return count


def _turn(value: int, bits: int) -> int:
    return (value << bits | value >> (32 - bits)) & _WORD


def lookup3(data: bytes) -> int:
    """Bob Jenkins' hash of `data`, with which HDF5 checks its metadata.

    References
    ----------
    .. [1] B. Jenkins, lookup3 (2006), ``hashlittle``; HDF5 file format specification 3.0, section II.A.
    """
    a = b = c = (0xDEADBEEF + len(data)) & _WORD
    last = max(0, (len(data) - 1) // 12) * 12
    for start in range(0, last, 12):
        x, y, z = (int.from_bytes(data[start + k : start + k + 4], "little") for k in (0, 4, 8))
        a, b, c = (a + x) & _WORD, (b + y) & _WORD, (c + z) & _WORD
        for bits in (4, 6, 8, 16, 19, 4):
            a = (a - c & _WORD) ^ _turn(c, bits)
            c = (c + b) & _WORD
            a, b, c = b, c, a
    x, y, z = (int.from_bytes(data[last + k : last + k + 4], "little") for k in (0, 4, 8))
    a, b, c = (a + x) & _WORD, (b + y) & _WORD, (c + z) & _WORD
    for bits in (14, 11, 25, 16, 4, 14, 24):
        c = ((c ^ b) - _turn(b, bits)) & _WORD
        a, b, c = b, c, a
    return b
