"""What CI runs, on Linux, macOS and Windows alike: python tools/run_tests.py

First what needs no model: notebooks are clean, exports fresh, code readable, README of today. Then
every notebook once, against the exported modules, and the tests: each folder is a pytest of its
own, two at once, the longest first, and each says what it found when it ends. Options go to all of
them, e.g. `--slow` or `-k scoring`.

Coverage is measured from Python 3.12 on, where it costs next to nothing, and with `--coverage`
everywhere (before 3.12 it doubles the time); a run without other options asks for COVERAGE.
"""
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.doclinks import nbdev_export

ROOT = Path(__file__).resolve().parents[1]
COVERAGE = 85      # per cent of the package's lines
PATIENCE = 3600    # seconds for a group of tests
CHEAP = sys.version_info >= (3, 12)   # sys.monitoring
AT_ONCE = 2        # groups, one thread each
LONGEST = 'notebooks', 'training', 'evaluation', 'segmentation'   # begin first


def read_tree() -> dict:  # path -> bytes
    "All notebooks and modules."
    cfg = get_config()
    return {p: p.read_bytes() for p in [*cfg.nbs_path.rglob('*.ipynb'), *cfg.lib_path.rglob('*.py')]
            if not any(part.startswith('.') for part in p.relative_to(ROOT).parts)}


def find_stale() -> list:  # of paths
    "Clean and export; the files that this changed. Uncommitted work does not matter."
    before = read_tree()
    nbdev_clean.__wrapped__()
    nbdev_export.__wrapped__()
    after = read_tree()
    return sorted(p for p in before.keys() | after if before.get(p) != after.get(p))


def run(*command, **kwargs):
    "Start Python with a program or a module and its arguments."
    return subprocess.Popen([sys.executable, *command], cwd=ROOT, **kwargs)


def list_groups() -> dict:   # name -> what pytest is given
    "The notebooks, each folder of tests, and the tests that are in none; the longest first."
    tests = ROOT/'tests'
    alone = sorted(p.relative_to(ROOT).as_posix() for p in tests.glob('test_*.py'))
    groups = {p.name: [f'tests/{p.name}'] for p in sorted(tests.iterdir())
              if any(p.glob('**/test_*.py'))}
    groups['notebooks'] = [p for p in alone if p.endswith('test_notebooks.py')]
    groups['tests'] = [p for p in alone if p not in groups['notebooks']]
    first = [name for name in LONGEST if name in groups]
    return {name: groups[name] for name in [*first, *(n for n in groups if n not in first)]}


def run_group(
    name: str, paths: list,   # of `list_groups`
    options: list,            # of pytest
    traced: bool,             # measure coverage
) -> int:                     # exit status
    "Run a group, then show what it said, in one piece."
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
    environment = os.environ | dict(OMP_NUM_THREADS='1', MATPLOTLIBRC=str(get_config().nbs_path),
                                    PATH=programs, COVERAGE_FILE=f'.coverage.{name}',
                                    **dict(COVERAGE_CORE='sysmon') if CHEAP else {})
    cover = ['--cov=pahcl', '--cov-report='] if traced else []
    began, log = time.monotonic(), ROOT/f'.tests-{name}.log'
    with log.open('w', encoding='utf-8') as output:
        group = run('-m', 'pytest', '--quiet', '--durations=10', *cover, *paths, *options,
                    stdout=output, stderr=subprocess.STDOUT, env=environment)
        try: code = group.wait(PATIENCE)
        except subprocess.TimeoutExpired: code = f'not done after {PATIENCE} s'
        finally: group.kill()
    how = {0: 'passed', 5: 'nothing was selected'}.get(code, f'FAILED ({code})')
    said = log.read_text(encoding='utf-8', errors='replace')
    print(f'===== {name}: {how}, {time.monotonic()-began:.0f} s', said, sep='\n', flush=True)
    return 0 if code in (0, 5) else 1


def run_pytests(
    options: list,  # of pytest, and `--coverage`
) -> int:           # exit status
    "All groups, two at once; their coverage together."
    traced = CHEAP or '--coverage' in options
    options = [o for o in options if o != '--coverage']
    sys.stdout.reconfigure(errors='replace')   # a console that knows few letters
    for old in ROOT.glob('.coverage.*'): old.unlink()   # of a run that was stopped
    groups = list_groups()
    print('groups of tests:', *groups, flush=True)
    with ThreadPoolExecutor(AT_ONCE) as lanes:
        codes = [*lanes.map(lambda group: run_group(*group, options, traced), groups.items())]
    if traced:
        run('-m', 'coverage', 'combine', '--quiet').wait()
        least = [] if options else [f'--fail-under={COVERAGE}']
        codes.append(run('-m', 'coverage', 'report', *least).wait())
    if failed := [name for name, code in zip(groups, codes) if code]: print('failed:', *failed)
    return int(any(codes))


def main(*options):
    if stale := find_stale():
        print('not as nbdev_clean and nbdev_export leave them (they are now):', *stale, sep='\n')
        return 1
    for check in (['tools/check_nbs.py'], ['tools/readme.py', '--check']):
        if code := run(*check).wait(): return code
    return run_pytests(list(options))


if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
