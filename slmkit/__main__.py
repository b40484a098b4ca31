"""`python -m slmkit …` is `slm …`."""

from slmkit.cli import main

main()
