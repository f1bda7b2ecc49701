"""The quality laboratory: what low-rank weight gradients cost, against tuned baselines.

methods.py   names of methods -> flags of base training, and the syntax of overrides
sweep.py     the axes, the cells they span, and which runs come next
store.py     what has been trained, one JSON line a run
worker.py    one run in a process of its own; several of them at once
timing.py    step times, measured alone
summary.py   gaps to dense with confidence intervals, tables
plots.py     Pareto plots
command.py   python -m scripts.compare
peers.py     other people's optimizers for the block matrices, and references.py theirs that
             have no package
"""
