"""Audits a data set; the entry point for a Ray cluster.

In: an image-prompt data set, a recipe. Out: OUT/results/*.parquet and OUT/run.json. The line to type:

    ray job submit --working-dir . -- python jobs/audit.py --recipe guardalign --input.format parquet \\
        --input.path s3://bucket/pairs --output /shared/run-1
"""

import sys

from guardalign.cli import main
from guardalign.ending import to_the_end

if __name__ == "__main__":
    to_the_end(lambda: main(["audit", *sys.argv[1:]]))
