"""What ``scripts/bench_train.py`` is made of: counts without a clock, parts of a step, processes to time."""
