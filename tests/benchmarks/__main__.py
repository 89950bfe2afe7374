"""`make bench`: all servers in alternating rounds, medians into one table and plots."""

import argparse
import json
import signal
import sys
from pathlib import Path

from app.arguments import number_within
from tests.benchmarks import models, report
from tests.benchmarks.peers import SERVERS
from tests.benchmarks.processes import ROOT, BenchmarkError
from tests.benchmarks.rounds import Plan, Rounds


def main() -> int:
    """Run the benchmark; return the exit code."""
    options = _parser().parse_args()
    plan = Plan(
        servers=[SERVERS[name] for name in options.servers],
        models=options.models,
        photos=options.photos,
        threads=options.threads,
        rounds=options.rounds or (1 if options.quick else 3),
        seconds=2.0 if options.quick else 8.0,
        decoding=options.decoding,
        rates=(0.5, 0.9) if options.quick else (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1),
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its servers end with it
    try:
        results = Rounds(plan).run()
    except BenchmarkError as error:
        sys.stderr.write(f"bench: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("bench: stopped\n")
        return 130
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    sys.stdout.write(report.write(results, options.output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="one short round: does it run, not how fast it is"
    )
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--models", nargs="+", choices=models.NAMES, default=list(models.NAMES))
    parser.add_argument(
        "--photos",
        type=Path,
        default=ROOT.parent / "shared/data/photos.tar",
        help="folder or tar of JPEGs; where it is absent, generated ones",
    )
    parser.add_argument(
        "--decoding",
        choices=("ours", "plain"),
        default="ours",
        help="of the peers: with this service's code, or with Pillow as tutorials do",
    )
    parser.add_argument(
        "--threads",
        type=number_within(int, 1, 1000),
        default=2,
        help="of one inference, everywhere",
    )
    parser.add_argument(
        "--rounds", type=number_within(int, 1, 1000), help="visits to each server (default: 3)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / ".bench/results",
        metavar="FOLDER",
        help="for results.json, table.md and the plots",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
