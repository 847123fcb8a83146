"""A saved model -> the same model with its table's rows in another dtype, in a new folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sense_v2.core.config import EngramConfig
from sense_v2.core.errors import with_way_out
from sense_v2.engram.table.disk import copy_file
from sense_v2.engram.table.format import journal_name, lock_name, manifest_name
from sense_v2.engram.upkeep.convert import Conversion, convert_table
from sense_v2.hf.saving.folder import (
    CONFIG_FILE,
    MEMORY_FOLDER,
    OF_THE_TABLE,
    OVERLAY_FILE,
    REFERENCE_FILE,
    TABLE_FILE,
    referenced_table,
    replace_file,
)
from sense_v2.hf.saving.publishing import built_inside, files_in, finish_interrupted, locked_folder, publish


def convert_trained(
    folder: str | Path,
    output: str | Path,
    dtype: str,
    *,
    advance: Callable[[int], Any] = lambda num_bytes: None,
) -> Conversion:
    """Copy a model, with its table's rows in another dtype. Ended early, the same call goes on.

    Args:
        folder: The model's; it is only read.
        output: The new model's folder. All but the table comes at once: until then there is no model to load.
        dtype: Of the rows.
        advance: Is told how many bytes are read and written.

    Raises:
        FileExistsError: Another model is there.
        ValueError: The model has an overlay; or as `convert_table`.
    """
    folder, output = Path(folder), Path(output)
    memory, target = folder / MEMORY_FOLDER, output / MEMORY_FOLDER
    if output.exists():
        finish_interrupted(output)
    config = EngramConfig.load(memory / CONFIG_FILE)
    if (memory / OVERLAY_FILE).exists():
        raise with_way_out(
            ValueError(f"{folder} was saved with an overlay, which is of the table as it is and of no other"),
            f"Put it into the table first: sense-engram delta apply {memory / OVERLAY_FILE} {folder}, and remove it",
        )
    if (output / CONFIG_FILE).exists() and not (target / TABLE_FILE).exists():
        raise with_way_out(FileExistsError(f"{output} holds another model already"), "choose another --output")
    is_reference = (memory / REFERENCE_FILE).is_file()
    table = referenced_table(memory) if is_reference else memory / TABLE_FILE
    conversion = convert_table(table, target / TABLE_FILE, dtype, advance=advance)
    of_table = {TABLE_FILE, manifest_name(TABLE_FILE), journal_name(TABLE_FILE), lock_name(TABLE_FILE), CONFIG_FILE}
    of_table.add(REFERENCE_FILE)
    with built_inside(output) as staging:
        new = staging / MEMORY_FOLDER
        for source, into in ((memory, new), (folder, staging)):
            into.mkdir(exist_ok=True)
            for file in source.iterdir():
                belongs_to_table = source == memory and (file.name in of_table or OF_THE_TABLE.fullmatch(file.name))
                if file.is_file() and not belongs_to_table and file.suffix != ".tmp":
                    copy_file(file, into / file.name)
        replace_file(new / CONFIG_FILE, dataclasses.replace(config, dtype=dtype).to_json().encode())
        with locked_folder(output, wait=True):
            publish(staging, output, files_in(staging), [])
    return conversion
