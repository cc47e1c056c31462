"""Write docs/deepspeed_json.md, the reference of the DeepSpeed JSON, if it names all keys that DeepSpeed reads.

python docs/deepspeed_json.py    # run it again when tests/config/test_deepspeed_reference.py says it is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_ds.config.deepspeed_reference import documented_keys, reference
from llama_ds.parallel.deepspeed_walk import deepspeed_keys

if __name__ == "__main__":
    if missing := deepspeed_keys().keys() - documented_keys():
        sys.exit(f"DeepSpeed reads {', '.join(sorted(missing))}: add them to llama_ds/config/deepspeed_effects.py")
    (ROOT / "docs" / "deepspeed_json.md").write_text(reference(), encoding="utf-8")
