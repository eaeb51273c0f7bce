"""GuardAlign: a distributed batch job that audits image-prompt data sets for safety.

The data's path is read -> detect -> sanitize -> generate -> judge -> write; `pipeline.py` spells it out.
Importing the package imports neither torch nor Ray.
"""

from guardalign import version

__version__ = version.VERSION
__all__ = ["__version__"]
