"""The Parquet tables: their schemas, one writer, one checking reader.

Every table is compressed (Zstandard, or LZ4 where it is read row by row), carries page checksums and, for the image
columns, the Hugging Face ``Image`` feature, so that pandas, polars, DuckDB and ``datasets`` (3 or newer) open it and
show pictures. The file's metadata says where it comes from (run, iteration, digests, code version); it holds no times
and no host names, so that equal inputs give equal bytes.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from earl.files import atomic
from earl.files.remedies import OURS, Remedies, described
from earl.messages.errors import EarlError

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# Lists of tokens are declared at their widest and stored as the smallest unsigned type that holds the vocabulary.
TOKENS = pa.list_(pa.uint32())
# See `earl.data.grids`.
TOKEN_GRID = pa.struct([("height", pa.uint16()), ("width", pa.uint16()), ("ids", pa.binary())])
REASONING = pa.list_(pa.struct([("key", pa.string()), ("value", pa.string())]))
LEFT_OUT = "left_out_prompts"
"""Metadata of an iteration's rollouts: prompts passed over, being too long, up to the last one of the round."""
LEDGER = "curriculum_digest"
"""The same: digest of the prompts that rest in the iteration, see `earl.run.curriculum`."""
PASSED_OVER = "passed_over_prompts"
"""The same: prompts passed over since they rest, up to the last one of the round."""
USABLE = "usable_groups"
"""Metadata of the rollouts of a further round: usable groups of the rounds before, by which it is needed or not."""
DECIDED_BY = "scores_digests"
"""The same: digests of the files of scores that say so, as JSON."""
SAMPLING = "sampling"
"""Metadata of an evaluation's rollouts: `earl.config.freeze.sampling` as JSON."""
SCORE_RANGE = (0.0, 10.0)
SCORE_COLUMNS = ("edit_success", "overedit", "naturalness", "artifacts", "ground_score")
"""Every score that a judge may give."""


def _schema(name: str, *columns: pa.Field) -> pa.Schema:
    return pa.schema(columns, metadata={"earl_table": name})


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


def _score(name: str) -> pa.Field:
    return pa.field(name, pa.float32(), metadata={"range": json.dumps(SCORE_RANGE)})


RAW = _schema(
    "raw pairs",
    _required("example_id", pa.string()),
    pa.field("task", pa.string()),
    _required("instruction", pa.string()),
    pa.field("reasoning", pa.string()),
    _required("original", IMAGE),
    pa.field("edited", IMAGE),
)
TOKENISED = _schema(
    "tokenised examples",
    _required("dataset", pa.string()),
    _required("example_id", pa.string()),
    pa.field("task", pa.string()),
    _required("instruction", pa.string()),
    pa.field("reasoning", REASONING),
    _required("original_tokens", TOKEN_GRID),
    pa.field("target_tokens", TOKEN_GRID),
    pa.field("original", IMAGE),
    pa.field("target", IMAGE),
)
PREFERRED = _schema(
    "tokenised examples",
    *TOKENISED,
    _required("chosen_token_ids", TOKENS),
    _required("rejected_token_ids", TOKENS),
    _required("episode_id", pa.string()),
    _required("reward", pa.float32()),
    _required("rejected_episode_id", pa.string()),
    _required("rejected_reward", pa.float32()),
)
"""Tokenised examples whose edit a policy has sampled: the best completion of a group, and the worst.

The two hold the ids of all that follows the instruction, the text that the completion was started from included.
"""
COMPLETIONS = ("chosen_token_ids", "rejected_token_ids")
REJECTED = _schema(
    "rejected rows",
    _required("file", pa.string()),
    _required("row", pa.int64()),
    pa.field("example_id", pa.string()),
    pa.field("column", pa.string()),
    _required("reason", pa.string()),
)
"""Rows of a raw data set that could not be used: a few fixed words, then after a colon what was found there."""
ROLLOUTS = _schema(
    "rollouts",
    _required("episode_id", pa.string()),
    _required("group_id", pa.string()),
    _required("sample_index", pa.int32()),
    _required("dataset", pa.string()),
    _required("example_id", pa.string()),
    pa.field("task", pa.string()),
    _required("instruction", pa.string()),
    _required("prompt_token_ids", TOKENS),
    _required("completion_token_ids", TOKENS),
    _required("behavior_logprobs", pa.list_(pa.float32())),
    _required("finish_reason", pa.string()),
    _required("completion_text", pa.string()),
    _required("original", IMAGE),
    pa.field("target", IMAGE),
    pa.field("edited", IMAGE),
)
SCORES = _schema(
    "scores",
    _required("episode_id", pa.string()),
    _required("group_id", pa.string()),
    _required("status", pa.string()),
    *map(_score, SCORE_COLUMNS),
    pa.field("raw", pa.string()),
    _required("judge", pa.string()),
)
REQUEST = pa.struct(
    [
        ("question", pa.string()),
        ("rubric", pa.string()),
        ("rubric_digest", pa.string()),
        ("attempt", pa.int32()),
        ("continues", pa.string()),
        ("seed", pa.int64()),
        ("error", pa.string()),
        ("tokens_in", pa.int32()),
        ("tokens_out", pa.int32()),
        ("seconds", pa.float32()),
        (
            "passes",
            pa.list_(
                pa.struct(
                    [
                        ("raw", pa.string()),
                        ("finish_reason", pa.string()),
                        ("failure", pa.string()),
                        ("scores", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float32())]))),
                    ]
                )
            ),
        ),
    ]
)
"""One request to a judge model.

``question`` is the digest of all that the answer depends on; rows with the same one share the request. ``attempt``
counts from 0; ``continues`` is the beginning of the answer that the model had to go on with. Each of the passes has its
raw text and its scores, in the rubric's range, or why it has none. ``error`` says why there is no answer at all.
"""
MODEL_SCORES = _schema(
    "scores",
    *SCORES,
    pa.field("failure", pa.string()),
    *(pa.field(f"{name}_variance", pa.float32()) for name in SCORE_COLUMNS),
    _required("judge_model", pa.string()),
    pa.field("judge_revision", pa.string()),
    pa.field("tokens_in", pa.int64()),
    pa.field("tokens_out", pa.int64()),
    pa.field("seconds", pa.float32()),
    pa.field("requests", pa.list_(REQUEST)),
)
"""What a judge that asks a model adds: the variance of each score over its passes, and everything that was asked."""
RANKED = _schema(
    "ranked images",
    _required("example_id", pa.string()),
    _required("rank", pa.float32()),
    pa.field("label", pa.string()),
    _required("instruction", pa.string()),
    _required("original", IMAGE),
    pa.field("target", IMAGE),
    _required("edited", IMAGE),
)
"""Edits whose order is known, to check a judge on; within an example, a higher rank is a better edit."""
EPISODES = _schema(
    "episodes",
    _required("episode_id", pa.string()),
    _required("group_id", pa.string()),
    pa.field("reward", pa.float32()),
    pa.field("advantage", pa.float32()),
    _required("used", pa.bool_()),
    pa.field("reason", pa.string()),
    pa.field("viescore", pa.float32()),
    _required("completion_tokens", pa.int32()),
    _required("prompt_digest", pa.string()),
)


def smallest_unsigned(largest: int) -> pa.DataType:
    """Return the smallest unsigned integer type that holds ``largest``."""
    for kind in (pa.uint8(), pa.uint16(), pa.uint32()):
        if largest < 2**kind.bit_width:
            return kind
    raise ValueError(f"{largest} does not fit in 32 bits")


def _narrowed(kind: pa.DataType, leaf: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_(_narrowed(kind.value_type, leaf))
    return leaf if pa.types.is_unsigned_integer(kind) else kind


def features(fields: Sequence[pa.Field]) -> dict[str, object]:
    """Return what `datasets`, of any version, is told about columns in the metadata of a file."""
    return {field.name: _feature(field.type) for field in fields}


def _feature(kind: pa.DataType) -> object:
    if kind == IMAGE:
        return {"_type": "Image"}
    if pa.types.is_list(kind):
        # A plain list is known to every version of `datasets`; a name for it, `Sequence` or `List`, only to some.
        return [_feature(kind.value_type)]
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"dtype": {"float": "float32", "double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}


def write_table(
    path: Path | str,
    schema: pa.Schema,
    columns: Mapping[str, Sequence] | pa.Table,
    metadata: Mapping[str, str],
    largest_token: int = 2**32 - 1,
    rows_per_group: int | None = None,
) -> None:
    """Write a table atomically.

    Args:
        path: Where the file appears once it is complete.
        schema: One of this module's schemas, possibly with further columns appended.
        columns: One sequence (or array) a column, all of one length.
        metadata: Strings for the file's metadata; keys get no prefix.
        largest_token: Largest id that lists of tokens may hold; sets their stored integer type for every shard alike.
        rows_per_group: For a file that is read row by row: rows of a row group, the least that such a reader reads. The
            file is quicker to unpack and a little larger. By default it is written for readers of whole columns.

    Raises:
        EarlError: when a column is missing, does not convert to its type, or the system refuses the write.
    """
    leaf = smallest_unsigned(largest_token)
    # Stored as nullable: `datasets` takes an image column for a plain struct otherwise. The reader checks for nulls.
    fields = [field.with_type(_narrowed(field.type, leaf)).with_nullable(True) for field in schema]
    arrays = []
    for field in fields:
        try:
            arrays.append(_array(columns[field.name], field.type))
        except KeyError as error:
            raise EarlError(f"{path}: column {field.name!r} is missing from what is to be written") from error
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as error:
            raise EarlError(f"{path}: column {field.name!r} does not convert to {field.type}: {error}") from error
    info = {
        **(schema.metadata or {}),
        **{key.encode(): value.encode() for key, value in metadata.items()},
        b"huggingface": json.dumps({"info": {"features": features(fields)}}).encode(),
    }
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata=info))
    by_row = rows_per_group is not None
    with atomic.file(path) as temporary:
        pq.write_table(
            table,
            temporary,
            # A page of few rows is unpacked sooner than Zstandard is set up for it, and a dictionary is one page more.
            compression="lz4" if by_row else "zstd",
            use_dictionary=not by_row,
            row_group_size=rows_per_group if by_row else 512,
            write_page_checksum=True,
            write_statistics=_with_statistics(fields),
        )


def _with_statistics(fields: Sequence[pa.Field]) -> list[str]:
    """Return the columns, down to their leaves, that get statistics: all but the ids of grids.

    The least and the greatest of them would be stored four times in each row group, and tell nothing.
    """
    return [
        leaf
        for field in fields
        for leaf in _leaves(field.name, field.type)
        if field.type != TOKEN_GRID or leaf != f"{field.name}.ids"
    ]


def _leaves(name: str, kind: pa.DataType) -> list[str]:
    if pa.types.is_list(kind):
        return _leaves(f"{name}.list.element", kind.value_type)
    if pa.types.is_struct(kind):
        return [leaf for field in kind for leaf in _leaves(f"{name}.{field.name}", field.type)]
    return [name]


def _array(values: object, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values.cast(kind)
    return pa.array(values, type=kind)


def open_table(path: Path | str, remedies: Remedies = OURS) -> pq.ParquetFile:
    """Open a Parquet file to read parts of it; what is read is not checked beyond page checksums.

    Args:
        remedies: What to say helps, by whose file it is.

    Raises:
        EarlError: when the file is missing, truncated or no Parquet.
    """
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise EarlError(f"{path}: does not exist; {remedies.missing}") from error
    except (pa.ArrowInvalid, OSError) as error:
        found = described(Path(path)) or f"is not a complete Parquet file ({error}); {remedies.damaged}"
        raise EarlError(f"{path}: {found}") from error


def read_metadata(path: Path | str) -> dict[str, str]:
    """Return the metadata strings of a table without reading its rows."""
    with open_table(path) as source:
        return metadata_of(source)


def metadata_of(source: pq.ParquetFile) -> dict[str, str]:
    """Return the metadata strings of an open table."""
    found = source.schema_arrow.metadata or {}
    return {key.decode(): value.decode() for key, value in found.items() if key != b"ARROW:schema"}


def read_table(
    path: Path | str, schema: pa.Schema, columns: Sequence[str] | None = None, remedies: Remedies = OURS
) -> pa.Table:
    """Read a table and check it against ``schema``.

    Args:
        path: The Parquet file.
        schema: What the columns must be; token columns may have any unsigned width, strings may be large.
        columns: Names to read, by default all of the schema; columns beyond the schema are ignored.
        remedies: What to say helps, by whose file it is.

    Raises:
        EarlError: naming file and column, when the file is truncated, a column is missing, damaged, of another type,
            null where it may not be, not finite, or a score lies outside its range.
    """
    wanted = list(columns) if columns is not None else schema.names
    with open_table(path, remedies) as source:
        check_columns(path, source.schema_arrow, schema, wanted, remedies)
        return _read(path, source, schema, wanted, remedies)


def read_group(
    path: Path | str,
    source: pq.ParquetFile,
    schema: pa.Schema,
    columns: Sequence[str],
    group: int,
    first_row: int,
    remedies: Remedies = OURS,
) -> pa.Table:
    """Read one row group, from ``first_row`` on, of an open table whose columns were checked; values are checked here.

    Raises:
        EarlError: as `read_table`.
    """
    return _read(path, source, schema, columns, remedies, group, first_row)


def read_rows(
    path: Path | str, schema: pa.Schema, columns: Sequence[str], key: str, wanted: Collection[str]
) -> dict[str, dict[str, Any]]:
    """Read the rows whose ``key`` is one of ``wanted``, one row group after the other: few of many images.

    Returns:
        Rows by their ``key``; those that the table does not have are missing.

    Raises:
        EarlError: as `read_table`.
    """
    found: dict[str, dict[str, Any]] = {}
    first = 0
    with open_table(path) as source:
        check_columns(path, source.schema_arrow, schema, [key, *columns])
        for group in range(source.num_row_groups):
            names = read_group(path, source, schema, [key], group, first)[key].to_pylist()
            if chosen := [row for row, name in enumerate(names) if name in wanted]:
                rows = read_group(path, source, schema, columns, group, first).take(chosen).to_pylist()
                found |= zip((names[row] for row in chosen), rows, strict=True)
            first += len(names)
    return found


def filled_columns(source: pq.ParquetFile, schema: pa.Schema, wanted: Sequence[str]) -> list[list[str]]:
    """Return for each row group those of the wanted columns that hold anything, as the group's statistics say.

    Reading a column of nulls takes longer than asking. Lists are not asked: an empty one counts as a null there. Grids
    are known by their height and width.
    """
    leaves: dict[str, list[int]] = {}
    for index, leaf in enumerate(source.schema):
        name, _, below = leaf.path.partition(".")
        if name in wanted and schema.field(name).nullable and below != "ids" and not below.startswith("list."):
            leaves.setdefault(name, []).append(index)
    found = []
    for group in map(source.metadata.row_group, range(source.num_row_groups)):
        empty = {name for name, indices in leaves.items() if all(_is_null(group.column(index)) for index in indices)}
        found.append([name for name in wanted if name not in empty])
    return found


def _is_null(leaf: pq.ColumnChunkMetaData) -> bool:
    return leaf.is_stats_set and leaf.statistics.null_count == leaf.num_values


def _read(
    path: Path | str,
    source: pq.ParquetFile,
    schema: pa.Schema,
    wanted: Sequence[str],
    remedies: Remedies,
    group: int | None = None,
    first_row: int = 0,
) -> pa.Table:
    try:
        if group is None:
            table = source.read(columns=wanted)
        else:
            # For so few rows, handing them to threads costs more than it saves.
            table = source.read_row_group(group, columns=wanted, use_threads=False)
    except (pa.ArrowInvalid, OSError) as error:
        raise EarlError(
            f"{path}: column {_damaged_column(source, wanted)!r} is damaged ({error}); {remedies.damaged}"
        ) from error
    for name in wanted:
        check_values(path, schema.field(name), table.column(name), first_row, remedies)
    return table.select(wanted)


def check_columns(
    path: Path | str, found: pa.Schema, schema: pa.Schema, wanted: Sequence[str], remedies: Remedies = OURS
) -> None:
    """Check names and types only; see `read_table` for the errors."""
    for name in wanted:
        if name not in found.names:
            has = ", ".join(found.names)
            raise EarlError(f"{path}: column {name!r} is missing; the file has {has}; {remedies.wrong}")
        expected, actual = schema.field(name).type, found.field(name).type
        if not _compatible(actual, expected):
            raise EarlError(f"{path}: column {name!r} has type {actual} where {expected} is expected; {remedies.wrong}")


def _compatible(actual: pa.DataType, expected: pa.DataType) -> bool:
    if pa.types.is_unsigned_integer(expected) and pa.types.is_integer(actual):
        return True
    if pa.types.is_string(expected) and pa.types.is_large_string(actual):
        return True
    if pa.types.is_binary(expected) and pa.types.is_large_binary(actual):
        return True
    if pa.types.is_list(expected) and (pa.types.is_list(actual) or pa.types.is_large_list(actual)):
        return _compatible(actual.value_type, expected.value_type)
    if pa.types.is_struct(expected) and pa.types.is_struct(actual):
        present = {field.name: field.type for field in actual}
        return all(f.name in present and _compatible(present[f.name], f.type) for f in expected)
    return actual == expected


def _damaged_column(source: pq.ParquetFile, wanted: Sequence[str]) -> str:
    for name in wanted:
        try:
            source.read(columns=[name])
        except (pa.ArrowInvalid, OSError):
            return name
    return "?"


def check_values(
    path: Path | str, field: pa.Field, column: pa.ChunkedArray, first_row: int = 0, remedies: Remedies = OURS
) -> None:
    """Check a column for nulls where there may be none, numbers that are not finite, and its range of values."""
    if not field.nullable and column.null_count:
        row = first_row + column.is_null().index(True).as_py()
        raise EarlError(
            f"{path}: column {field.name!r} is null in row {row}, where a value is required; {remedies.wrong}"
        )
    kind = column.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if not pa.types.is_floating(kind):
        return
    leaves = column.combine_chunks()
    while leaves.type != kind:
        leaves = leaves.flatten()
    values = leaves.drop_null().to_numpy(zero_copy_only=False)
    if not np.isfinite(values).all():
        raise EarlError(
            f"{path}: column {field.name!r} holds {values[~np.isfinite(values)][0]}, and every value must be finite; "
            f"{remedies.wrong}"
        )
    limits = (field.metadata or {}).get(b"range")
    if limits is not None and len(values):
        low, high = json.loads(limits)
        if values.min() < low or values.max() > high:
            wrong = values[(values < low) | (values > high)][0]
            raise EarlError(f"{path}: column {field.name!r} holds {wrong}, outside {low:g}..{high:g}; {remedies.wrong}")
