"""The share of one process in a run of several, started by `accelerate launch -m hfpatch ...` on one machine or more.

Every process loads the model and answers every n-th group of samples. The main process appends its rows to
samples.jsonl, the others to files in `shards/` in the run directory of their own file system; in the end, and before a
resumed run goes on, the main process takes them over. So nothing is lost when any of them dies, and no file system
has to be shared.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from hfpatch.evals.arms import LayerTotals
from hfpatch.report.run import LAYER_KEYS, RunDir, read_lines, sample_key

_TIMEOUT = timedelta(days=7)
"""The fastest process waits this long for the slowest."""


@dataclass(frozen=True)
class Shard:
    """Process `rank` of `world`."""

    rank: int = 0
    world: int = 1
    device: str | None = None

    @classmethod
    def here(cls) -> Shard:
        """What the launcher says about this process; alone without a launcher."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available(), timeout=_TIMEOUT)
        return cls(state.process_index, state.num_processes, str(state.device))

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def has(self, number: int) -> bool:
        """Whether group `number` of a task is this process's."""
        return number % self.world == self.rank

    def agree(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.world == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def gather(self, values: list[Any]) -> list[Any]:
        """The lists of all processes, joined in the order of their ranks."""
        if self.world == 1:
            return values
        from accelerate.utils import gather_object

        return list(gather_object(values))

    # Rows -----------------------------------------------------------------------------------------------------------

    def write(self, run: RunDir, row: Mapping[str, Any]) -> None:
        """Append a sample row where this process writes."""
        run.append_sample(row, None if self.is_main else _folder(run) / f"{self.rank}.samples.jsonl")

    def write_layers(self, run: RunDir, key: Sequence[Any], layers: Sequence[Mapping[str, Any]]) -> None:
        """Append what the patch did in each layer for the samples called `key`.

        To be called before their own rows: samples that are run again then only replace it.
        """
        run.append_layers(key, layers, None if self.is_main else _folder(run) / f"{self.rank}.layers.jsonl")

    def collect(self, run: RunDir) -> None:
        """Bring the rows of all processes, also of an interrupted run, into the main process's files."""
        folder = _folder(run)
        # nobody writes any more
        self.gather([])
        layers = self.gather(
            [r for path in sorted(folder.glob("*.layers.jsonl")) for r in read_lines(path, LAYER_KEYS)]
        )
        rows = self.gather([row for path in sorted(folder.glob("*.samples.jsonl")) for row in read_lines(path)])
        if self.is_main:
            for row in layers:
                run.append_layers(row["key"], row["layers"])
            seen = run.done()
            for row in rows:
                if sample_key(row) not in seen:
                    seen.add(sample_key(row))
                    run.append_sample(row)
            if totals := LayerTotals([layer for row in run.layer_rows() for layer in row["layers"]]).rows():
                run.write_layers(totals)
        # the others may delete theirs only when the main process has them on disk
        self.agree(None)
        shutil.rmtree(folder, ignore_errors=True)


def _folder(run: RunDir) -> Path:
    return run.path / "shards"
