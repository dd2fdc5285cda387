"""Asks a vLLM that knows nothing of EARL to edit a picture with an exported model, and writes the tokens.

    python tests/support/exported_vllm_program.py <request.json> <result.json>

No plugin is loaded (VLLM_PLUGINS is empty) and `earl` cannot be imported, here and in vLLM's helper processes.

vLLM's kernels for CPUs, unlike torch's for any device, refuse the strided tensors that the attention of the vision
tokenizer gives them, so they get copies here.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams
    from vllm.model_executor.layers import utils

    plain = utils.cpu_unquantized_gemm
    utils.cpu_unquantized_gemm = lambda layer, x, *rest: plain(layer, x.contiguous(), *rest)
    request = json.loads(Path(sys.argv[1]).read_text())
    options = {"dtype": "float32", "enforce_eager": True, "max_num_seqs": 4, "kv_cache_memory_bytes": 2**26}
    llm = LLM(model=request["exported"], **options)
    image = Image.open(request["original"]).convert("RGB")
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": request["instruction"]}]
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"])
    chat = [{"role": "user", "content": content}]
    (seen,) = llm.chat(chat, sampling, chat_template_kwargs={"bos": True}, use_tqdm=False)
    (read,) = llm.generate({"prompt_token_ids": request["prompt"]}, sampling, use_tqdm=False)
    found = {
        "prompt": list(seen.prompt_token_ids),
        "of_image": list(seen.outputs[0].token_ids),
        "of_tokens": list(read.outputs[0].token_ids),
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
