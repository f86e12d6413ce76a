"""What memory is left, from made-up kernels; and the refusal before it is exceeded."""

from __future__ import annotations

from pathlib import Path

import pytest

from inferflux_backend_torch.memory import available_memory, check_memory
from inferflux_core.errors import ModelFileError

MIB = 1 << 20
MEMINFO = "MemTotal:       8000 kB\nMemFree:  1 kB\nMemAvailable:    4096 kB\nHugePages_Total: 0\n"


def kernel(root: Path, files: dict[str, str], meminfo: str = MEMINFO) -> tuple[Path, Path]:
    for name, content in {"proc/meminfo": meminfo, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root / "proc", root / "cgroup"


def v2(folder: str, limit: int | str, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    return {
        f"cgroup/{folder}memory.max": f"{limit}\n",
        f"cgroup/{folder}memory.current": f"{usage}\n",
        f"cgroup/{folder}memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file {active}\nodd line here\n",
    }


def v1(folder: str, limit: int, usage: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    return {
        f"cgroup/memory/{folder}memory.limit_in_bytes": f"{limit}\n",
        f"cgroup/memory/{folder}memory.usage_in_bytes": f"{usage}\n",
        f"cgroup/memory/{folder}memory.stat": f"cache 7\ntotal_inactive_file {inactive}\ntotal_active_file {active}\n",
    }


V2 = {"proc/self/cgroup": "0::/pod/app\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/x\n4:hugetlb,memory:/docker/abc\n1:name=systemd:/\n"}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, 4 * MIB),  # no control groups
        (V2, 4 * MIB),  # none with a limit
        (V2 | v2("pod/app/", "max", 9 * MIB), 4 * MIB),
        (V2 | v2("pod/app/", 8 * MIB, MIB), 4 * MIB),  # more than the machine has
        (V2 | v2("pod/app/", 3 * MIB, MIB), 2 * MIB),
        (V2 | v2("pod/app/", 3 * MIB, 2 * MIB, inactive=MIB, active=MIB // 2), 3 * MIB - MIB // 2),
        (V2 | v2("pod/app/", 3 * MIB, MIB, inactive=5 * MIB), 3 * MIB),  # counters are read one after another
        (V2 | v2("pod/app/", 3 * MIB, MIB) | v2("pod/", 2 * MIB, MIB), MIB),  # what holds the group has less
        (V2 | v2("", 2 * MIB, MIB), MIB),  # in a container: its own group is mounted as the root
        (V2 | v2("pod/app/", MIB, 2 * MIB), 0),
        (V2 | {"cgroup/pod/app/memory.max": "junk", "cgroup/pod/app/memory.current": "1"}, 4 * MIB),
        (V1 | v1("docker/abc/", 9223372036854771712, MIB), 4 * MIB),
        (V1 | v1("docker/abc/", 3 * MIB, 2 * MIB, inactive=MIB, active=MIB // 2), 3 * MIB - MIB // 2),
        (V1 | v1("", 2 * MIB, MIB), MIB),
    ],
)
def test_the_tightest_of_machine_and_groups_counts(tmp_path: Path, files: dict[str, str], left: int) -> None:
    assert available_memory(*kernel(tmp_path, files)) == left


def test_without_the_kernel_s_estimate_there_is_still_an_answer(tmp_path: Path) -> None:
    for meminfo in ("", "MemAvailable: many kB\n", "MemAvailable:\n"):
        assert available_memory(*kernel(tmp_path, {}, meminfo)) > 64 * MIB
    assert available_memory(*kernel(tmp_path, V2 | v2("pod/app/", 3 * MIB, MIB), "")) == 2 * MIB


def test_this_machine_has_some() -> None:
    assert 64 * MIB < available_memory() < 1 << 50


def test_too_much_is_refused_with_both_sizes() -> None:
    check_memory(5 << 30, 5 << 30, "model 'x'")
    with pytest.raises(ModelFileError) as refusal:
        check_memory(int(15.5 * 2**30), int(7.25 * 2**30), "model 'x' in bfloat16")
    assert str(refusal.value) == (
        "model 'x' in bfloat16 needs 15.50 GiB of memory, but 7.25 GiB are available; "
        "choose a smaller model, dtype or KV cache, or free memory"
    )
    with pytest.raises(ModelFileError, match=r"but 0\.00 GiB are available"):
        check_memory(1, -5, "model 'x'")
