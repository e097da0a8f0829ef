"""Measurements of fastdense beside naive concatenation and other ways of running a DenseNet.

``fastdense bench`` runs everything (:mod:`~fastdense.benchmarks.run`): who is measured is in
:mod:`~fastdense.benchmarks.contenders`, at what in :mod:`~fastdense.benchmarks.cases`.
"""
