"The site builds from the notebooks, no link is broken, and every command on a page can be given"
import importlib
import inspect
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import find_chromium, open_browser
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from test_site import find_dead_links, find_misses, find_wide_pages

ROOT = Path(__file__).parents[1]


PAGES = runpy.run_path(str(ROOT/'tools/doc_pages.py'))
PAGE_OF = PAGES['page_of']


def build_site(*arguments):
    "Build the site, or pages of it."
    pytest.importorskip('material')
    done = subprocess.run([sys.executable, 'tools/build_docs.py', *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]+done.stderr[-2000:]


def test_every_notebook_has_a_place_in_the_sidebar():
    groups = PAGES['read_groups']()
    sources = {n.relative_to(get_config().nbs_path).as_posix(): PAGE_OF(n)
               for n in nbglob(as_path=True)}
    shown = PAGES['list_pages'](PAGES['make_nav'](groups, sources))
    assert not (lost := set(sources.values())-set(shown)), f'nbs/sidebar.yml lacks {lost}'
    assert len(shown) == len(set(shown))
    gone = [n for n in PAGES['list_named'](groups) if n.endswith('.ipynb') and n not in sources]
    assert not gone, f'nbs/sidebar.yml names {gone}, which is not in nbs/'


def test_every_command_has_a_page(tmp_path):
    "With every flag that --help lists, and no other."
    PAGES['write_commands'](tmp_path)
    for name, function in PAGES['list_commands']().items():
        page = (tmp_path/f'{name}.md').read_text(encoding='utf-8')
        flags = {f.replace('-', '_') for f in re.findall(r'(?m)^\| `--([a-z0-9-]+)`', page)}
        known = inspect.signature(function).parameters
        assert flags <= {*known} and len(known)-len(flags) <= 2, name   # at most two have no dashes


@pytest.mark.slow
def test_site():
    build_site()
    pages = {p.relative_to(ROOT/'_docs').as_posix() for p in (ROOT/'_docs').rglob('*.html')}
    for notebook in nbglob(as_path=True): assert PAGE_OF(notebook) in pages


def test_first_cells_and_long_lines(tmp_path):
    "What follows title and `>` line stays; sentences are wrapped, columns set small, no more."
    pytest.importorskip('material')
    built = runpy.run_path(str(ROOT/'tools/build_docs.py'))
    for head in ('# A\n\n> b', '# A\n> b\n- key: value', '# A', ''):
        cells = [dict(cell_type='markdown', metadata={}, source=head+'\n\nThe rest.\n\n- one: 1')]
        made = dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=4)
        (tmp_path/'a.ipynb').write_text(json.dumps(made))
        assert built['rest_of_first'](tmp_path/'a.ipynb').strip() == 'The rest.\n\n- one: 1', head
    assert built['look']('short  and  wide') == ''
    assert built['look']('one sentence of many words '*9) == ' .wrapped'
    assert built['look']('\n'+'name   value '*10) == ' .columns'


def test_a_few_pages_build(tmp_path):
    "The front page, a module and a tutorial; their links may lead to pages not built here."
    names, site = ['index.ipynb', 'scan_reference.ipynb', 'sweeps.ipynb'], tmp_path/'site'
    build_site(*names, '--to', site)
    built = {p.relative_to(site).as_posix() for p in site.rglob('*.html')}
    assert {PAGE_OF(n) for n in nbglob(as_path=True) if n.name in names} <= built
    lacking = {Path(PAGE_OF(n)).name for n in nbglob(as_path=True)}
    assert not (dead := find_dead_links(site, lacking)), dead
    assert 'href="install.html">' in (site/'index.html').read_text(encoding='utf-8')
    scan = (site/'models/scan_reference.html').read_text(encoding='utf-8')
    assert '<math' in scan and 'id="figure-1"' in scan
    assert not re.search(r'>\[?`?\]\(https', scan) and '](http' not in scan
    if not find_chromium(): return
    pytest.importorskip('websocket')
    with open_browser() as browser:
        looked = [site/p for p in ('index.html', 'models/scan_reference.html', 'gallery.html')]
        assert not (wide := find_wide_pages(browser, looked)), wide
        assert not (missed := find_misses(browser, site, {'scan': ['scan_reference.html']})), missed
        assert not browser.errors, browser.errors[:3]


def test_links_between_pages_lead_somewhere():
    pages, checked = {PAGE_OF(n) for n in nbglob(as_path=True)}, 0
    for notebook in nbglob(as_path=True):
        folder = Path(PAGE_OF(notebook)).parent
        for cell in json.loads(notebook.read_text(encoding='utf-8'))['cells']:
            if cell['cell_type'] != 'markdown': continue
            for href in re.findall(r'\]\(([^):#\s]+\.(?:html|ipynb))', ''.join(cell['source'])):
                target = os.path.normpath(folder/Path(href).with_suffix('.html')).replace('\\', '/')
                assert target in pages, f'{notebook.name}: {href}'
                checked += 1
    assert checked > 50


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


def read_pages():
    "The text of README and of every notebook, by name."
    notebooks = {p.name: ''.join(''.join(c['source'])+'\n'
                                 for c in json.loads(p.read_text(encoding='utf-8'))['cells'])
                 for p in nbglob(as_path=True)}
    return notebooks | {'README.md': (ROOT/'README.md').read_text(encoding='utf-8')}


def list_commands(text):
    "Our commands in a text, as lists of words: lines of code blocks, and code between backticks."
    blocks = '\n'.join(re.findall(r'```sh\n(.*?)```', text, re.S)).replace('\\\n', ' ')
    lines = [line.split(' #')[0] for line in blocks.splitlines()]
    lines += re.findall(r'(?<!`)`(pahcl_\w+ [^`]*)`', text)
    return [shlex.split(part) for line in lines
            for part in re.findall(r'pahcl_[a-z_]+ [^;|]*', line)]


def test_every_flag_of_every_page_exists():
    scripts = dict(s.split('=') for s in get_config().d['console_scripts'].split())
    checked = 0
    for page, text in read_pages().items():
        for name, *words in list_commands(text):
            module, function = scripts[name].split(':')
            known = inspect.signature(getattr(importlib.import_module(module), function)).parameters
            for word in words:
                if not re.match(r'--\w', word) or word == '--help': continue
                checked += 1
                flag = word[2:].split('=')[0].replace('-', '_')
                assert flag in known, f'{page}: {name} has no flag {word}'
    assert checked > 100


def test_both_guides_have_the_same_commands():
    pages = read_pages()
    english, chinese = ([line.split(' #')[0].strip()
                         for block in re.findall(r'```(?:sh|yaml)\n(.*?)```', pages[name], re.S)
                         for line in block.splitlines()]
                        for name in ('guide.ipynb', 'guide_zh.ipynb'))
    assert english == chinese and len(english) > 40
