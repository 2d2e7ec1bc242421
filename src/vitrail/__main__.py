"""`python -m vitrail`, and with it `torchrun -m vitrail`."""

from vitrail.cli import main

main()
