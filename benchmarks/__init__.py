"""Fast against naive: speed, memory, growth and a training run, measured, saved as rows, drawn from them.

``fastdense bench`` runs everything (:mod:`~fastdense.benchmarks.run`), ``pytest benchmarks/bench_speed.py`` the
timings alone, and ``python -m fastdense.benchmarks.plots`` draws saved results again. Inference on a CPU beside
other runtimes is :mod:`~fastdense.benchmarks.peers`.
"""
