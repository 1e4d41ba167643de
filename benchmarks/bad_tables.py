"""More than thirty tables that contradict each other or lead out of their folder: each is refused
with one sentence, with the manifest that pahcl_prepare writes and, as far as counts can tell,
without it.

python benchmarks/bad_tables.py [--csv nbs/measured]

Each case changes a made task (nine persons of CirCor), or the processed folder it was prepared
from; whoever reads it next has to say so. `--csv` writes what was said.
"""
import argparse, importlib.util, os, shutil, tempfile
from pathlib import Path
import pandas as pd
from pahcl.core.basics import get_logger, PahclError, read_json, write_json
from pahcl.data.loader import Cycles
from pahcl.data.splitting import prepare
from pahcl.data.persons import find_held_out_persons
from pahcl.data.tasks import SPLIT_FRACTIONS, Task
from pahcl.testing.made import _make_processed_folder, _make_recordings

TASK = 'circor_murmur'
CASES = {}      # name -> (what is changed: `task` or `processed`, a function of its folder)
# what a task without a manifest cannot know: its tables agree on it
UNSEEN = ('persons: each cycle another one, everywhere', 'states moved within a cycle',
          'a label changed everywhere', 'a line in other white space')

def case(name, of='task'):
    def add(function): CASES[name] = of, function
    return add

def edit(path, change):
    "Write a table anew; the first line of train.csv stays."
    first = path.read_text().split('\n')[0]
    table = pd.read_csv(path, dtype=str, keep_default_na=False, comment='#')
    text = change(table).to_csv(index=False)
    path.write_text((first+'\n' if first.startswith('#') else '')+text)

def cells(name, table, change, of='task'):
    "A case that changes a table; `change` is given it."
    CASES[name] = of, lambda folder: edit(folder/table, change)

def first(column, value):
    "Change a cell of the first row."
    def change(table):
        table.loc[0, column] = value(table.loc[0, column]) if callable(value) else value
        return table
    return change

def config(name, **changes):
    "A case that changes task_config.json."
    def change(folder):
        about = read_json(folder/'task_config.json')
        write_json(folder/'task_config.json', about | {k: f(about[k]) for k, f in changes.items()})
    CASES[f'task_config.json: {name}'] = 'task', change

for table in ('train.csv', 'cycles.csv', 'recordings.csv'):
    cells(f'{table}: half of it is missing', table, lambda t: t[:len(t)//2])
    cells(f'{table}: a row stands twice', table, lambda t: pd.concat([t, t[:1]]))
    cells(f'{table}: a label is another class', table,
          first('label', lambda old: str((int(old)+1) % 3)))
cells('test.csv: a person is missing', 'test.csv',
      lambda t: t[t['subject_id'] != t['subject_id'].iloc[0]])
cells('train.csv: a label that is no class', 'train.csv', first('label', '7'))
cells('train.csv: a label without a number', 'train.csv', first('label', ''))
cells('train.csv: label_name is another', 'train.csv',
      first('label_name', lambda old: 'Unknown' if old == 'Absent' else 'Absent'))
cells('train.csv: a cycle that is not there', 'train.csv',
      first('file_path', lambda old: old.replace('cycle_', 'cycle_9')))
cells('train.csv: no column label', 'train.csv', lambda t: t.drop(columns='label'))
for value in ('-5', '0', '99999', '1.5e9', 'nan', 'many'):
    cells(f'cycles.csv: valid_length {value}', 'cycles.csv', first('valid_length', value))
cells('cycles.csv: S2 begins before S1 ends', 'cycles.csv', first('s2_start', '0'))
cells('cycles.csv: a negative end of S1', 'cycles.csv', first('s1_end', '-1'))
cells('cycles.csv: each cycle is of another person', 'cycles.csv',
      lambda t: t.assign(person_id=[f'p{i}' for i in range(len(t))]))
cells('cycles.csv: each cycle is of another subject', 'cycles.csv',
      lambda t: t.assign(subject_id=[f's{i}' for i in range(len(t))]))
cells('cycles.csv: a cycle is in another split', 'cycles.csv',
      first('split', lambda old: 'test' if old != 'test' else 'train'))
cells('cycles.csv: a recording that is not there', 'cycles.csv', first('recording_id', 'nobody'))
cells('recordings.csv: a person is another', 'recordings.csv', first('person_id', 'somebody'))
cells('recordings.csv: a split is another', 'recordings.csv',
      first('split', lambda old: 'test' if old != 'test' else 'train'))

def swapped(names): return dict(zip(names, reversed(names.values())))
config('the classes change their numbers', label_map=swapped)
config('split_sizes are others', split_sizes=lambda old: old | dict(train=old['train']+1))
config('a test person is missing', split_persons=lambda old: old | dict(test=old['test'][1:]))
config('a test subject is missing', split_subjects=lambda old: old | dict(test=old['test'][1:]))
config('a person is in two splits',
       split_persons=lambda old: old | dict(train=old['train']+old['test'][:1]))
config('target_length is shorter', target_length=lambda old: 2000)

for out in ('../../../../tmp/x', '/etc/passwd', '..\\..\\x', ''):
    cells(f'train.csv: file_path {out!r}', 'train.csv', first('file_path', out))

@case('persons: each cycle another one, everywhere')
def _(folder):
    "Who is who is forgotten in all places, so that no person is in two splits any more."
    edit(folder/'cycles.csv', lambda t: t.assign(person_id=t['recording_id']))
    edit(folder/'recordings.csv', lambda t: t.assign(person_id=t['recording_id']))
    table = pd.read_csv(folder/'recordings.csv', dtype=str)
    about = read_json(folder/'task_config.json')
    persons = {s: sorted(table.loc[table['split'] == s, 'person_id']) for s in SPLIT_FRACTIONS}
    write_json(folder/'task_config.json', about | dict(split_persons=persons))

@case('states moved within a cycle')
def _(folder): edit(folder/'cycles.csv', lambda t: t.assign(s2_start=t['s1_end']))

@case('a label changed everywhere')
def _(folder):
    who = pd.read_csv(folder/'train.csv', dtype=str, comment='#')['subject_id'].iloc[0]
    def change(table):
        own = table['subject_id'] == who
        new = (int(table.loc[own, 'label'].iloc[0])+1) % 3
        table.loc[own, 'label'] = str(new)
        names = ('Present', 'Absent', 'Unknown')
        if 'label_name' in table: table.loc[own, 'label_name'] = names[new]
        return table
    for name in ('train.csv', 'cycles.csv', 'recordings.csv'): edit(folder/name, change)

@case('a line in other white space')
def _(folder):
    text = (folder/'val.csv').read_bytes()
    (folder/'val.csv').write_bytes(text.replace(b'\n', b'\r\n'))

for out in ('../../../x', '/etc', '..\\x', ''):
    cells(f'processed/recordings.csv: folder {out!r}', 'recordings.csv', first('folder', out),
          'processed')
cells('processed/recordings.csv: a folder stands twice', 'recordings.csv',
      lambda t: pd.concat([t, t[:1]]), 'processed')
cells('processed/recordings.csv: more cycles than there are', 'recordings.csv',
      first('cycles_kept', '9'), 'processed')

def own_cycles(name, column, value):
    "A case that changes the table of a recording's cycles."
    def change(folder): edit(next(folder.glob('subject_*/*/cycles.csv')), first(column, value))
    CASES[f'processed/…/cycles.csv: {name}'] = 'processed', change

own_cycles('a file outside', 'file', '../../../x.npy')
own_cycles('a file that is not there', 'file', 'cycle_777.npy')
own_cycles('valid_length -5', 'valid_length', '-5')
own_cycles('valid_length 99999', 'valid_length', '99999')
own_cycles('a beat that ends before it begins', 'offset_s', '-1')


def make(folder):
    "A processed folder and a task; the case may change both."
    _make_processed_folder(folder/'processed', _make_recordings(['circor'], 9), cycles=2)
    prepare('circor', folder/'raw', folder/'processed', folder/'tasks')

def read_task(folder):
    "Read a task in every way there is."
    task = Task.open(folder/'tasks', TASK)
    for split in SPLIT_FRACTIONS: Cycles.from_task(task.folder, split).batch([0])
    find_held_out_persons(folder/'tasks')

def read_processed_folder(folder):
    "Use a processed folder in every way there is."
    Cycles.from_processed(folder/'processed').batch([0])

def prepare_again(folder):
    prepare('circor', folder/'raw', folder/'processed', folder/'again')

def end_of(function, folder):
    "How a call ends, and what is said."
    try: function(folder)
    except PahclError as e: return 'sentence', ' '.join(str(e).split()).replace(f'{folder}', '…')
    except Exception as e: return 'raw', f'{type(e).__name__}: {e}'
    return 'success', ''

def try_case(
    made, folder,   # of `make`; a copy goes there
    name,           # of a case
    manifest=True,  # False: as in a task of an older version
):                  # list of (how it ended, what was said)
    "Change a copy and read it."
    of, change = CASES[name]
    shutil.copytree(made, folder, copy_function=os.link)
    for path in folder.rglob('*.csv'):   # links share their bytes
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data)
    about = folder/'tasks'/TASK/'task_config.json'
    content = read_json(about)
    about.unlink()
    write_json(about, {k: v for k, v in content.items() if manifest or k != 'manifest'})
    change(folder/'tasks'/TASK if of == 'task' else folder/'processed')
    reads = [read_task] if of == 'task' else [read_processed_folder, prepare_again]
    return [end_of(read, folder) for read in reads]

def main(flags=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--csv')
    args = parser.parse_args(flags)
    get_logger().setLevel('CRITICAL')
    with tempfile.TemporaryDirectory() as root:
        made, ends, older = Path(root)/'made', {}, {}
        make(made)
        for i, name in enumerate(CASES):
            found = try_case(made, Path(root)/f'{i}', name)
            ends[name] = next((e for e in found if e[0] != 'sentence'), found[0])
            if CASES[name][0] == 'task':
                older[name], = try_case(made, Path(root)/f'{i}-older', name, manifest=False)
            print(*(f'{end}: {name}: {said}' for end, said in (ends[name],)))
    for what, tried in (('contradictory tables', ends),
                        ('contradictory tables, no manifest', older)):
        wrong = {n: e for n, e in tried.items() if e[0] != 'sentence'}
        print(f'{what}: {len(tried)-len(wrong)} of {len(tried)} end with a sentence; {wrong}')
    if args.csv:
        path = Path(__file__).with_name('bad_recordings.py')
        spec = importlib.util.spec_from_file_location('bad_recordings', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.write_rows(args.csv, 'contradictory tables', ends)
    return ends, older

if __name__ == '__main__': main()
