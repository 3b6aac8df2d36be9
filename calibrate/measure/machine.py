"""What is known of the machine that something is measured on; None where its system does not tell."""

import os
import re
import subprocess
from pathlib import Path

_NANOSECONDS = 1e9


def device_name(*, gpu: bool) -> str:
    """Return the name of the GPU or of the CPU, the latter with its number of cores."""
    if gpu:
        return _nvidia("name") or "unknown GPU"
    text = _read(Path("/proc/cpuinfo"))
    found = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return f"{found.group(1).strip() if found else 'unknown CPU'}, {os.cpu_count() or 1} cores"


def clock_mhz(*, gpu: bool) -> float | None:
    """Return the clock now: of the first GPU's multiprocessors, or the mean over the CPU's cores."""
    if gpu:
        return _number(_nvidia("clocks.sm"))
    speeds = [float(each) for each in re.findall(r"^cpu MHz\s*: ([\d.]+)$", _read(Path("/proc/cpuinfo")), re.MULTILINE)]
    return sum(speeds) / len(speeds) if speeds else None


def temperature_c(*, gpu: bool) -> float | None:
    """Return the temperature now: of the first GPU, or the hottest thermal zone of the machine."""
    if gpu:
        return _number(_nvidia("temperature.gpu"))
    zones = [_number(_read(path)) for path in Path("/sys/class/thermal").glob("thermal_zone*/temp")]
    known = [zone / 1000 for zone in zones if zone is not None]
    return max(known) if known else None


def processes_under(pid: int) -> list[int]:
    """Return a process and all its descendants; only those that are there now. Linux."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        fields = _read(path).rpartition(")")[2].split()
        if len(fields) > 1:
            parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
    found = [pid]
    for each in found:
        found += parents.get(each, [])
    return found


def command_line(pid: int) -> str:
    """Return a process's command line as it stands now (processes may rename themselves); empty when it is gone."""
    return _read(Path(f"/proc/{pid}/cmdline")).replace("\0", " ").strip()


def cpu_seconds(pid: int) -> float | None:
    """Return the CPU time of a process so far, all threads; to the nanosecond where Linux keeps it so."""
    tasks = [_read(path).split() for path in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    spent = [int(task[0]) for task in tasks if task]
    if any(spent):
        return sum(spent) / _NANOSECONDS
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") if len(fields) > 12 else None


def _nvidia(field: str) -> str | None:
    try:
        shown = subprocess.run(
            ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return shown.stdout.splitlines()[0].strip() if shown.returncode == 0 and shown.stdout.strip() else None


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
