"""Every command of the guide can be given as it stands: its shell is right, its words are flags and
values of their kind, and both guides show the same
"""
import importlib
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from fastcore.script import anno_parser
from nbdev.config import get_config
from pahcl.core.scripts import _accept_both_spellings

ROOT = Path(__file__).parents[1]
PAGES = ['guide', 'guide_zh', 'tutorials/from_the_original']
SCRIPTS = dict(s.split('=') for s in get_config().d['console_scripts'].split())


def blocks(page):
    "The shell blocks of a page."
    cells = json.loads((ROOT/f'nbs/{page}.ipynb').read_text(encoding='utf-8'))['cells']
    text = '\n'.join(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
    return re.findall(r'```sh\n(.*?)```', text, re.S)


def commands(page):
    "Our commands on a page, as lists of words; a loop's variable is a number."
    text = '\n'.join(blocks(page)).replace('\\\n', ' ')
    found = re.findall(r'(?:torchrun [^\n]*?-m (pahcl\.\w+)|\b(pahcl_[a-z_]+))([^\n;|]*)', text)
    modules = {m.split(':')[0]: n for n, m in reversed(SCRIPTS.items())}
    return [[name or modules[module], *shlex.split(re.sub(r'\$\w+', '1', rest).split(' #')[0])]
            for module, name, rest in found]


@pytest.mark.parametrize('page', PAGES)
def test_every_block_is_shell(page):
    for block in blocks(page):
        done = subprocess.run(['bash', '-n'], input=block, text=True, capture_output=True)
        assert done.returncode == 0, f'{block}\n{done.stderr}'


@pytest.mark.parametrize('page', PAGES)
def test_every_command_can_be_given(page, capsys):
    found = commands(page)
    for name, *words in found:
        module, function = SCRIPTS[name].split(':')
        script = getattr(importlib.import_module(module), function)
        parser = _accept_both_spellings(anno_parser(script.__wrapped__, prog=name))
        try: parser.parse_args(words)
        except SystemExit: pytest.fail(f'{name} {shlex.join(words)}: {capsys.readouterr().err}')
    assert len(found) > 8


def test_every_command_is_in_the_guide():
    assert {name for name, *_ in commands('guide')} == set(SCRIPTS)


def test_explanations_stand_beside_the_code():
    "No comment at the end of a line, and no line that a page cuts off."
    for page in PAGES:
        for block in blocks(page):
            assert all(len(line) <= 88 and ' #' not in line for line in block.splitlines()), block
