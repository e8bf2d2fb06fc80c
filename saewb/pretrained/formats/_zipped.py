"""What is checked of every zip file before anything in it is read."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from saewb.errors import FormatError, explain

_MOST = 4096  # members
# Weights shrink to no less than about half; a member that claims more than this is made to fill memories.
_MOST_RATIO, _SMALL = 20, 16 << 20


@contextmanager
def refusing(path: Path, kind: str) -> Iterator[None]:
    """Inside, what a damaged or hostile zip file leads to is a FormatError."""
    try:
        yield
    except FormatError:
        raise
    except (
        *(zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError, RuntimeError, OSError, EOFError),
        *(ValueError, TypeError, LookupError, SyntaxError, OverflowError, MemoryError, RecursionError, AttributeError),
    ) as error:
        raise FormatError(explain(f"{path.name} is damaged or not {kind}: {error}.")) from error


def members(archive: zipfile.ZipFile, path: Path) -> list[zipfile.ZipInfo]:
    """Of an open zip file, after a look at their names and sizes.

    Raises:
        FormatError: for two of one name, names that leave the file's own folder, a packing other than stored or
            deflated, sizes that exceed the file, or a member that would unpack to far more than it takes up.
    """
    infos, size = archive.infolist(), path.stat().st_size
    names = [info.filename for info in infos]
    if len(infos) > _MOST or len(set(names)) != len(names):
        raise FormatError(explain(f"{path.name} has {len(infos)} members, {len(set(names))} different names."))
    if sum(info.compress_size for info in infos) > size:
        raise FormatError(explain(f"the members of {path.name} are larger than its {size} bytes."))
    for info in infos:
        parts = info.filename.split("/")
        if ".." in parts or not parts[0] or "\\" in info.filename:
            raise FormatError(explain(f"{path.name} has a member {info.filename!r}.", want="names inside the file"))
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise FormatError(explain(f"{info.filename} in {path.name} is packed.", want="stored or deflated members"))
        stored = info.compress_type == zipfile.ZIP_STORED
        bomb = info.file_size > max(_SMALL, _MOST_RATIO * info.compress_size)
        if (stored and info.file_size != info.compress_size) or bomb:
            raise FormatError(
                explain(
                    f"{info.filename} in {path.name} would unpack {info.compress_size} bytes to {info.file_size}.",
                    want=f"at most {_MOST_RATIO} times as many",
                )
            )
    return infos


def data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where in the file a member's bytes begin.

    Raises:
        FormatError: if there is no member there, or it is longer than the file.
    """
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        local = file.read(30)
    # The lengths of name and extra field there need not be those of the directory at the file's end.
    start = info.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
    if len(local) < 30 or local[:4] != b"PK\x03\x04" or start + info.compress_size > path.stat().st_size:
        raise FormatError(explain(f"{path.name} is damaged at {info.filename}."))
    return start
