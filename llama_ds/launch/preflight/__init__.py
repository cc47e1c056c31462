"""Checks of hosts before a job uses them: software, hardware, speed, and which hosts to exclude."""

from llama_ds.launch.preflight.checks import HostFinding, promote
from llama_ds.launch.preflight.examine import PreflightSettings, Report, examine

__all__ = ["HostFinding", "PreflightSettings", "Report", "examine", "promote"]
