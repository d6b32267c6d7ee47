# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Continue pretraining on a text
#
# This notebook trains a model on plain text, so that it takes up the text's vocabulary, style and facts. There are no
# questions and answers: the model learns to continue the text. It measures the loss before and after on the end of
# the text, which is held out, and writes a file that Ollama runs.
#
# Run all cells as they are: the example trains `fettle-tiny`, a model of 3.6 million weights that ships with fettle,
# in less than a minute on a CPU. Then change the settings and run all cells again.
#
# In Colab, choose Runtime > Change runtime type > T4 GPU first if you want to train a larger model.

# %% [markdown]
# ## Install
#
# This cell installs fettle if it is missing, which takes a few minutes, and does nothing otherwise.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("fettle") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "fettle-llm"], check=True)

# %% [markdown]
# ## Settings
#
# | name | what it is |
# |---|---|
# | `MODEL` | `fettle-tiny`, a hub name such as `microsoft/Phi-3.5-mini-instruct` or `HuggingFaceH4/zephyr-7b-beta`, or a checkpoint folder |
# | `DATA` | your text: a `.txt` file in UTF-8 |
# | `OUTPUT` | a new folder for the result; the time is part of the name, as a run never overwrites another |
# | `BEGINNING` | a text for the model to continue before and after training |

# %%
import time

MODEL = "fettle-tiny"
DATA = "example_text.txt"
OUTPUT = time.strftime("text-model-%Y%m%d-%H%M%S")
BEGINNING = "Friday. The wind is from the"

# %% [markdown]
# The next cell derives the other options from these. The text is split into windows of `MAX_LENGTH` tokens; the
# example is short, so its windows are short too. Larger models are held in four bits per weight (NF4). A GPU without
# bf16 arithmetic, such as a T4, computes in fp32.

# %%
import html
import math
import random
import warnings
from pathlib import Path

import pandas as pd
import torch
from IPython.display import HTML

import fettle

warnings.filterwarnings("ignore")  # of other libraries: fettle has none
MAX_LENGTH = 128 if MODEL == "fettle-tiny" else 1024
QUANTIZATION = None if MODEL == "fettle-tiny" else "nf4"
has_old_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
DTYPE = "float32" if has_old_gpu else "auto"

# %% [markdown]
# ## Data
#
# The example is the log of a harbour, with one entry per day. The cell writes nothing if `DATA` is a file of yours.

# %%
NAMES = "Ana Ben Clara Dan Emma Felix Grace Hugo Iris Jonas Lara Max Nina Oscar Rosa Sam Theo Vera".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
WINDS = "north south east west".split()

if DATA == "example_text.txt":
    rng = random.Random(0)
    entries = [
        f"{DAYS[n % 7]}. The wind is from the {rng.choice(WINDS)}. {rng.choice(NAMES)} took the boat out and came back "
        f"with {rng.randint(2, 40)} fish and {rng.randint(2, 20)} crabs.\n"
        for n in range(160)
    ]
    Path(DATA).write_text("\n".join(entries), encoding="utf-8")

# %% [markdown]
# The last tenth of the text becomes a file of its own. The model never trains on it: it is there to measure.

# %%
text = Path(DATA).read_text(encoding="utf-8")
cut = len(text) * 9 // 10
for part, name in ((text[:cut], "train"), (text[cut:], "held-out")):
    Path(f"{OUTPUT}-{name}.txt").write_text(part, encoding="utf-8")

# %% [markdown]
# Look at the data before you train on it. The counts below say how many tokens the text has, and into how many
# windows it is split.

# %%
model, tokenizer = fettle.load(MODEL)
data = fettle.inspect_data(f"{OUTPUT}-train.txt", tokenizer, max_length=MAX_LENGTH, train_on="all", rows=1)
print("\n".join(data.summary.counts()))

# %% [markdown]
# This is the first window as the model sees it. The text between ⟦ and ⟧ is trained on: of a plain text, all of it.
# (Only the first token of a window has nothing before it from which it could be predicted, so it is not counted
# above.)

# %%
print("".join(f"⟦{part.text}⟧" if part.is_trained else part.text for part in data.shown[0].segments))

# %% [markdown]
# How the model continues a text before training (`raw=True`: without the chat template):

# %%
sampling = fettle.Sampling(max_new_tokens=80, temperature=0.3, seed=1)
print(BEGINNING + fettle.generate(model, tokenizer, BEGINNING, raw=True, sampling=sampling))
del model

# %% [markdown]
# ## Plan
#
# The plan shows what fits into memory and how fast it is, from the model's configuration alone: the peak must be
# below the free memory, and the tokens of your text, times 3 passes over them, divided by the tokens per second, is
# the time that training takes.

# %%
quantization = f"--quantization {QUANTIZATION}" if QUANTIZATION else ""
# !{sys.executable} -m fettle plan --model {MODEL} --context {MAX_LENGTH} --dtype {DTYPE} {quantization}

# %% [markdown]
# ## Train
#
# `train_on="all"` computes the loss on every token. Each line shows the loss, which should fall, and the time left.
# If you stop the cell, `fettle.resume_training(OUTPUT)` continues the run.

# %%
outcome = fettle.train(
    fettle.TrainOptions(
        model=MODEL,
        data=f"{OUTPUT}-train.txt",
        eval_data=f"{OUTPUT}-held-out.txt",
        output=OUTPUT,
        train_on="all",
        max_length=MAX_LENGTH,
        quantization=QUANTIZATION,
        dtype=DTYPE,
    )
)

# %% [markdown]
# ## Before and after
#
# The loss measures how surprised the model is by each token of the held-out text; perplexity is the same as a number
# of choices: at 2, the model hesitates between two tokens on average. Lower is better for both. Token accuracy is the
# share of tokens that the model would have written itself.

# %%
table = [(each.name, each.before, each.after) for each in outcome.report.scores]
losses = [outcome.before.held_out["loss"], outcome.after.held_out["loss"]]
table.append(("held-out perplexity", *map(math.exp, losses)))
pd.DataFrame(table, columns=["score", "before", "after"])

# %% [markdown]
# The report has the loss curve and every option of the run. It is one file, `report.html` in the output folder, that
# you can keep or send.

# %%
page = html.escape((outcome.output / "report.html").read_text(encoding="utf-8"))
HTML(f'<div><iframe srcdoc="{page}" width="100%" height="600" style="border: 0"></iframe></div>')

# %% [markdown]
# ## Let the model write
#
# The trained model continues the same beginning as above. The names, numbers and days are its own; the form is that
# of the text.

# %%
model, tokenizer = fettle.load(OUTPUT)
print(BEGINNING + fettle.generate(model, tokenizer, BEGINNING, raw=True, sampling=sampling))

# %% [markdown]
# ## Export
#
# A GGUF file holds everything that Ollama, LM Studio and llama.cpp need. `q8_0` uses 8 bits per weight; `q4_k_m`
# needs half the space and loses a little.

# %%
(gguf,) = fettle.export_gguf(OUTPUT, f"{OUTPUT}.gguf", quantizations=["q8_0"], ollama=True)
print(f"{gguf}: {gguf.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# llama.cpp runs the file here.

# %%
print(BEGINNING + fettle.generate(*fettle.load(gguf), BEGINNING, raw=True, sampling=sampling))

# %% [markdown]
# To run it in Ollama, download the `.gguf` file and the `.Modelfile` into one folder and type there (in the second
# command, Ollama writes your text as a user turn; its API continues a text as it is with `"raw": true`):

# %%
print(f"ollama create my-model -f {gguf.stem}.Modelfile")
print("ollama run my-model")
