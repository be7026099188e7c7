"""Coverage-guided fuzzing of what reads files and tensors, with atheris (libFuzzer for Python).

    python -m tests.fuzz TARGET --seconds 60 [--corpus DIR] [--findings DIR]
    python -m tests.fuzz TARGET --replay FILE...

TARGET is gguf, directories, imatrix, pack, or all. With --corpus what was reached is kept in DIR,
and the next run goes on from there: a long run is `python -m tests.fuzz all --seconds 36000
--corpus ~/corpus`. Each finding is a file in the findings folder (build/fuzz/findings, if no other
is given), to be replayed; beside it lies a .txt with what happened. Where atheris has no wheel
(Python 3.10, other systems than Linux on x86-64) the same inputs come without guidance.

tests/fuzz/corpus holds what once broke something, by name; test_fuzz.py replays it, and runs each
target for some seconds. documents.py says what an input is, oracle.py what a run must keep to,
target_*.py what is run.
"""
