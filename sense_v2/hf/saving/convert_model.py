"""A saved model -> the same model with its table's rows in another dtype, in a new folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sense_v2.core.config import EngramConfig
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
        output: The new model's folder. config.json comes last: until then there is no model to load.
        dtype: Of the rows.
        advance: Is told how many bytes are read and written.

    Raises:
        FileExistsError: Another model is there.
        ValueError: The model has an overlay; or as `convert_table`.
    """
    folder, output = Path(folder), Path(output)
    memory, target = folder / MEMORY_FOLDER, output / MEMORY_FOLDER
    config = EngramConfig.load(memory / CONFIG_FILE)
    if (memory / OVERLAY_FILE).exists():
        raise ValueError(
            f"{folder} was saved with an overlay, which is of the table as it is and of no other. Put it into the "
            f"table first: sense-engram delta apply {memory / OVERLAY_FILE} {folder}, and remove it"
        )
    if (output / CONFIG_FILE).exists() and not (target / TABLE_FILE).exists():
        raise FileExistsError(f"{output} holds another model already; choose another --output")
    is_reference = (memory / REFERENCE_FILE).is_file()
    table = referenced_table(memory) if is_reference else memory / TABLE_FILE
    conversion = convert_table(table, target / TABLE_FILE, dtype, advance=advance)
    of_table = {TABLE_FILE, manifest_name(TABLE_FILE), journal_name(TABLE_FILE), lock_name(TABLE_FILE), CONFIG_FILE}
    of_table.add(REFERENCE_FILE)
    for file in sorted(memory.iterdir()):
        if file.is_file() and not (
            file.name in of_table or file.suffix == ".tmp" or OF_THE_TABLE.fullmatch(file.name)
        ):
            copy_file(file, target / file.name)
    replace_file(target / CONFIG_FILE, dataclasses.replace(config, dtype=dtype).to_json().encode())
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == CONFIG_FILE, file.name)):
        if file.is_file():
            copy_file(file, output / file.name)
    return conversion
