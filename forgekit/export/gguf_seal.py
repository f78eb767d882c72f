"""Size and checksum of a GGUF file, kept in its own metadata: forgekit.file_bytes and forgekit.sha256.

The checksum is the SHA-256 of the whole file with the 64 places of the checksum itself taken as zeros. A reader of GGUF
that does not know the two fields passes over them.
"""

import hashlib
import struct
from pathlib import Path
from typing import IO, Any

ALIGNMENT = 32  # bytes; GGUF's default
DIGITS = 64  # hexadecimal, of a SHA-256
BLANK = b"0" * DIGITS
SIZE_KEY, SUM_KEY = b"forgekit.file_bytes", b"forgekit.sha256"
FRONT = 1 << 16  # the fields stand among the first bytes of the file
READ = 1 << 20


def add_blank_seal(writer: Any) -> None:
    """Add the two fields, blank, to a gguf.GGUFWriter; both have a fixed length, so they are filled in later."""
    writer.add_uint64(SIZE_KEY.decode(), 0)
    writer.add_string(SUM_KEY.decode(), BLANK.decode())


def find_fields(front: bytes) -> tuple[int, int] | None:
    """Return where the values of size and checksum begin, or None in a file of another program."""
    if SIZE_KEY not in front or SUM_KEY not in front:
        return None
    # behind a key stand its type (4 bytes) and, for text, its length (8 bytes)
    return front.index(SIZE_KEY) + len(SIZE_KEY) + 4, front.index(SUM_KEY) + len(SUM_KEY) + 12


class Seal:
    """The running checksum of a file while it is written.

    Args:
        header: everything before the first tensor, padded.
        size: bytes of the whole file.
    """

    def __init__(self, header: bytes, size: int):
        fields = find_fields(header[:FRONT])
        assert fields is not None
        self.place = fields[1]
        self.header = header[: fields[0]] + struct.pack("<Q", size) + header[fields[0] + 8 :]
        self.sum = hashlib.sha256(self.header)

    def add(self, data: Any) -> Any:
        """Take some bytes into the checksum and return them."""
        self.sum.update(data)
        return data

    def close(self, file: IO[bytes]) -> None:
        """Write the checksum into its place."""
        file.seek(self.place)
        file.write(self.sum.hexdigest().encode())


def read_seal(path: Path) -> tuple[int, bool]:
    """Return the bytes that a file was meant to have (0 where it does not say) and whether its checksum is right."""
    with path.open("rb") as file:
        front = file.read(FRONT)
        fields = find_fields(front)
        if fields is None or len(front) < max(fields) + DIGITS:
            return 0, False
        size, place = struct.unpack("<Q", front[fields[0] : fields[0] + 8])[0], fields[1]
        found = hashlib.sha256(front[:place] + BLANK + front[place + DIGITS :])
        while data := file.read(READ):
            found.update(data)
    return size, found.hexdigest().encode() == front[place : place + DIGITS]
