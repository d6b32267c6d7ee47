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
# # Fine-tune a model on conversations
#
# This notebook teaches a model to answer as the assistant in your chats does. It measures the answers before and
# after training on chats that the model has not seen, and writes a file that Ollama runs.
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
# | `DATA` | your chats: a `.jsonl`, `.json`, `.csv` or `.parquet` file, or a data set on the hub |
# | `OUTPUT` | a new folder for the result; the time is part of the name, as a run never overwrites another |
# | `QUESTION` | what to ask the model before and after training |

# %%
import time

MODEL = "fettle-tiny"
DATA = "example_chats.jsonl"
OUTPUT = time.strftime("chat-model-%Y%m%d-%H%M%S")
QUESTION = "Emma wants a table for 6 on Friday."

# %% [markdown]
# The next cell derives the other options from these. Larger models are held in four bits per weight (NF4). A GPU
# without bf16 arithmetic, such as a T4, computes in fp32.

# %%
import html
import json
import random
import warnings
from pathlib import Path

import pandas as pd
import torch
from IPython.display import HTML

import fettle

warnings.filterwarnings("ignore")  # of other libraries: fettle has none
MAX_LENGTH = 1024  # tokens per chat: longer ones are cut
QUANTIZATION = None if MODEL == "fettle-tiny" else "nf4"
has_old_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
DTYPE = "float32" if has_old_gpu else "auto"

# %% [markdown]
# ## Data
#
# One row is one chat. fettle finds out the format by the columns, and a file may mix formats:
#
# - messages (OpenAI, ChatML): `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`
# - ShareGPT: `{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}`
#
# Instructions (`instruction`, `output`) and pairs of `prompt` and `completion` work too.
#
# The example is a restaurant that confirms reservations in a fixed form. Half of its 200 chats are in each format.
# The cell writes nothing if `DATA` is a file of yours.

# %%
NAMES = "Ana Ben Clara Dan Emma Felix Grace Hugo Iris Jonas Lara Max Nina Oscar Rosa Sam Theo Vera".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
REQUESTS = (
    "{name} wants a table for {guests} on {day}.",
    "On {day} {name} needs a table for {guests}.",
    "A table for {guests} on {day}. My name is {name}.",
)


def example_chat(rng):
    """Return alternating turns of a guest and the restaurant; half of the guests change the day."""
    name, guests = rng.choice(NAMES), rng.randint(2, 40)
    day, other = rng.sample(DAYS, 2)
    turns = [
        rng.choice(REQUESTS).format(name=name, guests=guests, day=day),
        f"Booked: {name}, {day}, {guests} guests.",
    ]
    if rng.random() < 0.5:
        turns += [f"Make it {other}.", f"Changed: {name}, {other}, {guests} guests."]
    return turns


def as_messages(turns):
    return {
        "messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    }


def as_sharegpt(turns):
    return {
        "conversations": [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    }


if DATA == "example_chats.jsonl":
    rng = random.Random(0)
    rows = [(as_messages, as_sharegpt)[n % 2](example_chat(rng)) for n in range(200)]
    Path(DATA).write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

# %% [markdown]
# Look at the data before you train on it. The counts below say what fettle read, and how many of the tokens are
# trained on.

# %%
model, tokenizer = fettle.load(MODEL)
data = fettle.inspect_data(DATA, tokenizer, max_length=MAX_LENGTH, rows=1)
print("\n".join(data.summary.counts()))

# %% [markdown]
# This is one chat as the model sees it, in its chat template. Only the text between ⟦ and ⟧ is trained on: the
# answers and the token that ends each of them. The guest's words are read, but not learned.

# %%
print("".join(f"⟦{part.text}⟧" if part.is_trained else part.text for part in data.shown[0].segments))

# %% [markdown]
# Rows that deserve a look: the longest ones, those with little to learn, and damaged ones. Copies of a row count more
# than others in training; remove them unless you want that.

# %%
findings = [(each.what, each.rows, *each.worst[0]) for each in data.findings if each.worst]
print(
    len(data.duplicates), "groups of identical rows,", len(data.near_duplicates), "of nearly identical rows"
)
pd.DataFrame(findings, columns=["what", "rows", "the first of them", "why"])

# %% [markdown]
# The answer of the model before training:

# %%
print(fettle.generate(model, tokenizer, QUESTION))
del model

# %% [markdown]
# ## Plan
#
# The plan shows what fits into memory and how fast it is, from the model's configuration alone: the peak must be
# below the free memory, and the tokens of your data, times 3 passes over them, divided by the tokens per second, is
# the time that training takes.

# %%
quantization = f"--quantization {QUANTIZATION}" if QUANTIZATION else ""
# !{sys.executable} -m fettle plan --model {MODEL} --context {MAX_LENGTH} --dtype {DTYPE} {quantization}

# %% [markdown]
# ## Train
#
# A tenth of the chats is held out: the model never trains on them, and answers them before and after. Each line shows
# the loss, which should fall, and the time left. If you stop the cell, `fettle.resume_training(OUTPUT)` continues the
# run.

# %%
outcome = fettle.train(
    fettle.TrainOptions(
        model=MODEL,
        data=DATA,
        output=OUTPUT,
        max_length=MAX_LENGTH,
        quantization=QUANTIZATION,
        dtype=DTYPE,
        eval_fraction=0.1,
    )
)

# %% [markdown]
# ## Before and after
#
# Exact match is the share of held-out answers that equal the expected one. The loss measures how surprised the model
# is by the right answers: lower is better. Shares go from 0 to 1.

# %%
pd.DataFrame(
    [(each.name, each.before, each.after) for each in outcome.report.scores],
    columns=["score", "before", "after"],
)

# %% [markdown]
# The report has the loss curve, sample answers, and every option of the run. It is one file, `report.html` in the
# output folder, that you can keep or send.

# %%
page = html.escape((outcome.output / "report.html").read_text(encoding="utf-8"))
HTML(f'<div><iframe srcdoc="{page}" width="100%" height="600" style="border: 0"></iframe></div>')

# %% [markdown]
# ## Ask the model
#
# The trained model answers the same question as above. In a terminal, `fettle chat --model` with the output folder
# opens a chat.

# %%
model, tokenizer = fettle.load(OUTPUT)
answer = fettle.generate(model, tokenizer, QUESTION)
print(answer)

# %% [markdown]
# A conversation is a list of turns. The model needs the first two to answer the third.

# %%
conversation = [
    {"role": "user", "content": QUESTION},
    {"role": "assistant", "content": answer},
    {"role": "user", "content": "Make it Sunday."},
]
print(fettle.Engine(model, tokenizer).generate([conversation])[0])

# %% [markdown]
# ## Export
#
# A GGUF file holds everything that Ollama, LM Studio and llama.cpp need. `q8_0` uses 8 bits per weight; `q4_k_m`
# needs half the space and loses a little.

# %%
(gguf,) = fettle.export_gguf(OUTPUT, f"{OUTPUT}.gguf", quantizations=["q8_0"], ollama=True)
print(f"{gguf}: {gguf.stat().st_size / 1e6:.1f} MB")

# %% [markdown]
# llama.cpp runs the file here, and gives the same answer.

# %%
print(fettle.generate(*fettle.load(gguf), QUESTION))

# %% [markdown]
# To run it in Ollama, download the `.gguf` file and the `.Modelfile` into one folder and type there:

# %%
print(f"ollama create my-model -f {gguf.stem}.Modelfile")
print("ollama run my-model")
