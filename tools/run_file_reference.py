"""Print the run file reference, or write it to docs/run_file.md after a change of the schema.

python tools/run_file_reference.py --write
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_ds.config.reference import reference
from llama_ds.config.text import save_text
from llama_ds.errors import UserError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Print the reference of the run file.",
        epilog=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--write", action="store_true", help="write docs/run_file.md instead")
    if not parser.parse_args(argv).write:
        print(reference(), end="")
        return 0
    try:
        save_text(str(ROOT / "docs" / "run_file.md"), reference())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(main())
