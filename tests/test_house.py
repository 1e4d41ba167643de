"""The house stands: imports go one way, no circles, nothing on top but the chapters, a quick door.

`python tests/test_house.py [FOLDER OF THE PACKAGE]` prints what is wrong, without pytest.
"""
import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from collections import namedtuple
from functools import lru_cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]/'pahcl'
ROOMS = ['core', 'data', 'segmentation', 'models', 'training', 'evaluation', 'studies']
CHAPTERS = ['download', 'cycles', 'splits', 'encoder', 'pretrain', 'finetune', 'evaluate']
APART = 'testing'   # may import every room; nothing in the package imports it
MOST_NAMES = 300
DOOR = ['load_recordings', 'simulate_recording', 'segment', 'preprocess', 'prepare', 'Cycles',
        'build_encoder', 'from_pretrained', 'embed', 'HeartSoundClassifier']

Arrow = namedtuple('Arrow', 'source target path line')   # modules without the package's name


# ---- reading the imports --------------------------------------------------------------------

def find_modules(
    package,  # its folder
) -> dict:    # dotted name without the package's, '' for its __init__ -> file
    "The modules of a package."
    found = {}
    for path in sorted(package.rglob('*.py')):
        parts = path.relative_to(package).with_suffix('').parts
        if parts == ('_modidx',): continue
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = path
    return found


def longest_module(
    dotted: str,  # of the package, without its name
    modules,      # names
) -> str:         # None where not even the first part is a module
    "The module that a dotted path leads to."
    parts = dotted.split('.')
    for n in range(len(parts), 0, -1):
        if '.'.join(parts[:n]) in modules: return '.'.join(parts[:n])


def read_door(
    init: Path,   # the package's __init__.py
) -> dict:        # name -> dotted module
    "The lazy names of a package: its dictionary `_API`."
    for node in ast.walk(ast.parse(init.read_text(encoding='utf-8'))):
        if not isinstance(node, ast.Assign) or ast.unparse(node.targets[0]) != '_API': continue
        if isinstance(node.value, ast.Dict): return ast.literal_eval(node.value)
        return {k.arg: ast.literal_eval(k.value) for k in node.value.keywords}
    return {}


def read_docstrings(tree) -> set:
    "The nodes of all docstrings: prose may name any module."
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {id(n.body[0].value) for n in ast.walk(tree)
            if isinstance(n, kinds) and n.body and isinstance(n.body[0], ast.Expr)}


def paths_in_text(
    text: str,     # a string constant
    package: str,  # the package's name
) -> list:         # dotted paths without the package's name
    "Modules in a text that is a dotted path, or a program or a command that imports them."
    dotted = rf'{package}\.([\w.]*\w)'
    if whole := re.fullmatch(dotted, text.strip()): return [whole[1]]
    found = re.findall(rf'(?:from|import|-m)\s+{dotted}', text)
    for base, names in re.findall(rf'from\s+{package}((?:\.\w+)*)\s+import\s+([\w, ]+)', text):
        found += [f'{base}.{n.split()[0]}'.lstrip('.') for n in names.split(',') if n.strip()]
    return found


def read_arrows(
    package: Path,  # its folder
) -> list:          # of `Arrow`
    "Every import between modules of a package, inside functions and in strings as well."
    modules, name = find_modules(package), package.name
    door = read_door(modules['']) if '' in modules else {}
    arrows = []
    for source, path in modules.items():
        if not source: continue   # the door is loaded lazily
        tree = ast.parse(path.read_text(encoding='utf-8'))
        prose = read_docstrings(tree)
        room = source.split('.') if path.name == '__init__.py' else source.split('.')[:-1]
        for node in ast.walk(tree):
            wanted = []
            if isinstance(node, ast.Import):
                wanted = [a.name.removeprefix(name+'.') for a in node.names
                          if a.name.startswith(name+'.')]
            elif isinstance(node, ast.ImportFrom):
                if node.level:
                    above = room[:len(room)-node.level+1]
                    base = '.'.join([*above, *(node.module.split('.') if node.module else [])])
                elif node.module == name or (node.module or '').startswith(name+'.'):
                    base = node.module[len(name)+1:]
                else: continue
                wanted = [f'{base}.{a.name}'.lstrip('.') for a in node.names]
                if not base: wanted = [door.get(w, w) for w in wanted]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                if id(node) not in prose: wanted = paths_in_text(node.value, name)
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith('import_module'):
                given = ast.unparse(node.args[0]).strip('\'"') if node.args else ''
                dots = len(given)-len(given.lstrip('.'))
                if dots: wanted = ['.'.join([*room[:len(room)-dots+1], given[dots:]])]
            for w in wanted:
                target = longest_module(w, modules)
                if target and target != source:
                    arrows.append(Arrow(source, target, path, node.lineno))
    return arrows


# ---- the rules ------------------------------------------------------------------------------

def floor_of(
    module: str,  # without the package's name
) -> int:         # 0 core … 6 studies, 7 chapters, 8 testing; None where it belongs nowhere
    "The floor on which a module stands."
    top = module.split('.')[0]
    if top == APART: return len(ROOMS)+1
    if top in ROOMS: return ROOMS.index(top)
    return len(ROOMS) if module in CHAPTERS else None


def find_misplaced(package) -> list:
    "Modules that stand neither in a room nor among the chapters."
    return [f'{path}: {module} is neither a chapter nor in a room'
            for module, path in find_modules(package).items()
            if module and floor_of(module) is None]


def find_steps_back(arrows) -> list:
    "Imports from a floor above, of chapters by rooms, and of what stands apart."
    faults = []
    for a in sorted(set(arrows)):
        here, there = floor_of(a.source), floor_of(a.target)
        if None in (here, there) or a.source.split('.')[0] == APART: continue
        why = ('testing is for tests and notebooks only' if a.target.split('.')[0] == APART else
               'rooms import no chapter' if there == len(ROOMS) and here < there else
               'a step back between rooms' if there > here else None)
        if why: faults.append(f'{a.path}:{a.line}: {a.source} imports {a.target}: {why}')
    return faults


def find_circles(arrows) -> list:
    "Groups of modules that need each other, with the imports that close the circle."
    targets = {}
    for a in arrows: targets.setdefault(a.source, set()).add(a.target)

    def reach(module):
        found, waiting = set(), [module]
        while waiting:
            for t in targets.get(waiting.pop(), ()):
                if t not in found: found.add(t); waiting.append(t)
        return found

    reached = {m: reach(m) for m in targets}
    circles = {frozenset(t for t in r if m in reached.get(t, ())) for m, r in reached.items()
               if m in r}
    faults = []
    for circle in sorted(circles, key=sorted):
        inside = sorted({a for a in arrows if a.source in circle and a.target in circle})
        faults += [f'{a.path}:{a.line}: {a.source} imports {a.target}: in a circle of '
                   f'{len(circle)} modules' for a in inside]
    return faults


def find_public_names(package) -> list:
    "Functions and classes at the top of modules that are not private; patched methods are none."
    found = []
    for module, path in find_modules(package).items():
        for node in ast.parse(path.read_text(encoding='utf-8')).body:
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): continue
            patched = any(ast.unparse(d).split('(')[0] in ('patch', 'patch_to')
                          for d in node.decorator_list)
            if not node.name.startswith('_') and not patched: found.append(f'{module}.{node.name}')
    return found


def find_faults(package: Path) -> list:
    "All that is wrong with the imports of a package."
    arrows = read_arrows(package)
    return find_misplaced(package)+find_steps_back(arrows)+find_circles(arrows)


# ---- tests of the package --------------------------------------------------------------------

def test_only_chapters_stand_on_top():
    assert not (found := find_misplaced(PACKAGE)), '\n'.join(found)

@lru_cache
def package_arrows(): return read_arrows(PACKAGE)

def test_imports_go_one_way():
    faults = find_steps_back(package_arrows())
    assert not faults, '\n'.join(faults)

def test_no_circle():
    faults = find_circles(package_arrows())
    assert not faults, '\n'.join(faults)

def test_few_public_names():
    names = find_public_names(PACKAGE)
    assert len(names) <= MOST_NAMES, f'{len(names)} public names; {MOST_NAMES} are enough'

def test_the_door_opens_quickly():
    "Counted in modules, not in seconds: a few of the package, and none that takes long."
    program = ('import sys; before = set(sys.modules); import pahcl; '
               'print(*sorted(set(sys.modules)-before))')
    loaded = subprocess.run([sys.executable, '-c', program], cwd=PACKAGE.parent, text=True,
                            check=True, capture_output=True).stdout.split()
    assert 'pahcl' in loaded and len(loaded) < 40, f'import pahcl loads {loaded}'
    assert not {name.split('.')[0] for name in loaded} & {'numpy', 'torch', 'pandas', 'scipy'}

def test_every_name_of_the_door_resolves():
    import pahcl
    names = read_door(PACKAGE/'__init__.py')
    assert set(DOOR) <= set(names), f'missing: {set(DOOR)-set(names)}'
    assert set(names) <= set(dir(pahcl))
    for name in names:
        assert getattr(pahcl, name) is not None
        assert importlib.util.find_spec(f'pahcl.{name}') is None, f'{name} is a module too'


# ---- tests of the checker -------------------------------------------------------------------

SOUND = {
    '__init__.py': "_API = dict(segment='segmentation.states')\n",
    'core/__init__.py': '', 'data/__init__.py': '', 'segmentation/__init__.py': '',
    'models/__init__.py': '', 'studies/__init__.py': '', 'testing/__init__.py': '',
    'core/basics.py': '"Of use to `pahcl.evaluate` and pahcl.studies.maps."\nimport os\n',
    'data/signal.py': 'from ..core.basics import PahclError\n',
    'segmentation/states.py': 'def f():\n    from pahcl.data import signal\n'
                              '    import pahcl.core.basics\n',
    'models/layers.py': 'from pahcl import segment\n',
    'studies/maps.py': 'from ..models.layers import Block\nfrom . import __name__ as name\n',
    'testing/made.py': 'from ..studies.maps import f\n',
    'evaluate.py': 'from .studies.maps import draw\nfrom pahcl.finetune import finetune\n',
    'finetune.py': 'from pahcl.models.layers import Block\n'}

FAULTS = [  # file, line appended to it, what is said and of which line
    ('data/signal.py', 'from ..models.layers import Block',
     ':2: data.signal imports models.layers'),
    ('data/signal.py', 'def f():\n    import pahcl.models.layers as x',
     ':3: data.signal imports models'),
    ('data/signal.py', 'def f():\n    from pahcl.studies import maps', 'studies.maps: a step back'),
    ('data/signal.py', 'from pahcl import segment', 'data.signal imports segmentation.states'),
    ('data/signal.py', 'RUN = "from pahcl.models.layers import job; job()"',
     'imports models.layers'),
    ('data/signal.py', 'RUN = "from pahcl.models import layers"', 'imports models.layers'),
    ('data/signal.py', 'WHERE = "pahcl.models.layers.Block"', 'imports models.layers'),
    ('data/signal.py', 'x = importlib.import_module("..models.layers", __package__)',
     'a step back'),
    ('models/layers.py', 'RUN = ["-m pahcl.finetune"]', 'rooms import no chapter'),
    ('models/layers.py', 'def f(): from ..evaluate import evaluate', 'rooms import no chapter'),
    ('evaluate.py', 'from .testing.made import g', 'testing is for tests and notebooks only'),
    ('studies/maps.py', 'from ..testing import made', 'testing is for tests and notebooks only'),
    ('finetune.py', 'def f():\n    from .evaluate import g',
     'finetune imports evaluate: in a circle of 2'),
    ('data/tasks.py', 'import os', None),
    ('report.py', 'import os', 'report is neither a chapter nor in a room'),
    ('attic/old.py', 'import os', 'attic.old is neither a chapter nor in a room')]


def build_package(folder, files) -> Path:
    "A made package `pahcl` in a folder."
    package = folder/'pahcl'
    for name, text in files.items():
        path = package/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')
    return package


def pytest_generate_tests(metafunc):
    if 'fault' in metafunc.fixturenames: metafunc.parametrize('fault', FAULTS)


def test_a_sound_package_has_no_fault(tmp_path):
    assert find_faults(build_package(tmp_path, SOUND)) == []


def test_each_fault_is_found(tmp_path, fault):
    file, line, said = fault
    package = build_package(tmp_path, SOUND | {file: SOUND.get(file, '')+line+'\n'})
    faults = find_faults(package)
    if said is None: assert faults == []
    else: assert any(said in f and str(package/file) in f for f in faults), faults


def test_a_circle_of_three_is_found(tmp_path):
    made = {f'core/{a}.py': f'from .{b} import x\n' for a, b in ('ab', 'bc', 'ca')}
    faults = find_faults(build_package(tmp_path, SOUND | made))
    assert len(faults) == 3 and all('in a circle of 3 modules' in f for f in faults)


def test_public_names_are_counted(tmp_path):
    text = 'def f(): pass\ndef _g(): pass\nclass A: pass\n@patch\ndef h(self: A): pass\n'
    package = build_package(tmp_path, {'__init__.py': '', 'core/a.py': text})
    assert find_public_names(package) == ['core.a.f', 'core.a.A']


def test_as_a_program(tmp_path):
    package = build_package(tmp_path, SOUND | {'report.py': ''})
    run = lambda: subprocess.run([sys.executable, __file__, str(package)], text=True,
                                 capture_output=True)
    assert (bad := run()).returncode == 1 and 'report.py: report is neither' in bad.stdout
    (package/'report.py').unlink()
    assert (good := run()).returncode == 0 and 'no fault' in good.stdout


if __name__ == '__main__':
    given = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else PACKAGE
    found = find_faults(given)
    print('\n'.join([*found, f'{len(found) or "no"} fault{"s"*(len(found) > 1)}, '
                             f'{len(find_public_names(given))} public names']))
    sys.exit(bool(found))
