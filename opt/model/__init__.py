"""What OPT is: its modules, sizes, kernels and weights. Knows no ColossalAI, and nothing of a
run."""
