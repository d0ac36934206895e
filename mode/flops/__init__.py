"""FLOP counts of traced programs: see `count_flops`.

**The convention.** A multiply-add is two operations. Matrix products count `2 m n k`, those in
attention scores too. Work whose result is masked afterwards counts: causal attention counts the
blocks that the program computes, in full. Every other floating-point number that is computed, or
selected by a mask, counts one; a logistic counts the three operations around its exponential.
Exponentials themselves, logarithms, roots, sines and their like count nothing: XLA tallies them
apart. Moving, gathering, sorting, comparing and integer work count nothing. A scan counts as often
as it runs, and a branch as its most expensive side. The body of a loop whose length depends on data
counts once. Recomputation counts, because it is work.

XLA's own `cost_analysis` of the compiled program agrees to within a few percent in float32, for
hidden states of some dozens of features or more. It differs where it counts comparisons and
integers, what it computes twice inside fusions, the widening of bfloat16 operands on a CPU, and the
body of any loop once.
"""

from ._count import Flops as Flops, count_flops as count_flops
