"""The format number in the catalogue: which releases may read and write it.

A release that changes the table writes its format into the metadata of the column `generation`, which
`deltalake` can change while other threads run (a property of the table it cannot). An older release then

- reads the table if its own number is at least `reader`. It skips columns and kinds of events that it does not know;
- writes to it if its own number is at least `writer`. It leaves the unknown columns of its rows empty. It never deletes
  what it does not know: it neither folds the events nor collects blobs while there are such values.

So a new column or kind of event that older releases may ignore needs a new `number` only. Raise `writer` for one that
an older writer would break, `reader` for one that an older reader would misunderstand. New columns are nullable.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from lora_store.errors import StoreIsNewer

COLUMN, KEY = "generation", "loraretriever.format"


@dataclass(frozen=True, slots=True)
class TableFormat:
    """A format, the lowest ones that may read and write it, and the first release that writes it."""

    number: int
    reader: int
    writer: int
    release: str

    def check_readable(self) -> None:
        """Raises: StoreIsNewer if this release would misunderstand the table."""
        if self.reader > OURS.number:
            raise StoreIsNewer("read the adapter store", self.release)

    def check_writable(self) -> None:
        """Raises: StoreIsNewer if this release would damage the table."""
        if self.writer > OURS.number:
            raise StoreIsNewer("change the adapter store", self.release)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def in_metadata(cls, metadata: Mapping[str, str]) -> TableFormat:
        """Return the format that the metadata of the column says."""
        text = metadata.get(KEY)
        if text is None:
            return _FIRST
        values = json.loads(text)
        return cls(values["number"], values["reader"], values["writer"], values["release"])


_FIRST = TableFormat(number=1, reader=1, writer=1, release="0.1.0")  # its tables do not say
OURS = TableFormat(number=2, reader=2, writer=2, release="0.2.0")
