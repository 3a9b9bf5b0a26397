"""The paper's tables and figures as experiments: cells (training runs) that are trained once each, and what is made of them.

``cells`` says what a run is, ``scales`` how large everything is, ``store`` keeps what came out, ``runner`` trains what is missing,
``parallel`` trains it in several processes, ``timing`` measures steps, ``suite`` lists the experiments. ``benchmarks/paper.py`` is the command.
"""
