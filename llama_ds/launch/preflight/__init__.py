"""Looking at hosts before a job uses them: what they have, how fast they are, and which are better left out."""

from llama_ds.launch.preflight.checks import HostFinding, promote
from llama_ds.launch.preflight.examine import PreflightSettings, Report, examine

__all__ = ["HostFinding", "PreflightSettings", "Report", "examine", "promote"]
