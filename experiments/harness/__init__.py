"""What every experiment shares: real images, runs that survive a kill, devices, and paired statistics."""

from experiments.harness.runs import write_whole

__all__ = ["write_whole"]
