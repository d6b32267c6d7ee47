"""The options a user can set, frozen: one more is a decision, not an accident, and one less breaks run files."""

import dataclasses

from fettle.runs.options import LoopOptions, PretrainOptions, TrainOptions

LOOP = """
output max_length packing epochs max_steps batch_size gradient_accumulation_steps learning_rate schedule warmup_ratio
weight_decay max_grad_norm gradient_checkpointing eval_fraction eval_data eval_steps save_steps early_stopping keep_best
keep_data skip_bad_rows samples report_to device seed
""".split()


def names(options: type) -> list[str]:
    return [field.name for field in dataclasses.fields(options)]


def test_the_loop_has_these_options():
    assert names(LoopOptions) == LOOP


def test_train_has_these_options():
    own = """model data method train_on beta loss label_smoothing margin chat_template dtype quantization memory
    remeasure rank alpha rslora dropout target_modules""".split()
    assert names(TrainOptions) == LOOP + own


def test_pretrain_has_these_options():
    own = """data train_on family vocab_size hidden_size intermediate_size layers heads key_value_heads context
    save_dtype""".split()
    assert names(PretrainOptions) == LOOP + own
