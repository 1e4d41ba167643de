"tools/run_nbs.py: saved pictures become smaller, keep size and look, and are left alone then"
import base64, importlib.util, io
from pathlib import Path
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

spec = importlib.util.spec_from_file_location(
    'run_nbs', Path(__file__).parents[1]/'tools'/'run_nbs.py')
run_nbs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_nbs)

def test_pictures_shrink_once():
    figure, file = Figure(figsize=(4, 2)), io.BytesIO()
    figure.add_subplot().imshow(np.random.default_rng(0).random((20, 40)), cmap='RdBu_r')
    figure.savefig(file, format='png')
    before = base64.b64encode(file.getvalue()).decode()
    after = run_nbs.shrink_png(before)
    one, other = (np.asarray(Image.open(io.BytesIO(base64.b64decode(t))).convert('RGB'), float)
                  for t in (before, after))
    assert len(after) < .7*len(before) and one.shape == other.shape and abs(one-other).mean() < 2
    assert run_nbs.shrink_png(after) == after
