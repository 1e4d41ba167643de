"The site builds from the notebooks, every page is there and no link is broken"
import subprocess
import sys
from pathlib import Path

import pytest
from nbdev.doclinks import nbglob

ROOT = Path(__file__).parents[1]


def test_site():
    pytest.importorskip('smalldocs')
    done = subprocess.run([sys.executable, 'tools/build_docs.py'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'broken link' not in done.stdout+done.stderr, done.stdout+done.stderr
    pages = {p.stem for p in (ROOT/'_docs').rglob('*.html')}
    for notebook in nbglob(as_path=True): assert notebook.stem.lstrip('0123456789').split('_', 1)[-1] in pages or notebook.stem in pages


def test_modules_and_notebooks_match():
    import json
    names = []
    for notebook in nbglob(as_path=True):
        sources = [''.join(c['source']) for c in json.loads(notebook.read_text())['cells']]
        names += [s.split('default_exp')[1].split()[0] for s in sources if s.startswith('#| default_exp')]
    assert len(set(names)) == len(names)
    assert sorted(names) == sorted(p.stem for p in (ROOT/'pahcl').glob('*.py') if not p.stem.startswith('_'))
