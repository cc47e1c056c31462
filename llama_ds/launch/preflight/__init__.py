"""Looking at hosts before a job uses them: what they have, how fast they are, and which are better left out."""

from llama_ds.launch.preflight.checks import Finding, promote
from llama_ds.launch.preflight.examine import Report, Settings, examine

__all__ = ["Finding", "Report", "Settings", "examine", "promote"]
