"""Licences of all that an installation of pahcl brings, from the packages' own metadata.

python tools/licences.py [--check]: writes nbs/measured/licences.csv, or says what it lacks.
"""
import csv
import re
import sys
from importlib.metadata import distribution, PackageNotFoundError
from pathlib import Path

from packaging.requirements import Requirement

TABLE = Path(__file__).resolve().parents[1]/'nbs'/'measured'/'licences.csv'


def normal(name): return re.sub(r'[-_.]+', '-', name).lower()


def find_licence(meta) -> str:
    "What a package says of its licence, in few words."
    said = [c.split(' :: ')[-1] for c in meta.get_all('Classifier') or []
            if c.startswith('License ::')]
    text = (meta.get('License-Expression') or ', '.join(c for c in said if c != 'OSI Approved')
            or (meta.get('License') or '').strip().splitlines()[0:1] or 'not said')
    return text if isinstance(text, str) else text[0][:60]


def list_licences(root='pahcl') -> dict:
    "name -> licence, of everything that is needed, directly or not, on this machine."
    found, todo = {}, [root]
    while todo:
        name = normal(todo.pop())
        if name in found: continue
        try: package = distribution(name)
        except PackageNotFoundError: continue   # of another system
        found[name] = find_licence(package.metadata)
        needs = [Requirement(r) for r in package.requires or []]
        todo += [r.name for r in needs if not r.marker or r.marker.evaluate({'extra': ''})]
    return dict(sorted(found.items()))


if __name__ == '__main__':
    now = list_licences()
    if '--check' in sys.argv[1:]:
        with open(TABLE, encoding='utf-8') as f: known = {r['package'] for r in csv.DictReader(f)}
        if lost := now.keys()-known: sys.exit(f'{TABLE} lacks {", ".join(sorted(lost))}')
    else:
        with open(TABLE, 'w', encoding='utf-8', newline='') as f:
            csv.writer(f, lineterminator='\n').writerows([['package', 'licence'], *now.items()])
