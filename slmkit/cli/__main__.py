"""`python -m slmkit.cli …` is `slm …`, for `torchrun --nproc-per-node 2 -m slmkit.cli train …`."""

from slmkit.cli import main

main()
