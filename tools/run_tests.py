"""What CI runs, on Linux, macOS and Windows alike: python tools/run_tests.py

First what needs no model: notebooks are clean, exports fresh, code readable, README of today. Then
every notebook once, against the exported modules, in one process and the tests in another. Options
go to both pytests, e.g. `--slow` or `-k scoring`; with any, coverage is shown but not asked for.
"""
import os
import subprocess
import sys
from pathlib import Path

from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.export import nbdev_export

ROOT = Path(__file__).resolve().parents[1]
COVERAGE = 85      # per cent of the package's lines
PATIENCE = 3600    # seconds for all tests
NOTEBOOKS = 'tests/test_notebooks.py'


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


def run_pytests(
    options: list,  # of pytest
) -> int:           # exit status
    "Notebooks and tests side by side, one thread each; their coverage together."
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get('PATH', '')])
    environment = os.environ | dict(OMP_NUM_THREADS='1', MATPLOTLIBRC=str(get_config().nbs_path),
                                    PATH=programs)
    common = ['-m', 'pytest', '--quiet', '--durations=10', '--cov=pahcl', '--cov-report=']
    log = ROOT/'.notebooks.log'
    with log.open('w', encoding='utf-8') as output:
        notebooks = run(*common, NOTEBOOKS, *options, stdout=output, stderr=subprocess.STDOUT,
                        env=environment | dict(COVERAGE_FILE='.coverage.notebooks'))
    tests = run(*common, 'tests', f'--ignore={NOTEBOOKS}', *options,
                env=environment | dict(COVERAGE_FILE='.coverage.tests'))
    try: codes = [p.wait(PATIENCE) for p in (tests, notebooks)]
    finally:
        for p in (tests, notebooks): p.kill()
        print('notebooks:', log.read_text(encoding='utf-8'), sep='\n', flush=True)
    # 5: none was selected by the options
    if any(c not in (0, 5) for c in codes): return 1
    run('-m', 'coverage', 'combine', '--quiet').wait()
    least = [] if options else [f'--fail-under={COVERAGE}']
    return run('-m', 'coverage', 'report', *least).wait()


def main(*options):
    if stale := find_stale():
        print('not as nbdev_clean and nbdev_export leave them (they are now):', *stale, sep='\n')
        return 1
    for check in (['tools/check_nbs.py'], ['tools/readme.py', '--check']):
        if code := run(*check).wait(): return code
    return run_pytests(list(options))


if __name__ == '__main__': sys.exit(main(*sys.argv[1:]))
