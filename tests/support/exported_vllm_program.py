"""Asks a vLLM that knows nothing of EARL to edit a picture with an exported model, and writes the tokens.

    python tests/support/exported_vllm_program.py <request.json> <result.json>

No plugin is loaded (VLLM_PLUGINS is empty) and `earl` cannot be imported, here and in vLLM's helper processes.
"""

import json
import sys
from pathlib import Path


def main() -> None:
    from PIL import Image
    from vllm import LLM, SamplingParams

    request = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(model=request["exported"], enforce_eager=True, max_num_seqs=4, kv_cache_memory_bytes=2**26)
    image = Image.open(request["original"]).convert("RGB")
    content = [{"type": "image_pil", "image_pil": image}, {"type": "text", "text": request["instruction"]}]
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], skip_special_tokens=False)
    (done,) = llm.chat(
        [{"role": "user", "content": content}], sampling, chat_template_kwargs={"bos": True}, use_tqdm=False
    )
    found = {"prompt": list(done.prompt_token_ids), "written": list(done.outputs[0].token_ids)}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
