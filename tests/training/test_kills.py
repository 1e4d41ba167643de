"benchmarks/kills.py: a stage that is killed at random moments ends with the same content"
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2]/'benchmarks'/'kills.py'


def kill(*flags):
    # a process of its own: a child of the tests' server cannot fork again
    done = subprocess.run([sys.executable, str(SCRIPT), *flags], capture_output=True, text=True,
                 env=dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES=''))
    assert done.returncode == 0, done.stdout+done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].endswith(', 0 stages with other results')
    return done.stdout


def test_a_handful():
    assert '4 kills, ' in kill('--kills', '4', '--stages', 'simulate')


@pytest.mark.slow
def test_300(): assert '300 kills, ' in kill()
