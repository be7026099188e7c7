"""Coverage-guided fuzzing of the code that reads files and tensors, with atheris (libFuzzer).

    python -m tests.fuzz TARGET --seconds 60 [--corpus DIR] [--findings DIR]
    python -m tests.fuzz TARGET --replay FILE...

TARGET is gguf, directories, imatrix, pack, or all. With --corpus, inputs that reached new code are
stored in DIR, and the next run starts from them: a long run is `python -m tests.fuzz all --seconds
36000 --corpus ~/corpus`. Each finding is a file in the findings folder (default:
build/fuzz/findings) that can be replayed; a .txt beside it says what happened. Where atheris has no
wheel (Python 3.10, systems other than Linux on x86-64) the inputs come without guidance.

tests/fuzz/corpus holds inputs that once broke something, by name. test_fuzz.py replays them, and
runs each target for some seconds. documents.py defines an input, oracle.py the rules for a run, and
target_*.py the code that runs.
"""
