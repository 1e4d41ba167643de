"""Pages of the site that no notebook holds: commands, gallery of figures, and what is about pahcl.

`python tools/doc_pages.py nbs` writes them where quarto finds them.
"""
import base64
import importlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import yaml
from fastcore.script import anno_parser
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
HIDDEN = re.compile(r'#\| ?(hide|include: ?false)')


def page_of(
    notebook,  # its path
) -> str:      # path on the site, e.g. evaluation/scoring.html
    "The page that a notebook becomes: chapters lose their numbers."
    below = Path(notebook).relative_to(get_config().nbs_path)
    return below.with_name(re.sub(r'^\d+[a-zA-Z0-9]*_', '', below.stem)+'.html').as_posix()


def read_cells(notebook) -> list:
    "The cells that a reader sees."
    cells = json.loads(Path(notebook).read_text(encoding='utf-8'))['cells']
    return [c | dict(source=''.join(c['source'])) for c in cells
            if not HIDDEN.match(''.join(c['source']))]


# ---- groups ---------------------------------------------------------------------------------

def read_groups() -> list:  # as quarto has them
    "The groups of the site."
    text = (get_config().nbs_path/'sidebar.yml').read_text(encoding='utf-8')
    return yaml.safe_load(text)['website']['sidebar']['contents']


def list_named(entries) -> list:  # of paths
    "The files that a sidebar names, without those that it leaves to a pattern."
    if isinstance(entries, str): return []
    return [name for e in entries for name in
            (list_named(e['contents']) if isinstance(e, dict) else [e])]


def make_nav(
    entries,      # a pattern, or a list of files and sections
    pages: dict,  # source below nbs/ -> page
    named=None,   # by the whole sidebar: not to be found by a pattern once more
) -> list:        # mkdocs' nav
    "Those entries of a sidebar that are built."
    named = list_named(entries) if named is None else named
    if isinstance(entries, str):
        entries = sorted((p for p in pages if Path(p).match(entries) and p not in named),
                         key=lambda p: (not p.endswith('index.md'), p))
    nav = [{e['section']: make_nav(e['contents'], pages, named)} if isinstance(e, dict)
           else pages.get(e) for e in entries]
    return [n for n in nav if n and (isinstance(n, str) or any(n.values()))]


def list_pages(nav) -> list:
    "The pages of a nav."
    return [page for n in nav for page in
            (list_pages([*n.values()][0]) if isinstance(n, dict) else [n])]


# ---- commands -------------------------------------------------------------------------------

def list_commands() -> dict:  # name -> function
    "The console scripts of settings.ini."
    scripts = dict(s.split('=') for s in get_config().d['console_scripts'].split())
    return {name: getattr(importlib.import_module(place.split(':')[0]), name)
            for name, place in scripts.items()}


def find_examples(name) -> str:
    "What the guide shows of a command, line by line."
    guide = ''.join(c['source']+'\n' for c in read_cells(get_config().nbs_path/'guide.ipynb'))
    blocks = '\n'.join(re.findall(r'```sh\n(.*?)```', guide, re.S))
    return '\n'.join(line for line in blocks.splitlines()
                     if re.search(rf'\b{name} ', line.split(' #')[0]))


def describe_command(
    name, function,  # of `list_commands`
) -> str:            # Markdown
    "The page of a command: what it does, how the guide calls it, every flag that `--help` lists."
    parser = anno_parser(function.function, prog=name)
    rows = ['| flag | meaning | default |', '|---|---|---|']
    for a in parser._actions:
        if a.dest in ('help', 'pdb', 'xtra'): continue
        meaning, default = re.fullmatch(r'(.*?)(?: \(default: (.*)\))?',
                                        ' '.join((a.help or '').split())).groups()
        flag = a.option_strings[-1].replace('_', '-') if a.option_strings else a.dest.upper()
        default = '' if a.nargs == 0 or default is None else f'`{default}`'
        rows.append(f'| `{flag}` | {meaning} | {default} |'.replace('<', '&lt;'))
    about = ' '.join(parser.description.split())
    shown = find_examples(name)
    examples = f'## Examples\n\n```sh\n{shown}\n```\n\nFrom the [guide](../guide.html).\n'
    return '\n'.join([
        f'---\ntitle: {name}\n---\n\n# {name}\n', about, '{ .lead }\n', examples if shown else '',
        '## Flags\n', *rows, '', 'Flags are accepted with dashes and with underscores; '
        f'`{name} --help` says the same.', ''])


def write_commands(to: Path):
    "A page a command, and one that lists them."
    rows = []
    for name, function in list_commands().items():
        (to/f'{name}.md').write_text(describe_command(name, function), encoding='utf-8')
        about = ' '.join(function.__doc__.split())
        rows.append(f'| [`{name}`]({name}.html) | {about} |')
    head = '---\ntitle: Commands\n---\n\n# Commands\n\nWhat an installation brings to the shell.\n'
    (to/'index.md').write_text('\n'.join([head, '| command | |', '|---|---|', *rows, '']),
                               encoding='utf-8')


# ---- gallery --------------------------------------------------------------------------------

def find_figures(notebook) -> list:  # of (heading, number on the page, bytes of a png)
    "The pictures that a reader sees on a page, numbered as the page numbers them."
    heading, found = '', []
    for cell in read_cells(notebook):
        if cell['cell_type'] == 'markdown':
            heading = (re.findall(r'(?m)^#+ (.*)$', cell['source']) or [heading])[-1]
        pictures = [o['data']['image/png'] for o in cell.get('outputs', [])
                    if 'image/png' in o.get('data', {})]
        for p in pictures:
            found.append((heading, len(found)+1, base64.b64decode(''.join(p))))
    return found


def find_title(notebook) -> str:
    "The title of a page."
    return read_cells(notebook)[0]['source'].split('\n')[0].lstrip('# ')


def write_gallery(to: Path, notebooks):
    "Thumbnails of all figures; each leads to the code that draws it."
    lines = ['---\ntitle: Gallery\n---\n\n# Gallery\n',
             'Every figure of these pages; each leads to the code that draws it.\n']
    (to/'gallery').mkdir()
    shown = {}
    for notebook in notebooks:
        page, title = page_of(notebook), find_title(notebook)
        for heading, number, data in find_figures(notebook):
            thumb = f"gallery/{page[:-5].replace('/', '-')}-{number}.png"
            picture = Image.open(io.BytesIO(data)).convert('RGB')
            picture.thumbnail((480, 320))
            picture.quantize(64).save(to/thumb, optimize=True)
            words = re.sub(r'[`*\[\]]', '', heading if heading == title else f'{title}: {heading}')
            shown.setdefault(page.rpartition('/')[0], []).append(
                f'- [![{words}]({thumb}){{ loading=lazy }}{words}]({page}#figure-{number})')
    names = {'': 'Chapters', 'tutorials': 'Tutorials and results'}
    for room in sorted(shown, key=lambda r: (r not in names, [*shown].index(r))):
        lines += [f'\n## {names.get(room, "pahcl."+room)}\n\n<div class="gallery" markdown>\n',
                  *shown[room], '\n</div>']
    (to/'gallery.md').write_text('\n'.join(lines)+'\n', encoding='utf-8')


# ---- about ----------------------------------------------------------------------------------

def write_about(to: Path):
    "Licence, citation, contributing and changelog, from the files on top of the repository."
    home = get_config().git_url+'/blob/main/'
    for name, title in dict(CONTRIBUTING='Contributing', CHANGELOG='Changelog').items():
        text = (ROOT/f'{name}.md').read_text(encoding='utf-8')
        text = re.sub(r'\]\((?:nbs/)?(?:\d+_)?([\w/]+)\.ipynb', r'](../\1.html', text)
        text = re.sub(r'\]\((?!https?:|\.\./|#)([^)]+)', rf']({home}\1', text)
        text = f'---\ntitle: {title}\n---\n\n{text}'
        (to/f'{name.lower()}.md').write_text(text, encoding='utf-8')
    licence = (ROOT/'LICENSE').read_text(encoding='utf-8')
    (to/'licence.md').write_text(
        '---\ntitle: Licence\n---\n\n# Licence\n\nThe Apache License 2.0, for the code and for the '
        'packaged weights. For research: pahcl is no medical device. What an installation brings '
        'besides, and under which licences, is listed [here](../tutorials/security.html).\n\n'
        f'```text\n{licence}```\n', encoding='utf-8')
    cite = (ROOT/'CITATION.cff').read_text(encoding='utf-8')
    known = yaml.safe_load(cite)
    (to/'cite.md').write_text(
        '---\ntitle: How to cite\n---\n\n# How to cite\n\n'
        f"Cite the software, version {known['version']}, and the recordings that you use as well: "
        + '; '.join(f"[{r['title']}](https://doi.org/{r['doi']})" for r in known['references'])
        + f'.\n\n```yaml\n{cite}```\n', encoding='utf-8')


def write_pages(to, notebooks):
    "Write them all below a folder."
    for name in ('commands', 'about', 'gallery'):
        shutil.rmtree(Path(to)/name, ignore_errors=True)
    for name, write in dict(commands=write_commands, about=write_about).items():
        (Path(to)/name).mkdir(parents=True)
        write(Path(to)/name)
    write_gallery(Path(to), notebooks)


if __name__ == '__main__': write_pages(sys.argv[1], sorted(nbglob(as_path=True)))
