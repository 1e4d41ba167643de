"The site builds from the notebooks, every page is there and no link is broken"
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from nbdev.doclinks import nbglob

ROOT = Path(__file__).parents[1]


def test_site():
    pytest.importorskip('smalldocs')
    done = subprocess.run([sys.executable, 'tools/build_docs.py'], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 'broken link' not in done.stdout+done.stderr, done.stdout+done.stderr
    page_of = runpy.run_path(str(ROOT/'tools/build_docs.py'))['page_of']
    pages = {p.relative_to(ROOT/'_docs').as_posix() for p in (ROOT/'_docs').rglob('*.html')}
    for notebook in nbglob(as_path=True): assert page_of(notebook) in pages


def test_modules_and_notebooks_match():
    names = []
    for notebook in nbglob(as_path=True):
        sources = [''.join(c['source'])
                   for c in json.loads(notebook.read_text(encoding='utf-8'))['cells']]
        names += [s.split('default_exp')[1].split()[0] for s in sources
                  if s.startswith('#| default_exp')]
    assert len(set(names)) == len(names)
    paths = [p.relative_to(ROOT/'pahcl').with_suffix('') for p in (ROOT/'pahcl').rglob('*.py')]
    assert sorted(names) == sorted('.'.join(p.parts) for p in paths if not p.stem.startswith('_'))
