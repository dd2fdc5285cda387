"""GPUs that a stage takes for itself where no cluster has given it any."""

import os
from typing import TYPE_CHECKING

from earl.execution import gpus, ranks
from earl.run import resources

if TYPE_CHECKING:
    from earl.config.schema import Config


def claim(config: "Config", rule: str, count: int | None = None) -> None:
    """Wait for as many of this machine's GPUs as jobs of a rule need, and see those alone.

    Ranks have those of the process that launched them, and a job on several nodes has what Slurm gave it.

    Args:
        count: as many, if the rule needs any; None: as the configuration says.

    Raises:
        EarlError: see `gpus.claim`.
    """
    if ranks.is_launched() or os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1":
        return
    needed = resources.gpus(config, rule)
    gpus.claim(count or needed if needed else 0)
