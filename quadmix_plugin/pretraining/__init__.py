"""The model that a run is for: trained by Megatron-Core on a selection's token files, resumable, on any number of GPUs.

``job`` says what is to be trained, ``launch`` in which processes, ``loop`` trains; ``data``, ``checkpoints`` and
``metrics`` are what it needs. Nothing here knows recipes or selections.
"""
