# %% [markdown]
# # From Python
#
# From a DataFrame to an exported student, with the classes alone: no Hydra, no command line. It runs as it stands
# beside a file `my.csv` with the columns `text` and `label`; as a notebook, `jupytext --to ipynb tutorial.py`.

# %%
from functools import partial

import lightning as L
import pandas as pd
import torch

import kd_lightning as kd
from kd_lightning.export.graph import trace
from kd_lightning.models.bilstm import BiLSTM
from kd_lightning.models.hf import pretrained

torch.manual_seed(0)

# %% [markdown]
# ## Data
#
# A data module reads files. What is in them decides the split and the stored teacher outputs, so the frame is written
# to a file first. Each example has a stable `index`, by which the teacher's outputs are stored.

# %%
frame = pd.read_csv("my.csv").dropna()
frame.to_csv("texts.csv", index=False)

data = kd.data.TextFiles("texts.csv", tokenizer="minilm", batch_size=32)
data.prepare()
print(data.class_names, data.sizes)

# %% [markdown]
# ## A teacher
#
# A pretrained encoder is fine-tuned on the labels. Any network does that takes entries of a batch and returns logits.

# %%
trainer = partial(
    L.Trainer, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
    enable_progress_bar=False,
)  # fmt: skip
network = pretrained("minilm", data.task.outputs)
module = kd.SupervisedModule(network, partial(torch.optim.AdamW, lr=1e-4), task=data.task)
trainer(max_steps=30).fit(module, datamodule=data)

# %% [markdown]
# Its outputs are stored while the first epoch trains, in a folder that belongs to these data and this key. Name in the
# key whatever decides the outputs; another key is refused.

# %%
key = {"data": data.teacher_key, "teacher": "minilm, 30 steps at 1e-4"}
cache = kd.TeacherCache.create("teacher_outputs", key, data.num_examples)
teacher = kd.CachedTeacher(cache, kd.FrozenTeacher(network))

# %% [markdown]
# ## A student, with the teacher and without
#
# The same network, the same first weights, the same number of steps: the difference is what distillation adds.


# %%
def student() -> BiLSTM:
    """Return the small network, with the same weights each time."""
    torch.manual_seed(1)
    return BiLSTM(**data.model_arguments("student"))


def accuracy(module: L.LightningModule) -> float:
    """Train for 60 steps, and return the accuracy on the test split."""
    fitting = trainer(max_steps=60)
    fitting.fit(module, datamodule=data)
    return float(fitting.test(module, datamodule=data, verbose=False)[0]["test/accuracy"])


optimizer = partial(torch.optim.AdamW, lr=2e-3)
alone = kd.SupervisedModule(student(), optimizer, task=data.task)
objective = kd.Objective(
    terms={"ce": kd.losses.CrossEntropyLoss(), "kd": kd.losses.SoftTargetLoss(temperature=2.0)},
    weights={"ce": 0.1, "kd": 0.9},
)
distilled = kd.DistillationModule(student(), teacher, objective, optimizer, task=data.task)
print(f"from labels {accuracy(alone):.3f}, distilled {accuracy(distilled):.3f}")

# %% [markdown]
# ## Files to deploy
#
# The student is traced to a graph for any number of texts of any length, which loads with torch alone. Its tokenizer is
# saved beside it. (`kd export` does this for runs of `kd train`, also as ONNX and in 8 bits, and compares the
# predictions.)

# %%
traced = trace(distilled.student, data.few(), data.max_length, "none")
torch.export.save(traced.program, "student.pt2")
tokenizer = data.tokenizer_of("student")
tokenizer.save_pretrained("tokenizer")

# %%
graph = torch.export.load("student.pt2").module()
inputs = tokenizer(["a sentence of mine", "another, somewhat longer one"], padding=True, return_tensors="pt")
chances = graph(**{name: inputs[name] for name in traced.inputs}).softmax(-1)
print([data.class_names[code] for code in chances.argmax(-1)], chances.max(-1).values)
