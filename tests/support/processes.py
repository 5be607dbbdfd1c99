"""What /proc says of processes."""

from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether it runs: one that has ended and is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
