"""Write docs/run_file.md, the reference of the run file's keys, from their declarations in llama_ds/config/schema*.py.

python docs/run_file.py    # run it again when tests/config/test_reference.py says that the page is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_ds.config.reference import reference

if __name__ == "__main__":
    (ROOT / "docs" / "run_file.md").write_text(reference(), encoding="utf-8")
