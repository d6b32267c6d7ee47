"""Chat templates by name: they render the published formats, and a mask covers the answer and its end."""

import json

import pytest
from tokenizers import AddedToken

from fettle.data import generation_prompt, render, tokenize_rows
from fettle.data.formats import to_row
from fettle.data.named_templates import NAMES, set_chat_template, template_text
from fettle.data.template import render_template
from fettle.errors import ModelFault, UserError
from fettle.models.load import load_tokenizer
from fettle.runs.options import TrainOptions
from fettle.runs.rows import fingerprints

ASKED = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "  Are you sure?\n"},
]
CHAT = [*ASKED, {"role": "assistant", "content": "Yes."}]
SYSTEM = {"role": "system", "content": "Be brief."}

VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
PLAIN = {
    "vicuna": (
        f"<s>{VICUNA} USER: What is two and two? ASSISTANT: It is 4.</s>USER:   Are you sure?\n ASSISTANT:",
        " Yes.</s>",
    ),
    "alpaca": (
        f"<s>{ALPACA}\n\n### Instruction:\nWhat is two and two?\n\n### Response:\nIt is 4.</s>"
        "\n\n### Instruction:\n  Are you sure?\n\n\n### Response:\n",
        "Yes.</s>",
    ),
    "chatml": (
        "<s><|im_start|>user\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\nIt is 4.<|im_end|>\n"
        "<|im_start|>user\n  Are you sure?\n<|im_end|>\n<|im_start|>assistant\n",
        "Yes.<|im_end|>\n",
    ),
}
PUBLISHED = {
    "gemma": "gemma-2-9b-it",
    "llama-3": "Llama-3.1-8B-Instruct",
    "mistral": "Mistral-7B-Instruct-v0.3",
    "phi-3": "Phi-3.5-mini-instruct",
    "zephyr": "zephyr-7b-beta",
}
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


@pytest.mark.parametrize("name", PLAIN)
def test_formats_of_plain_text(base, name) -> None:
    base.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert set_chat_template(base, name) == [f"chat template {name}"]
    asked, answer = PLAIN[name]
    assert render_template(base, ASKED, for_generation=True) == asked
    assert render_template(base, CHAT) == asked + answer


@pytest.mark.parametrize("name", ["vicuna", "alpaca"])
def test_a_system_turn_replaces_the_text_at_the_beginning(base, name) -> None:
    set_chat_template(base, name)
    text = {"vicuna": VICUNA, "alpaca": ALPACA}[name]
    assert render_template(base, [SYSTEM, *CHAT]) == render_template(base, CHAT).replace(text, "Be brief.")


def test_the_text_starts_as_the_tokenizer_starts_it(families) -> None:
    """A tokenizer that does not begin texts with `<s>` itself gets none from ChatML."""
    tokenizer = families["chatml"].tokenizer
    before = tokenizer.chat_template
    try:
        set_chat_template(tokenizer, "chatml")
        assert render_template(tokenizer, CHAT).startswith("<|im_start|>")
    finally:
        tokenizer.chat_template = before


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
def test_the_templates_of_models_render_alike(shared_data, name, system) -> None:
    tokenizer = load_tokenizer(shared_data / "checkpoints" / PUBLISHED[name])

    def rendered():
        found = []
        for chat, asks in ((CHAT, False), (ASKED, True), (CHAT[:2], False), (CHAT[:1], True)):
            try:
                found.append(render_template(tokenizer, [*system, *chat], for_generation=asks))
            except UserError:
                found.append("refused")
        return found

    published = rendered()
    lines = set_chat_template(tokenizer, name)
    assert lines[0] == f"chat template {name}, in place of the model's own"
    if name == "llama-3":
        empty = "<|start_header_id|>system<|end_header_id|>\n\n<|eot_id|>"
        published = [text.replace(DATES, "").replace(empty, "") for text in published]
    assert rendered() == published
    assert any("plain text" in line for line in lines) == (name == "zephyr")


@pytest.mark.parametrize("name", NAMES)
def test_the_mask_covers_each_answer_and_its_end(base, name) -> None:
    set_chat_template(base, name)
    trained = [segment.text for segment in render(base, CHAT) if segment.is_trained]
    lead = " " if name in ("vicuna", "mistral") else ""
    assert trained == [f"{lead}It is 4.</s>", f"{lead}Yes.</s>"]
    whole = "".join(segment.text for segment in render(base, CHAT))
    assert whole.startswith(generation_prompt(base, ASKED) + trained[-1])


def test_tokens_that_the_tokenizer_lacks_are_named(base) -> None:
    """A chat cannot end at plain text, so the end-of-text token takes its place."""
    lines = set_chat_template(base, "chatml")
    assert lines == [
        "chat template chatml",
        "an answer ends in `</s>`, as the tokenizer has no token `<|im_end|>`",
        "`<|im_start|>` of the chat template: plain text, as the tokenizer has no such tokens",
    ]
    base.add_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    assert set_chat_template(base, "chatml") == ["chat template chatml, in place of the model's own"]
    assert "<|im_end|>" in render_template(base, CHAT)


def test_prompts_with_completions_become_chats(base) -> None:
    row = to_row({"prompt": "Hello", "completion": "Hi"}, "line 1")
    set_chat_template(base, "vicuna")
    text = base.decode(tokenize_rows([row], base, max_length=500).examples[0].input_ids)
    assert text.endswith("USER: Hello ASSISTANT: Hi</s>")


def test_a_file_of_ones_own(base, tmp_path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    assert set_chat_template(base, str(file)) == [f"chat template {file}"]
    assert render_template(base, CHAT[:2]) == "user: What is two and two?</s>assistant: It is 4.</s>"


def test_files_that_are_no_templates(base, tmp_path) -> None:
    for name, content in (("empty", b" \n"), ("latin", b"\xe9"), ("broken", b"{% for m in messages %}")):
        (tmp_path / f"{name}.jinja").write_bytes(content)
    for name, says in (
        ("chatlm", "'chatlm' is not known; expected alpaca, chatml"),
        (str(tmp_path / "gone.jinja"), "cannot be read"),
        (str(tmp_path / "empty.jinja"), "the file is empty"),
        (str(tmp_path / "latin.jinja"), "is not UTF-8"),
    ):
        with pytest.raises(UserError, match=says):
            set_chat_template(base, name)
    with pytest.raises(ModelFault, match=r"chat_template .*broken.jinja: .* not valid Jinja"):
        set_chat_template(base, str(tmp_path / "broken.jinja"))


def test_a_changed_file_is_noticed_before_a_run_resumes(chats, tmp_path) -> None:
    """Its text has a fingerprint, as the data have; a run without the option has none."""
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}")
    options = TrainOptions(model="m", data=str(chats), output="o", chat_template=str(file))
    before = fingerprints(options)
    file.write_text("{{ messages[1].content }}")
    after = fingerprints(options)
    assert {name for name in before if before[name] != after[name]} == {"chat_template"}
    assert set(fingerprints(TrainOptions(model="m", data=str(chats), output="o"))) == {"data"}


def test_the_default_is_named(base) -> None:
    row = to_row({"messages": CHAT}, "line 1")
    default = "the model has no chat template: chats are written in Zephyr's format"
    for _ in range(2):  # the second time the tokenizer has the default
        assert default in tokenize_rows([row], base, max_length=500).summary.lines()
    set_chat_template(base, "zephyr")
    assert default not in tokenize_rows([row], base, max_length=500).summary.lines()


def test_a_tokenizer_without_an_end_of_text_token(base) -> None:
    base.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        set_chat_template(base, "vicuna")


def test_a_chosen_template_goes_with_the_adapter(cli, chats, tmp_path) -> None:
    """Train the embedded model in ChatML; generation and the GGUF file use what was trained."""
    output, gguf = tmp_path / "zephyr", tmp_path / "model.gguf"
    words = ("--model", "fettle-tiny", "--data", chats, "--max-steps", 1, "--samples", 1, "--device", "cpu")
    trained = cli("train", *words, "--output", output, "--chat-template", "chatml")
    assert trained.code == 0, trained.err
    assert "chat template chatml, in place of the model's own" in trained.out
    assert "an answer ends in `<|endoftext|>`" in trained.out
    tokenizer = load_tokenizer(output)
    assert tokenizer.chat_template == template_text("chatml").replace("<|im_end|>", "<|endoftext|>")
    assert cli("generate", "--model", output, "--prompt", "Say 3.", "--device", "cpu").code == 0
    exported = cli("export", "--model", output, "--format", "gguf", "--to", gguf, "--quantization", "f16")
    assert exported.code == 0, exported.err
    from gguf import GGUFReader

    field = GGUFReader(gguf).get_field("tokenizer.chat_template")
    assert field.contents() == tokenizer.chat_template
    assert "chat_template: chatml\n" in (output / "run.yaml").read_text()
    assert "chat_template" in json.loads((output / "facts.json").read_text())["fingerprints"]
