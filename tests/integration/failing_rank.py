"""A run in which rank 1 raises in its fifth loss; writes the time of that into FOLDER/failed.

deepspeed --num_gpus 2 failing_rank.py CONFIG FOLDER [WHAT IT SAYS]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from speft_train import cli, engine, label_rows


def main() -> None:
    """Run the config with a loss that breaks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=0)
    parser.add_argument("config", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("words", nargs="?", default="the loss of rank 1 is broken")
    asked = parser.parse_args()
    loss_of, calls = label_rows.next_token_loss, 0

    def breaks(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5 and engine.launched_ranks()[0] == 1:
            (asked.folder / "failed").write_text(str(time.time()))
            raise RuntimeError(asked.words)
        return loss_of(*args, **kwargs)

    label_rows.next_token_loss = breaks  # type: ignore[assignment]
    sys.exit(cli.guarded(lambda: cli.execute(asked.config, [], dry_run=False)))


if __name__ == "__main__":
    main()
