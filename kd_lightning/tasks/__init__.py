"""What is predicted: its labels, its loss from labels, its scores, and how a prediction is read.

>>> import kd_lightning as kd
>>> list(kd.tasks.Classification(3).scores().names)
['accuracy', 'macro_f1']
"""

from kd_lightning.tasks.base import Scores, Task
from kd_lightning.tasks.classification import Classification
from kd_lightning.tasks.multi_task import MultiTask, task_of
from kd_lightning.tasks.regression import Regression

__all__ = ["Classification", "MultiTask", "Regression", "Scores", "Task", "task_of"]
