"""Training, evaluation and prediction: what ``fastdense train``, ``evaluate`` and ``predict`` run.

========================== =================================================================================
:mod:`.config`             every choice of a run, from options and files, with the paper's recipe as default
:mod:`.data`               data sets, and the batches of a step: the same for any number of ranks and parts
:mod:`.ranks`              the processes of a distributed run, and the models that they share
:mod:`.loop`               the run: steps, epochs, evaluation, checkpoints
:mod:`.checkpoint`         files that are whole or not there
:mod:`.log`                progress, metrics, curves
:mod:`.predict`            a checkpoint at work
:mod:`.command`            the command line
========================== =================================================================================

A step depends on the configuration, the epoch and the step's number alone: its images, augmentations and random
numbers are seeded by them. So a run that was killed goes on, from the last checkpoint, to the same bits.
"""
