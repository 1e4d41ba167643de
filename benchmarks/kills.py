"""Kill every stage with SIGKILL at random moments, start it again with the same command, and
compare what it ends with:
python benchmarks/kills.py [--kills 300] [--seed 0] [--stages prepare finetune] [--write CSV]

A stage runs twice undisturbed; files that differ then (logs, times) are not compared. Checkpoints
are compared by what they hold. One process imports everything and forks a child for each start.
"""
import argparse
import hashlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from tqdm import tqdm

TINY = dict(model=dict(encoder_type='cnn', cnn_channels=[8, 8], cnn_kernel_sizes=[9, 5],
                       cnn_strides=[8, 4], mamba_d_model=8, dropout=0.1),
            training=dict(num_epochs=6, warmup_epochs=1, batch_size=32, num_workers=1,
                          use_amp=False, save_interval=2, save_steps=4))
CONTRAST = dict(cycle_projector=[16, 8], substructure_projector=[16, 8])
TUNE = ('pahcl_finetune --task pascal --config {place}/tune.yaml --pretrained none '
        '--data-dir {place}/prepare --output-dir {out}')
# name -> the command, and the stage whose result is there when it begins
STAGES = dict(
    simulate=('pahcl_simulate --dataset pascal --output-dir {out} --subjects 15 --seconds 1.5',
              None),
    preprocess=('pahcl_preprocess --raw-dir {place}/simulate --output-dir {out} --num-workers 1',
                None),
    again=('pahcl_preprocess --raw-dir {place}/simulate --output-dir {out} --num-workers 1 '
           '--target-length 2000', 'preprocess'),
    prepare=('pahcl_prepare --raw-dir {place}/simulate --processed-dir {place}/preprocess '
             '--output-dir {out}', None),
    pretrain=('pahcl_pretrain --config {place}/pretrain.yaml --processed-dir {place}/preprocess '
              '--downstream-dir {place}/prepare --output-dir {out}', None),
    finetune=(TUNE, None),
    overwrite=(f'{TUNE} --overwrite --lr 2e-3', 'finetune'),
    evaluate=('pahcl_evaluate --checkpoint {out}/pascal_downstream/best_model.pt --task pascal '
              '--data-dir {place}/prepare', 'finetune'))
MODULES = dict(simulate='download', preprocess='cycles', prepare='splits', pretrain='pretrain',
               finetune='finetune', evaluate='evaluate')


def load_commands() -> dict:   # name -> function
    "Import everything that a child needs."
    torch.set_num_threads(1)
    # the bar's own lock is shared with children, and a killed one would keep it
    tqdm.set_lock(threading.RLock())
    for name in ('training.pretraining', 'training.finetuning', 'evaluation.evaluator',
                 'segmentation.preprocessing', 'data.splitting', 'data.simulation'):
        importlib.import_module(f'pahcl.{name}')
    importlib.import_module('torch._dynamo')   # an optimiser's first step imports it
    return {f'pahcl_{n}': getattr(importlib.import_module(f'pahcl.{m}'), f'pahcl_{n}')
            for n, m in MODULES.items()}


def start(
    words: list,     # of the command
    commands: dict,  # of `load_commands`
    log: Path,       # for what it says
    after=None,      # seconds, then it is killed
):                   # (exit code, or None where it was killed, and the seconds it ran)
    "Run a command in a forked child, to its end or to its death."
    began, child = time.monotonic(), os.fork()
    if child == 0:
        torch.set_num_threads(1)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2): os.dup2(said, stream)
        sys.stdout, sys.stderr = (os.fdopen(i, 'w', buffering=1, closefd=False) for i in (1, 2))
        sys.argv = list(words)
        try: code = commands[words[0]](words[1:])
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 70
        os._exit(code)
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic()-began
        if done: return os.waitstatus_to_exitcode(status), passed
        if after is not None and passed >= after:
            os.kill(child, signal.SIGKILL)
            killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
            return None if killed else 0, passed
        time.sleep(.002)


def hash_content(value) -> bytes:
    "Hash what a checkpoint holds: its file also holds the name that it had while it was written."
    digest = hashlib.sha256()
    def add(v):
        if isinstance(v, dict):
            for k in v: add(k), add(v[k])
        elif isinstance(v, (list, tuple)): [add(x) for x in v]
        elif isinstance(v, torch.Tensor): digest.update(v.contiguous().numpy().tobytes())
        else: digest.update(repr(v).encode())
    add(value)
    return digest.digest()


def read_folder(folder: Path) -> dict:   # relative name -> what stands for its content
    "Everything that a stage has written."
    def content(p):
        if p.suffix == '.pt': return hash_content(torch.load(p, weights_only=True))
        return hashlib.sha256(p.read_bytes()).digest()
    return {p.relative_to(folder).as_posix(): content(p) for p in sorted(folder.rglob('*'))
            if p.is_file()}


def kill_stage(name, kills, rng, place, commands) -> dict:   # a row of the table
    "Kill a stage again and again; a row of the table."
    command, base = STAGES[name]
    out, log = place/'out', place/f'{name}.log'
    words = command.format(place=place, out=out).split()
    def fresh():
        shutil.rmtree(out, ignore_errors=True)
        if base: shutil.copytree(place/base, out)
    def fail(what): raise SystemExit(f'{name}: {what}; {log}:\n{log.read_text()[-2000:]}')
    whole = []
    for _ in range(2):
        fresh()
        code, seconds = start(words, commands, log)
        if code: fail(f'exit code {code} though nobody killed it')
        whole.append(read_folder(out))
    steady = {k for k in whole[0] if whole[0][k] == whole[1].get(k)}
    shutil.rmtree(place/name, ignore_errors=True)
    shutil.copytree(out, place/name)
    fresh()
    done, ends, wrong = 0, 0, []
    while done < kills or ends == 0:
        code, _ = start(words, commands, log, rng.uniform(0, seconds) if done < kills else None)
        if code is None:
            done += 1
            continue
        if code: fail(f'exit code {code} after {done} kills')
        now, ends = read_folder(out), ends+1
        wrong += [k for k in steady if now.get(k) != whole[0][k]]
        wrong += [k for k in now if k not in whole[0]]
        fresh()
    return dict(stage=name, seconds=f'{seconds:.1f}', kills=done, ends=ends,
                files=f'{len(steady)} of {len(whole[0])}', different=', '.join(sorted({*wrong})))


def main(
    kills: int, seed=0, stages=tuple(STAGES),
    write=None,   # csv: the table, after each stage
):   # exit code
    "Kill each stage so often that all together are `kills`; print the table."
    commands, rng, rows = load_commands(), np.random.default_rng(seed), []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for kind, more in (('pretrain', dict(contrast=CONTRAST, validation_fraction=.4)),
                           ('tune', {})):
            (place/f'{kind}.yaml').write_text(yaml.safe_dump(TINY | more))
        last = list(STAGES).index(stages[-1])
        for name in list(STAGES)[:last+1]:
            # a stage that is not asked for makes what the next ones need
            share = len(stages)-len(rows) if name in stages else 0
            count = round((kills-sum(r['kills'] for r in rows))/share) if share else 0
            row = kill_stage(name, count, rng, place, commands)
            if name in stages: rows.append(row)
            if write and rows: pd.DataFrame(rows).drop(columns='seconds').to_csv(write, index=False)
            print(' | '.join(str(v) for v in row.values()), flush=True)
    print(f'{sum(r["kills"] for r in rows)} kills, {sum(r["ends"] for r in rows)} ends, '
          f'{sum(bool(r["different"]) for r in rows)} stages with other results')
    return int(any(r['different'] for r in rows))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=300)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--stages', nargs='+', default=list(STAGES), choices=list(STAGES))
    parser.add_argument('--write')
    sys.exit(main(**vars(parser.parse_args())))
