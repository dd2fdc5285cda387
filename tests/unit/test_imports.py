"""What a stage's process imports as it starts."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_transformers_comes_without_scipy_which_others_can_still_import():
    program = "import sys, earl.emu3.models; assert 'scipy' not in sys.modules; import scipy.stats"
    subprocess.run([sys.executable, "-c", program], check=True)
