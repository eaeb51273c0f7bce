"""Compares defenses on benchmarks; the entry point for a Ray cluster.

In: benchmarks, recipes, models. Out: OUT/results/*.parquet, OUT/tables.md and OUT/run.json. The line to type:

    ray job submit --working-dir . -- python jobs/evaluate.py --benchmarks figstep=s3://bucket/figstep \\
        --defenses none,prefix,guardalign --models llava-hf/llava-1.5-7b-hf --output /shared/comparison-1
"""

import sys

from guardalign.cli import main
from guardalign.ending import to_the_end

if __name__ == "__main__":
    to_the_end(lambda: main(["evaluate", *sys.argv[1:]]))
