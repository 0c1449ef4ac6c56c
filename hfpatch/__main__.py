"""`python -m hfpatch`: the command line, also for `accelerate launch -m hfpatch eval ...`."""

from hfpatch.cli import main

main()
