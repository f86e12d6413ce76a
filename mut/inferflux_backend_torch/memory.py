"""How much main memory this process may still take, and a refusal before it is taken."""

from __future__ import annotations

import os
from pathlib import Path

from inferflux_core.errors import ModelFileError

_GIB = 2**30


def check_memory(needed_bytes: int, available_bytes: int, what: str) -> None:
    """Refuse what does not fit, before any of it is allocated.

    Args:
        what: what needs the memory, e.g. `model 'hf:owner/repo' in bfloat16 with 1024 MiB of KV cache`.

    Raises:
        ModelFileError: more is needed than available; says both in GiB.
    """
    if needed_bytes > available_bytes:
        raise ModelFileError(
            f"{what} needs {needed_bytes / _GIB:.2f} GiB of memory, but {max(0, available_bytes) / _GIB:.2f} GiB are "
            f"available; choose a smaller model, dtype or KV cache, or free memory"
        )


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of main memory that can be allocated without swapping.

    On Linux the kernel's estimate (MemAvailable), or what the control groups of this process, version 1 or 2, leave: limit
    minus usage, where pages of files do not count as used because they can be dropped. Elsewhere what is free, else all there
    is.

    Args:
        proc, cgroups: where the kernel's files are mounted.
    """
    try:
        fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if ":" in line)
        machine = int(fields["MemAvailable"].split()[0]) * 1024  # the file says kB and means KiB
    except (OSError, KeyError, ValueError, IndexError):
        machine = _from_sysconf()
    return max(0, min([machine, *_left_by_cgroups(proc, cgroups)]))


def _from_sysconf() -> int:
    names = os.sysconf_names
    pages = os.sysconf("SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in names else "SC_PHYS_PAGES")
    return pages * os.sysconf("SC_PAGE_SIZE")


def _left_by_cgroups(proc: Path, cgroups: Path) -> list[int]:
    """What each group with a limit leaves: that of this process, and those that hold it."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, limit, usage, cached = cgroups, "memory.max", "memory.current", ("inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            root, limit, usage = cgroups / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = ("total_inactive_file", "total_active_file")
        else:
            continue
        # In a container the path is the host's, while only its own part of the tree may be mounted: take what is there.
        group = root / path.strip("/")
        for folder in (group, *group.parents):
            if (room := _room(folder, limit, usage, cached)) is not None:
                left.append(room)
            if folder == root:
                break
    return left


def _room(folder: Path, limit: str, usage: str, cached: tuple[str, str]) -> int | None:
    """Limit minus usage of one group; None where it has no limit. Version 1 then states one of nearly 2**63."""
    try:
        most = int((folder / limit).read_text())  # "max" means none
        used = int((folder / usage).read_text())
        pairs = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
        stat = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    except (OSError, ValueError):
        return None
    return most - max(0, used - sum(stat.get(name, 0) for name in cached))
