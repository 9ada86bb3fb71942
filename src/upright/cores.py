"""Count the processor cores that this process may use."""

import math
import os
from pathlib import Path


def count_cores(root: Path = Path("/")) -> int:
    """Return the number of cores that the affinity and the control groups of this process allow, at least 1.

    A container's limit (``docker run --cpus``, a pod's ``limits.cpu``) is a quota of a control group. Neither
    `os.cpu_count` nor the affinity includes it.

    Args:
        root: root of the file system with ``proc`` and ``sys``.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(allowed, _quota(root))))


def _quota(root: Path) -> float:
    """Return the smallest quota of the groups of this process, in cores."""
    quota, groups = math.inf, root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return quota
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 1 has a folder for its controllers. Each parent of a group also limits it.
        mount = groups / "cpu" if controllers else groups
        group = mount / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(mount):
                break
            try:
                if controllers:
                    limit, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
                else:
                    limit, period = (folder / "cpu.max").read_text().split()
            except OSError:  # the root has no limit, and a container does not see the groups outside of it
                continue
            if limit != "max" and int(limit) > 0:
                quota = min(quota, int(limit) / int(period))
    return quota
