"""How the plugin gets hold of the loss in timm's ``train.py``.

``train.py`` builds ``timm.task.ClassificationTask(model, criterion)`` and has imported that class before the
plugin is imported, so replacing the name would come too late: the class itself is taught that a model with
exits needs a loss over all of them.
"""

import functools
from typing import Any

from timm.task import ClassificationTask

from .losses import ExitsLoss
from .multi_exit import MultiExitModel


def install() -> None:
    """Make timm's classification tasks train every exit of a :class:`MultiExitModel`. Repeating it is harmless."""
    task: Any = ClassificationTask
    original = task.__init__
    if getattr(original, "trains_exits", False):
        return

    @functools.wraps(original)
    def __init__(self, model, *args, **kwargs):
        original(self, model, *args, **kwargs)
        if isinstance(getattr(model, "_orig_mod", model), MultiExitModel):  # _orig_mod: of a compiled model
            self.criterion = ExitsLoss(self.criterion)

    task.__init__ = __init__
    task.__init__.trains_exits = True
