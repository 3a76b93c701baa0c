"""Whether what a table of an Arrow or Parquet file points to lies inside the file: pyarrow reads it unseen.

With offsets, lengths or indices that point elsewhere it reads memory that is not there, and the process is killed.
"""

import pyarrow as pa


def check_batch(batch: pa.RecordBatch) -> None:
    """Raise `pa.ArrowInvalid` for a batch that points outside of itself; text that is not UTF-8 is left to its row."""
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
            # The first thing that is wrong is only a text; the same bytes as no text show whether that is all.
            column.view(_as_bytes(column.type)).validate(full=True)


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """The type of the same buffers that does not ask for UTF-8."""
    texts = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    if kind in texts:
        return texts[kind]
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_as_bytes(kind.key_type), _as_bytes(kind.item_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_as_bytes(kind.value_type)))
    return kind
