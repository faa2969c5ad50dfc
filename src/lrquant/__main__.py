"""`python -m lrquant`, as `torchrun -m lrquant` needs it."""

from lrquant.cli.main import main

main()
