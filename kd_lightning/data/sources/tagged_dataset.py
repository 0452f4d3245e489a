"""Tagged words of data sets of the Hugging Face hub, or of folders written by `Dataset.save_to_disk`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kd_lightning.data.sources.files import data_key
from kd_lightning.data.sources.records import placed_rows
from kd_lightning.data.sources.tagged_files import TaggedReader
from kd_lightning.data.text.tagged import TaggedText


def tagged_split(splits: Mapping[str, Any], split: str, name: str, reader: TaggedReader) -> list[TaggedText]:
    """Return the tagged texts of a split; tags that are numbers go by the names stored with them.

    Args:
        splits: Of the data set.
        split: Which of them.
        name: What the data set is called in messages.
        reader: Which columns it has.

    Raises:
        ConfigError: No such split.
        DataError: No such column, or what the reader refuses.
    """
    place, records = placed_rows(splits, split, name, reader.columns, data_key)
    return replace(reader, names=reader.names or stored_names(splits[split], reader)).texts(place, records)


def stored_names(table: Any, reader: TaggedReader) -> list[str]:
    """Return the stored names of numeric tags; nothing without stored names."""
    feature = table.features.get(reader.tags_column)
    return list(getattr(getattr(feature, "feature", None), "names", None) or ())
