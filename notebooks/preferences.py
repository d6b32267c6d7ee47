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
# # Teach a model what you prefer (DPO)
#
# Direct preference optimization learns from pairs of answers to the same question: one that you prefer (chosen) and
# one that you do not want (rejected). Use it when a model can do the task already, but often answers in the wrong
# way. This notebook measures on held-out pairs how often the model prefers the chosen answer, before and after
# training, and writes a file that Ollama runs.
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
# | `DATA` | your pairs: a `.jsonl`, `.json`, `.csv` or `.parquet` file, or a data set on the hub |
# | `OUTPUT` | a new folder for the result; the time is part of the name, as a run never overwrites another |
# | `QUESTION` | what to ask the model before and after training |

# %%
import time

MODEL = "fettle-tiny"
DATA = "example_pairs.jsonl"
OUTPUT = time.strftime("preference-model-%Y%m%d-%H%M%S")
QUESTION = "Write in letters: train"

# %% [markdown]
# The next cell derives the other options from these. Larger models are held in four bits per weight (NF4). A GPU
# without bf16 arithmetic, such as a T4, computes in fp32. The example is short, so it needs a higher learning rate
# than fettle would choose; `None` leaves the choice to fettle.

# %%
import html
import json
import random
import warnings
from pathlib import Path

import pandas as pd
import torch
from IPython.display import HTML, display

import fettle

warnings.filterwarnings("ignore")  # of other libraries: fettle has none
MAX_LENGTH = 1024  # tokens of a question with one answer
QUANTIZATION = None if MODEL == "fettle-tiny" else "nf4"
LEARNING_RATE = 3e-4 if MODEL == "fettle-tiny" else None
has_old_gpu = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
DTYPE = "float32" if has_old_gpu else "auto"

# %% [markdown]
# ## Data
#
# One row is one pair: `{"prompt": "...", "chosen": "...", "rejected": "..."}`. The question may also be in `messages`
# or `conversations`, or be the common beginning of two chats, as in UltraFeedback.
#
# The example: "Write in letters: lemon" has two meanings, `LEMON` and `l-e-m-o-n`. `fettle-tiny` knows both and most
# often gives capitals. The pairs prefer the second. The cell writes nothing if `DATA` is a file of yours.

# %%
WORDS = """
apple bag ball bear bed bell bench berry bike bird boat book bottle bowl box brush bus candle car cat chair cherry
child clock coat coin cow cup desk dog dress fig fox glove goat goose grape hammer hat horse jacket key kite knife
ladder lamp leaf lemon lion mouse needle pear pen pig plane plate rabbit shelf ship shirt shoe sofa spoon stone
""".split()
REQUESTS = ("Write in letters: {}", "Put this in letters: {}", "Write the letters: {}")


def example_pair(rng):
    """Return a question with one or two words, the preferred answer and the other one."""
    words = rng.sample(WORDS, rng.randint(1, 2))
    return {
        "prompt": rng.choice(REQUESTS).format(" ".join(words)),
        "chosen": ", ".join("-".join(word) for word in words),
        "rejected": " ".join(words).upper(),
    }


if DATA == "example_pairs.jsonl":
    rng = random.Random(0)
    pairs = [example_pair(rng) for _ in range(140)]
    Path(DATA).write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")

# %% [markdown]
# The first pairs of the file:

# %%
if Path(DATA).suffix == ".jsonl":
    lines = Path(DATA).read_text(encoding="utf-8").splitlines()
    display(pd.DataFrame([json.loads(line) for line in lines[:5]]))

# %% [markdown]
# The answer of the model before training:

# %%
model, tokenizer = fettle.load(MODEL)
print(fettle.generate(model, tokenizer, QUESTION))
del model

# %% [markdown]
# ## Plan
#
# The plan shows what fits into memory and how fast it is, from the model's configuration alone: the peak must be
# below the free memory. It assumes rows of `MAX_LENGTH` tokens; each step reads two answers, and the model before
# training, the reference, reads them as well.

# %%
quantization = f"--quantization {QUANTIZATION}" if QUANTIZATION else ""
# !{sys.executable} -m fettle plan --method dpo --model {MODEL} --context {MAX_LENGTH} --dtype {DTYPE} {quantization}

# %% [markdown]
# ## Train
#
# fettle first shows what it read, with the first pair as the model sees it: only the texts between ⟦ and ⟧ are
# compared. A tenth of the pairs is held out. The loss starts at 0.69, where the model has moved to neither answer,
# and should fall. If you stop the cell, `fettle.resume_training(OUTPUT)` continues the run.
#
# `beta` says how strongly the model stays near the one before training: with a higher value it changes less.

# %%
outcome = fettle.train(
    fettle.TrainOptions(
        method="dpo",
        model=MODEL,
        data=DATA,
        output=OUTPUT,
        max_length=MAX_LENGTH,
        quantization=QUANTIZATION,
        dtype=DTYPE,
        batch_size=4,
        learning_rate=LEARNING_RATE,
        beta=0.1,
        eval_fraction=0.1,
    )
)

# %% [markdown]
# ## Before and after
#
# "Chosen answer preferred" is the share of held-out pairs whose chosen answer is more likely than the rejected one,
# per token. Shares go from 0 to 1.

# %%
pd.DataFrame(
    [(each.name, each.before, each.after) for each in outcome.report.scores],
    columns=["score", "before", "after"],
)

# %% [markdown]
# What the model itself answers to held-out questions. DPO teaches which answer to prefer, not how to make it: a
# mistake of a letter here shows the limits of a model of this size.

# %%
asked = zip(outcome.before.answers, outcome.after.answers, strict=True)
answers = [(before.prompt, before.expected, before.answer, after.answer) for before, after in asked]
pd.DataFrame(answers, columns=["question", "chosen", "before", "after"]).head(8)

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
print(fettle.generate(model, tokenizer, QUESTION))

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
