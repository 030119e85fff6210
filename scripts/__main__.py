"""``python -m fewstep.scripts``, for launchers that start modules."""

from .cli import main

main(prog_name="fewstep")
