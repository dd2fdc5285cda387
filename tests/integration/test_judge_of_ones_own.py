"""The judge that docs/judges.md shows, started as it stands, and asked."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

from earl import judges
from earl.judges import Judgement
from tests.support.evaluation_files import demo_config

PAGE = Path(__file__).parents[2] / "docs" / "judges.md"


def test_the_example_answers_the_questions_of_both_rubrics(tmp_path):
    [program] = re.findall(r"```python\n(import base64.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "my_judge.py").write_text(program)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    fields = {
        "judge": "openai",
        "reward_function_api_base": f"http://127.0.0.1:{port}",
        "reward_function_api_model_name": "my-judge",
        "base_exp_dir": str(tmp_path),
    }
    image = np.zeros((16, 16, 3), np.uint8)
    with subprocess.Popen(
        [sys.executable, "my_judge.py", str(port)], cwd=tmp_path, stderr=subprocess.DEVNULL
    ) as server:
        try:
            [verdict] = judges.get(demo_config(**fields)).score([Judgement("Remove it", image, image)])
        finally:
            server.kill()
    assert (verdict.status, verdict.edit_success, verdict.overedit) == ("ok", 7, 7)
    assert (verdict.naturalness, verdict.artifacts) == (7, 7)
