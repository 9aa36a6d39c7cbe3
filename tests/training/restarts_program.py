"""A run that kills one of its ranks at its n-th checkpoint, unless it was killed there before."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from tests.training.on_ranks import run_config
from torchrec_kvshare.training import loop
from torchrec_kvshare.training.run import train_run

if __name__ == "__main__":
    output, killed_rank, killed_at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    real_save, num_saves = loop.save_checkpoint, 0

    def save(*arguments: Any, **settings: Any) -> None:
        """Count checkpoints; die in the midst of one, in the folder that is not there yet."""
        global num_saves
        num_saves += 1
        mark = output.with_name(f"killed-{killed_rank}-at-{killed_at}")
        if os.environ["RANK"] == killed_rank and num_saves == killed_at and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        real_save(*arguments, **settings)

    loop.save_checkpoint = save
    train_run(run_config(output, checkpoint_seconds=0.0))
