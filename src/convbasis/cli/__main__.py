"""Run with ``python -m convbasis.cli``."""

from . import main

main()
