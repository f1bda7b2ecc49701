"""The quality laboratory: what estimated weight gradients cost, against tuned dense Muon.

methods.py   names of methods -> flags of base training, and the syntax of changes
peers.py     other people's optimizers for the block matrices
store.py     what has been trained, one JSON line a run
run.py       one run in a process of its own; several at once; steps of two runs in turn
table.py     gaps to dense with confidence intervals, the tables, the plot
sweep.py     python -m scripts.compare: its flags, and which runs come next
"""
