"""A byte-level tokenizer that needs no download: one token per byte, three special tokens, a chat template.

``python -m dataflex.demo.byte_tokenizer FOLDER`` writes tokenizer.json and tokenizer_config.json, as they
lie in configs/models/tiny_llama.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>")
VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '\\n> ' + message['content'] + eos_token }}
    {%- else %}
        {{- '\\n' + message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n> ' }}
{%- endif %}"""


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE, eos: bool = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges: ids 0, 1, 2 are <pad>, <s>, </s>, then the 256 bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate((*SPECIAL_TOKENS, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>" if eos else None,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def write(folder: Path) -> None:
    """Write the tokenizer into ``folder``, the chat template inside tokenizer_config.json."""
    byte_tokenizer().save_pretrained(folder, save_jinja_files=False)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
