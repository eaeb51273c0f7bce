"""Measures the ratios that GuardAlign promises, each against the plain way to do the same work, in one run.

In: nothing. Out: a table, rows short of "must be" marked, and the same as JSON. The line to type:

    python jobs/bench.py --quick [--json bench.json] [--only WORD]
"""

import argparse
from pathlib import Path

import torch

from guardalign.bench.batches import changed_answers
from guardalign.bench.canaries import canaries_of_a_shard
from guardalign.bench.detection import detect_stage, transport
from guardalign.bench.generation import calibrated_decoding, defended_audit, generate_stage
from guardalign.bench.memory import peak_memory, worker_memory
from guardalign.bench.ratios import as_json, measure, table
from guardalign.models import hide_progress_bars


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: some minutes on two cores")
    parser.add_argument("--json", type=Path, default=Path("bench.json"), help="where the JSON goes")
    parser.add_argument("--only", default="", help="only the ratios whose title holds this word")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="torch CPU threads, for both sides"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rounds = 5 if given.quick else 15
    listed = [detect_stage(rounds), transport(rounds), calibrated_decoding(rounds), defended_audit(rounds)]
    listed += [changed_answers("float32"), changed_answers("bfloat16")]
    listed += [canaries_of_a_shard("detect", rounds), canaries_of_a_shard("generate", rounds)]
    listed += [generate_stage(rounds), peak_memory("local"), peak_memory("ray"), worker_memory()]
    hide_progress_bars()
    outcomes = [measure(benchmark) for benchmark in listed if given.only in benchmark.title]
    print(table(outcomes))
    given.json.write_text(as_json(outcomes) + "\n")
    print(f"written {given.json}")


if __name__ == "__main__":
    main()
