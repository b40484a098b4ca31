"""`python -m slmkit.cli …` is `slm …`, as `torchrun` wants it: `torchrun --nproc-per-node 2 -m slmkit.cli train …`."""

from slmkit.cli import main

main()
