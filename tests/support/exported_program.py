"""Uses an exported model as its card says, without EARL, and writes what came out.

    python tests/support/exported_program.py <request.json> <result.json>

`earl` cannot be imported here. What mends torchvision on machines of tests is read from its file.
"""

import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

EXTENSIONS = Path(__file__).parents[2] / "earl" / "execution" / "torch_extensions.py"


def main(request: dict[str, Any]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    found = run_card(request) | {"prompt_bfloat16": run_card(request | {"dtype": "bfloat16"})["prompt"]}
    prompt = torch.tensor([found["prompt"]])
    for name in ("exported", "policy"):
        model, notes = AutoModelForCausalLM.from_pretrained(request[name], dtype="float32", output_loading_info=True)
        assert not any(notes.values()), notes
        completion = model.generate(prompt, do_sample=False, max_new_tokens=request["max_tokens"])
        tokenizer = AutoTokenizer.from_pretrained(request[name])
        found[name] = {
            "class": type(model).__name__,
            "completion": completion[0, prompt.shape[1] :].tolist(),
            "text_ids": tokenizer(request["text"]).input_ids,
        }
    return found


def run_card(request: dict[str, Any]) -> dict[str, Any]:
    """Run the program of the model card on a picture, with the likeliest tokens."""
    card = (Path(request["exported"]) / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    changes = {
        'folder = "."': f"folder = {request['exported']!r}",
        'instruction = "Remove the red circle"': f"instruction = {request['instruction']!r}",
        '"original.png"': repr(request["original"]),
        '"edited.png"': repr(request["edited"]),
        "allowed)": "allowed, do_sample=False)",
        "Text.from_pretrained(folder)": f"Text.from_pretrained(folder, dtype={request['dtype']!r})",
    }
    for before, after in changes.items():
        assert before in code, before
        code = code.replace(before, after)
    names: dict[str, Any] = {}
    exec(code, names)
    model, inputs = names["model"], names["inputs"]
    ids = inputs.input_ids[0].clone()
    image = model.model.get_image_tokens(inputs.pixel_values, inputs.image_sizes)
    ids[ids == names["processor"].image_token_id] = image.to(ids.dtype)
    return {"class": type(model).__name__, "prompt": ids.tolist(), "written": names["written"][0].tolist()}


if __name__ == "__main__":
    sys.modules["earl"] = None
    operators = runpy.run_path(str(EXTENSIONS))["work_around"]()  # declared as long as this lives
    result = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(result))
