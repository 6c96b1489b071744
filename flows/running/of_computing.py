"""What stages need that compute, beyond `of_every_stage`: torch, transformers, TRL, lm-eval."""

from __future__ import annotations

import gc
from importlib import import_module

from qadapter.files.imports import importing

with importing():
    for _module in (  # in the order in which an experiment comes to need it
        "qadapter.training.pretraining",
        "qadapter.training.supervised",
        "qadapter.training.adapt",
        "qadapter.training.trainer",
        "qadapter.evaluation.measure",
        "trl.trainer.dpo_trainer",
        "qadapter.report.build",
    ):
        import_module(_module)

gc.freeze()  # every training and evaluation begins and ends with a collection: it need not look at modules again
