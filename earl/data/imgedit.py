"""ImgEdit-Bench's basic part, JSON and pictures in folders, as a Parquet file of prompts."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from earl.files import atomic, tables
from earl.messages.errors import EarlError

LISTS = ("singleturn.json", "basic_edit.json")
_SCHEMA = pa.schema(
    [("key", pa.string()), ("image", tables.IMAGE), ("prompt", pa.string()), ("edit_type", pa.string())]
)


def convert(folder: Path, out: Path) -> int:
    """Write the prompts below a folder as columns key, image, prompt and edit_type; return how many there are.

    Args:
        folder: Holds `singleturn.json` (or `basic_edit.json`, as it is called elsewhere): an object by key of ``id``,
            the picture's path beside it, ``prompt`` and ``edit_type``.
        out: Parquet file to write, by key.

    Raises:
        EarlError: naming what is missing.
    """
    found = sorted(path for name in LISTS for path in folder.rglob(name))
    if len(found) != 1:
        raise EarlError(f"{folder}: holds {len(found)} files {' or '.join(LISTS)} where one is expected")
    try:
        listed = json.loads(found[0].read_text(encoding="utf-8"))
        rows = [(key, one["id"], one["prompt"], one["edit_type"]) for key, one in sorted(listed.items())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EarlError(f"{found[0]}: is no object of id, prompt and edit_type ({error}); download it again") from error
    pictures = []
    for key, name, _, _ in rows:
        path = found[0].parent / name
        if not path.resolve().is_relative_to(found[0].parent.resolve()) or not path.is_file():
            raise EarlError(f"{found[0]}: the picture of {key!r}, {name}, is not there; download it again")
        pictures.append({"bytes": path.read_bytes(), "path": name})
    columns = [[row[0] for row in rows], pictures, [row[2] for row in rows], [row[3] for row in rows]]
    with atomic.file(out) as temporary:
        pq.write_table(pa.table(columns, schema=_SCHEMA), temporary, row_group_size=32)
    return len(rows)
