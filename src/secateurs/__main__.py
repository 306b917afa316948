"""`python -m secateurs`: the command line, as launchers of several processes start it."""

from secateurs.cli import main

main()
