#!/usr/bin/env python3
"""Measure what a job of a hostfile's size costs the machine that launches and watches it; no host is needed.

Ranks are connections over loopback that beat as real ones do. With --preflight it is the preflight that is measured, on
as many hosts: addresses of loopback with one sshd (root, openssh-server), which answer what this machine has answered.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from llama_ds.errors import UserError
from llama_ds.launch.hostfile import parse_hostfile
from llama_ds.launch.scale import fan_out, measure, setting
from llama_ds.layout.axes import Axes


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hostfile", nargs="?", default=str(ROOT / "hostfiles" / "256x8"))
    parser.add_argument("--pp", type=int, default=8)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--beat-s", type=float, default=5.0, help="between reports of a rank (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60.0, help="to watch (default: %(default)s)")
    parser.add_argument("--preflight", action="store_true", help="measure the preflight instead")
    parser.add_argument("--timeout-s", type=float, default=20.0, help="of the preflight (default: %(default)s)")
    parser.add_argument("--out", metavar="FILE", help="write the results as JSON to FILE too")
    args = parser.parse_args()
    begin = setting()
    try:
        hosts = parse_hostfile(args.hostfile)
        if args.preflight:
            slots = max(hosts.values())
            found = fan_out(str(ROOT / "tools" / "preflight.py"), len(hosts), slots, args.timeout_s)
        else:
            found = measure(hosts, Axes(pp=args.pp, tp=args.tp), args.beat_s, args.seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return UserError.EXIT_CODE
    text = json.dumps(begin | found, indent=1)
    if args.out:
        Path(args.out).write_text(text + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
