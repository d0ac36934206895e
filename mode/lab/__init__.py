"""The experiments of `mode`: routing ablations at equal training FLOPs, from one command.

`mode-lab ablate`, or `python -m mode.lab ablate`. Needs the extra `lab`. The library itself never
imports this package.
"""
