#!/usr/bin/env python3
"""Show runs, finished or going on, on one self-contained HTML page; or the settings in which two runs differ.

"tools/report.py diff A B" prints the settings.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_ds.command_line import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

from llama_ds.command_line import Answer, add_json, new_parser, real, run, whole

LIVE_S = 10  # between two questions of a served page for new data
EXAMPLES = """examples:
  tools/report.py runs/quickstart
  tools/report.py runs/7b runs/7b_lower_lr --out compared.html --power-w 400
  tools/report.py runs/7b --follow --port 8420
  tools/report.py diff runs/7b runs/7b_lower_lr
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run(parser(), argv)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = new_parser(report, __doc__, EXAMPLES)
    parser.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run; or: diff, and two of them")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first run's folder)")
    parser.add_argument("--power-w", type=real(above=True), metavar="W", help="power of a GPU, for energy and carbon")
    parser.add_argument("--follow", action="store_true", help="serve the page on this machine as the runs go on")
    parser.add_argument("--port", type=whole(0, 65535), default=8420, help="port of --follow (default: %(default)s)")
    add_json(parser, "the page's path and the facts of each run, or the differences,")
    return parser


def report(args: argparse.Namespace) -> Answer:
    """Write or serve the page, or return the differences."""
    from llama_ds.config.text import save_text
    from llama_ds.experiments.records import read_runs
    from llama_ds.experiments.report_data import page_data
    from llama_ds.experiments.report_page import page

    if args.runs[0] == "diff":
        return diff(args.runs[1:])
    if args.follow:
        return follow(args)
    data = page_data(read_runs(args.runs), args.power_w)
    out = args.out or os.path.join(args.runs[0], "report.html")
    save_text(out, page(data))
    found = [{"name": one["name"], "folder": one["folder"], "facts": dict(one["facts"])} for one in data["runs"]]
    return Answer({"page": out, "runs": found, "notes": data["notes"]}, out, remarks=data["notes"])


def diff(folders: list[str]) -> Answer:
    """Return the settings in which two runs differ."""
    from llama_ds.errors import UserError
    from llama_ds.experiments.records import read_runs
    from llama_ds.experiments.report_data import setting_differences

    if len(folders) != 2:
        raise UserError(f"command line: diff compares two runs, not {len(folders)}; give two folders")
    runs = read_runs(folders)
    for one in runs:
        if not one.config:
            raise UserError(f"{one.folder}: has no run.yaml, so its settings are unknown")
    rows = setting_differences(runs)
    text = "\n".join(f"{key}: {first} | {second}" for key, first, second in rows) or "the same settings"
    return Answer([{"key": key, "values": values} for key, *values in rows], text)


def follow(args: argparse.Namespace) -> Answer:
    """Serve the page until Ctrl-C."""
    from llama_ds.experiments.records import read_runs
    from llama_ds.experiments.report_data import page_data
    from llama_ds.experiments.report_page import page
    from llama_ds.experiments.serve import ReportServer

    with ReportServer(
        args.port, args.runs, lambda: page(page_data(read_runs(args.runs), args.power_w), LIVE_S)
    ) as server:
        server.page()  # a wrong folder is an error now
        port = server.server_address[1]
        print(f"{server.address}   from elsewhere: ssh -L {port}:127.0.0.1:{port} THIS_HOST", file=sys.stderr)
        server.serve_forever()
    return Answer({}, "")


if __name__ == "__main__":
    sys.exit(main())
