"""Start our commands as processes of their own that need not import everything again.

A server imports torch and the package once and forks a child for each start (Linux; elsewhere, and
for whatever is not Python, it is an ordinary start). A child has its own environment, working
directory, standard output and exit status, and can be killed.
"""
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path

# torch._dynamo: an optimiser's first step imports it, and sympy with it
PRELOADED = ['torch', 'torch._dynamo', 'pandas', 'scipy.signal', 'accelerate', 'pahcl.download',
             'pahcl.cycles', 'pahcl.splits', 'pahcl.pretrain', 'pahcl.finetune', 'pahcl.evaluate',
             'pahcl.studies.downstream', 'pahcl.training.pretraining',
             'pahcl.training.finetuning']
# what `run` can give to a child; a start with any other option is an ordinary one
OPTIONS = {'env', 'cwd', 'stdout', 'stderr', 'text', 'encoding', 'capture_output', 'check',
           'timeout'}
really_run = subprocess.run


@lru_cache
def server():
    "The context whose processes are forked from a server that has imported everything."
    if sys.platform != 'linux': return multiprocessing.get_context('spawn')
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(PRELOADED)
    return context


def execute(
    words: list,       # what follows the interpreter: -c code, -m module or a script, arguments
    environment: dict,
    folder: str,       # to work in
    out: str, err: str,   # files that get what it says; the same for both streams together
):
    "Be the interpreter that was started with these words."
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    # as an interpreter opens them, for threads and children alike
    sys.stdout, sys.stderr = (os.fdopen(i, 'w', encoding='utf-8', buffering=1) for i in (1, 2))
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    import torch
    torch.set_num_threads(int(environment.get('OMP_NUM_THREADS') or torch.get_num_threads()))
    first, rest = (('', words[2:]) if words[0] in ('-c', '-m')
                   else (str(Path(words[0]).absolute().parent), words[1:]))
    paths = [p for p in environment.get('PYTHONPATH', '').split(os.pathsep) if p]
    sys.path[:] = list(dict.fromkeys([first, *paths, *sys.path]))
    sys.argv = [words[0], *rest]
    warnings.filterwarnings('ignore', '.* found in sys.modules', RuntimeWarning)   # of `-m` below
    if words[0] == '-c': exec(compile(words[1], '<string>', 'exec'), dict(__name__='__main__'))
    elif words[0] == '-m': runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    else: runpy.run_path(words[0], run_name='__main__')


def start(
    words: list,   # as of `execute`
    env=None, cwd=None,
    stdout=os.devnull, stderr=os.devnull,   # paths
):                 # a started `multiprocessing.Process`
    "Start an interpreter."
    given = {k: str(v) for k, v in (os.environ if env is None else env).items()}
    process = server().Process(target=execute, args=(
        [os.fspath(w) for w in words], given, os.fspath(cwd or os.getcwd()), str(stdout),
        str(stderr)))
    process.start()
    return process


def words_of(
    command,       # as of `subprocess.run`
) -> list:         # what follows the interpreter; None where it is no start of ours
    "Recognise a start of this interpreter, or of one of our console scripts."
    if sys.platform != 'linux' or not isinstance(command, (list, tuple)): return None
    words, here = [os.fspath(w) for w in command], Path(sys.executable)
    if words[0] == sys.executable and len(words) > 1:
        return words[1:] if words[1] in ('-c', '-m') or not words[1].startswith('-') else None
    program = Path(words[0])
    return words if program.parent == here.parent and program.name.startswith('pahcl_') else None


def run(command, **options):
    "What `subprocess.run` does, without the imports where it starts our Python."
    words = words_of(command)
    if words is None or options.keys()-OPTIONS: return really_run(command, **options)
    capture = options.get('capture_output')
    wanted = [subprocess.PIPE if capture else options.get(k) for k in ('stdout', 'stderr')]
    text = options.get('text') or options.get('encoding')
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder)/n for n in ('out', 'err'))
        for path in (out, err): path.touch()
        together = wanted[1] == subprocess.STDOUT
        process = start(words, options.get('env'), options.get('cwd'), out,
                        out if together else err)
        process.join(options.get('timeout'))
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, options['timeout'])
        said = [p.read_bytes() for p in (out, err)]
    for i, (where, stream) in enumerate(zip(wanted, (sys.stdout, sys.stderr))):
        if where == subprocess.PIPE:
            if text: said[i] = said[i].decode(options.get('encoding') or 'utf-8')
            continue
        if where is None: stream.write(said[i].decode(errors='replace'))
        elif hasattr(where, 'write'): os.write(where.fileno(), said[i])
        said[i] = None
    done = subprocess.CompletedProcess(command, process.exitcode, *said)
    if options.get('check'): done.check_returncode()
    return done
