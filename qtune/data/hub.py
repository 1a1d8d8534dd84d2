"""Data sets of the Hugging Face hub: `org/name`, `org/name:split` or `org/name:config:split`.

An unreachable hub is found out with one short request first: the `datasets` library would retry for
minutes.
"""

import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

from qtune.data.readers.arrow import cells_without_nulls
from qtune.data.records import Records
from qtune.errors import UserError

TIMEOUT_S = 5.0
_ID = re.compile(
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)"
    r"(:(?P<config>[\w.-]+)(?=:))?"
    r"(:(?P<split>[\w.-]+(\[[\d:%-]+\])?))?"
)


@dataclass(frozen=True)
class HubData:
    """A split of a data set on the hub; `given` is how the recipe names it."""

    given: str
    name: str
    config: str | None
    split: str
    revision: str | None

    @classmethod
    def parse(cls, given: str, revision: str | None) -> Self | None:
        """The data set of that name; None where it has another form."""
        found = _ID.fullmatch(given)
        if found is None:
            return None
        return cls(given, found["name"], found["config"], found["split"] or "train", revision)

    def records(self, skip: int, *, streaming: bool) -> Records:
        """The rows from number `skip` + 1 on, downloaded as they are read where `streaming`.

        Raises UserError where they cannot be had.
        """
        if streaming and "[" in self.split:
            raise UserError(
                f"{self.given}: a part of a split cannot be streamed; name the split alone and "
                "take its first rows with `rows`"
            )
        with self._mistakes():
            # Imported here: seconds that files and the demo do not need.
            from datasets import load_dataset

            rows = load_dataset(
                self.name,
                self.config,
                split=self.split,
                revision=self.revision,
                streaming=streaming,
            )
            if not streaming and skip >= len(rows):
                return
            for number, row in enumerate(rows.skip(skip), start=skip + 1):
                yield number, cells_without_nulls(row)

    def fingerprint(self) -> str:
        """The commit of the data set, or what `datasets` knows it by when offline."""
        with self._mistakes():
            from datasets import load_dataset_builder

            builder = load_dataset_builder(self.name, self.config, revision=self.revision)
        return f"{builder.config.name} {builder.hash}"

    @contextmanager
    def _mistakes(self) -> Iterator[None]:
        """Turns what the hub and the library say into UserError."""
        _ask_hub(self.given)
        from datasets.exceptions import DatasetNotFoundError, DatasetsError

        try:
            yield
        except DatasetNotFoundError as error:
            raise UserError(
                f"{self.given}: no such data set on the hub, or it needs a login (`hf auth "
                "login`), and no such local file"
            ) from error
        except (DatasetsError, ValueError, OSError) as error:
            hint = f"; write {self.name}:CONFIG:{self.split}" * ("Config name" in str(error))
            raise UserError(
                f"{self.given}: cannot be loaded from the hub: {error}{hint}"
            ) from error


def _ask_hub(given: str) -> None:
    """Raise UserError unless the hub answers, with whatever status, within seconds."""
    if {os.environ.get("HF_HUB_OFFLINE"), os.environ.get("HF_DATASETS_OFFLINE")} & {"1", "true"}:
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return
    except OSError as error:
        raise UserError(
            f"{given}: no such local file, and the hub {endpoint} cannot be reached ({error}); "
            "name a local file, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        ) from error
