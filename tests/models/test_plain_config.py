"""The config that a plan reads without transformers says what transformers' class says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers.activations import ACT2FN

from fettle.errors import UserError
from fettle.models.config import config_of
from fettle.models.families import FAMILIES, head_dim_of
from fettle.models.plain_config import plain_config
from fettle.ops.gated_activation import ACTIVATIONS
from fettle.planning.shapes import Shapes

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "vocab_size": 80,
}
CHANGES = (
    {},
    {"num_key_value_heads": 2},
    {"head_dim": 32},
    {"max_position_embeddings": 512},
    {"sliding_window": 128},
    {"sliding_window": None},
    {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 2},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"attention_bias": True, "mlp_bias": True},
    {"hidden_act": "gelu", "hidden_activation": "gelu"},
    {"final_logit_softcapping": None},
)


CASES = [(family, changes) for family in FAMILIES for changes in CHANGES]
CASES += [
    (family, {"num_key_value_heads": None}) for family in ("phi3", "llama")
]  # the others' classes refuse it


@pytest.mark.parametrize(("family", "changes"), CASES, ids=str)
def test_options_and_shapes_are_those_of_transformers_own_config(family, changes):
    content = {"model_type": family, **SIZES, **changes}
    stock, plain = FAMILIES[family].config.from_dict(dict(content)), plain_config(FAMILIES[family], content)
    if family == "gemma" and stock.hidden_act == "gelu":
        stock.hidden_act = "gelu_pytorch_tanh"  # transformers 5.17 takes the old name literally
    names = [name for name in vars(type(plain)) if not name.startswith("__") and hasattr(type(stock), name)]
    assert len(names) > 10
    for name in names:
        if name != "head_dim":
            assert getattr(plain, name) == getattr(stock, name), name
    assert head_dim_of(plain) == head_dim_of(stock)
    assert Shapes.of(plain) == Shapes.of(stock)


def test_so_are_those_of_real_checkpoints(shared_data: Path):
    files = list((shared_data / "checkpoints").glob("*/config.json"))
    assert files
    for file in files:
        content = json.loads(file.read_text())
        family = FAMILIES[content["model_type"]]
        assert Shapes.of(plain_config(family, content)) == Shapes.of(family.config.from_dict(content)), file


@pytest.mark.parametrize(
    "fault",
    [
        {"rope_scaling": 5},
        {"rope_scaling": {"type": "longrope"}},
        {"rope_scaling": {"type": "spiral", "factor": 2.0}},
        {"pad_token_id": 99999},
        {"rope_theta": -1},
        {"num_key_value_heads": 3},
    ],
    ids=str,
)
def test_what_training_refuses_a_plan_refuses_too(tmp_path, fault):
    content = {"model_type": "phi3", "pad_token_id": None, "max_position_embeddings": 64, **SIZES}
    content["original_max_position_embeddings"] = 64
    (tmp_path / "config.json").write_text(json.dumps(content))
    config_of(tmp_path, is_plain=True)
    (tmp_path / "config.json").write_text(json.dumps(content | fault))
    for is_plain in (True, False):
        with pytest.raises(UserError, match=r"config\.json"):
            config_of(tmp_path, is_plain=is_plain)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_computed_here_are_transformers_own(name):
    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(ACTIVATIONS[name](x), ACT2FN[name](x))


def test_a_plan_imports_no_model_code():
    """Nor sympy, a part of torch's decompositions: the first `normal_` on the meta device loads them, in 2.4 s."""
    program = (
        "import sys, fettle.cli\n"
        "code = fettle.cli.main(['plan', '--model', 'fettle-tiny', '--device', 'cpu'])\n"
        "heavy = {'transformers', 'peft', 'trl', 'datasets', 'bitsandbytes', 'gguf', 'xllamacpp', 'sympy'}\n"
        "heavy &= set(sys.modules)\n"
        "sys.exit(f'{code}: {heavy}' if code or heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
